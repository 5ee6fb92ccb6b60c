"""What starting costs: help, wrong arguments, a check and the import of the package, as ratios to ``import torch``.

    python -m benchmarks.startup [--config C] [--rounds 7] [--json FILE]

Fresh processes take turns, after a round that fills the disk's cache. Printed are medians over the rounds: of the
seconds by the clock, of the processor's, which other programs on the machine disturb less, and of the ratio of the
processor's seconds to those of ``python -c "import torch"`` in the same round.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

QUICKSTART = "configs/digits/vkd/vit_from_cnn.yaml"
TORCH = "import torch"


def commands(config: str) -> dict[str, tuple[list[str], int]]:
    """Arguments of python and the exit code to expect, by the name in the table."""
    collecting = (
        "import contextlib, vkd_cli; vkd_cli._lasting = contextlib.nullcontext; raise SystemExit(vkd_cli.main())"
    )
    hosts = "import timm, torchvision, torchdistill.core.distillation"  # the least that registering anything needs
    return {
        "pass": (["-c", "pass"], 0),
        "run.py --help": (["run.py", "--help"], 0),
        "run.py check --help": (["run.py", "check", "--help"], 0),
        "run.py check (nothing to check)": (["run.py", "check"], 2),
        TORCH: (["-c", TORCH], 0),
        hosts: (["-c", hosts], 0),
        "import vkd_plugin": (["-c", "import vkd_plugin"], 0),
        f"run.py check {config}": (["run.py", "check", config], 0),
        "the same, Python's garbage collector left to itself": (["-c", collecting, "check", config], 0),
    }


def seconds(arguments: list[str], expected: int) -> tuple[float, float]:
    """By the clock and of the processor, of one process from start to end."""
    start, before = time.perf_counter(), of_children()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    taken = time.perf_counter() - start, of_children() - before
    if done.returncode != expected:
        raise SystemExit(f"error: {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    return taken


def of_children() -> float:
    """Seconds of the processor that processes have used which this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=QUICKSTART, help=f"the experiment to check (default: {QUICKSTART})")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    load = os.getloadavg()[0]
    runs = commands(args.config)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.rounds + 1):
        for name, run in runs.items():
            by_clock, of_processor = seconds(*run)
            if index:
                wall[name].append(by_clock)
                cpu[name].append(of_processor)
    results = {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu": statistics.median(cpu[name]),
            "ratio": statistics.median(a / b for a, b in zip(cpu[name], cpu[TORCH], strict=True)),
        }
        for name in runs
    }
    setting = {
        "rounds": args.rounds,
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "device": f"cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'python':64}{'seconds':>9}{'cpu':>9}{'ratio':>9}")
    for name, r in results.items():
        print(f"{name:64}{r['seconds']:9.3f}{r['cpu']:9.3f}{r['ratio']:9.3f}")
    if args.json:
        args.json.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
