"""What ``run.py check`` takes: each shipped experiment, each mistake of the catalogue, and the command as it is typed.

    python -m benchmarks.check [--rounds 5] [--json FILE]

In one process, after a round that warms up: seconds from a file to its problems or its page, the median over rounds. In
fresh processes: ``run.py check`` with all shipped experiments, and with one, start of Python and imports included. What
the machine does besides shows in all of it, so the load average is printed too.
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

import torch

from tests.test_mistakes_catalogue import CATALOGUE
from vkd_plugin.check import examine

SHIPPED = sorted(
    path for path in glob.glob("configs/**/*.yaml", recursive=True) if not path.startswith("configs/tables")
)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call; the calls take turns, and a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def command(*paths: str) -> None:
    """``run.py check`` in a process of its own."""
    subprocess.run([sys.executable, "run.py", "check", *paths], check=True, stdout=subprocess.DEVNULL)


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
    print(f"{'a fresh run.py check':64}{'seconds':>9}")
    for name, seconds in commands.items():
        print(f"{name:64}{seconds:9.2f}")
    print(f"{'in one process: shipped experiments':64}{'seconds':>9}")
    for name, seconds in shipped.items():
        print(f"{name:64}{seconds:9.3f}")
    slowest = sorted(mistakes.items(), key=lambda item: -item[1])
    print(f"{f'in one process: {len(mistakes)} mistakes':64}{'seconds':>9}")
    print(f"{'median':64}{statistics.median(mistakes.values()):9.3f}")
    print(f"{'sum':64}{sum(mistakes.values()):9.3f}")
    for name, seconds in slowest:
        print(f"{name:64}{seconds:9.3f}")
    if args.json:
        results = {"commands": commands, "shipped": shipped, "mistakes": mistakes}
        args.json.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
