"""What ``run.py check`` takes: each shipped experiment, each mistake of the catalogue, and the command as it is typed.

    python -m benchmarks.check [--rounds 5] [--json FILE]

In one process, after a round that warms up: from a file to its problems or its page. In fresh processes:
``run.py check`` with all shipped experiments, and with one, start of Python and imports included. Printed are medians
over the rounds: of the seconds by the clock, and of the processor's, which other programs on the machine disturb less.
"""

import argparse
import glob
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tests.test_mistakes_catalogue import CATALOGUE
from vkd_plugin.check import examine

SHIPPED = sorted(
    path for path in glob.glob("configs/**/*.yaml", recursive=True) if not path.startswith("configs/tables")
)


class Taken(NamedTuple):
    """Seconds by the clock, and of the processor."""

    wall: float
    cpu: float


def now() -> Taken:
    """Of this process and those that it has waited for."""
    return Taken(time.perf_counter(), time.process_time() + sum(os.times()[2:4]))


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Taken]:
    """What each call takes; the calls take turns, and a first round is not counted."""
    times: dict[str, list[Taken]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            start = now()
            call()
            end = now()
            if index:
                times[name].append(Taken(end.wall - start.wall, end.cpu - start.cpu))
    return {name: Taken(*map(statistics.median, zip(*taken, strict=True))) for name, taken in times.items()}


def command(*paths: str) -> None:
    """``run.py check`` in a process of its own."""
    subprocess.run([sys.executable, "run.py", "check", *paths], check=True, capture_output=True)


def show(title: str, taken: dict[str, Taken]) -> None:
    print(f"{title:64}{'seconds':>9}{'cpu':>9}")
    for name, (wall, cpu) in taken.items():
        print(f"{name:64}{wall:9.3f}{cpu:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    load = os.getloadavg()[0]
    shipped = medians({path: lambda path=path: examine(path) for path in SHIPPED}, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for index, mistake in enumerate(CATALOGUE):
            path = Path(folder, f"{index}.yaml")
            path.write_text(mistake.text, "utf-8")
            calls[mistake.name] = lambda path=path, m=mistake: examine(path, m.overrides, data=m.data)
        mistakes = medians(calls, args.rounds)
    runs = {f"all {len(SHIPPED)} shipped": lambda: command(*SHIPPED), "one of them": lambda: command(SHIPPED[-1])}
    commands = medians(runs, args.rounds)

    setting = {
        "rounds": args.rounds,
        "load": round(load, 2),
        "device": f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": str(torch.__version__),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    show("a fresh run.py check", commands)
    show("in one process: shipped experiments", shipped)
    show(f"in one process: {len(mistakes)} mistakes", dict(sorted(mistakes.items(), key=lambda item: -item[1].cpu)))
    show("of these", {"median": Taken(*map(statistics.median, zip(*mistakes.values(), strict=True)))})
    if args.json:
        results = {"commands": commands, "shipped": shipped, "mistakes": mistakes}
        named = {kind: {name: t._asdict() for name, t in taken.items()} for kind, taken in results.items()}
        args.json.write_text(json.dumps({**setting, "results": named}, indent=2) + "\n")


if __name__ == "__main__":
    main()
