"""What the benchmarks of loops and of scale share: turns, medians, ratios, exponents, the setting, the file."""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.projector import machine
from vkd_plugin.errors import UserError


class Taken(NamedTuple):
    """Seconds by the clock, and of the processor, which other programs on the machine disturb less."""

    wall: float
    cpu: float


def taken(call: Callable[[], object]) -> Taken:
    """What a call takes in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Taken]:
    """Medians of what calls take that are made in turn, so that what else the machine does falls on all of them alike.

    They change places from round to round, so that none always follows the same one.

    Args:
        calls: by name.
        rounds: each call is made once in every one. Warming up is the caller's.
    """
    found: dict[str, list[Taken]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(taken(calls[name]))
    return {name: Taken(*map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}


def ratios(times: Mapping[str, Taken], base: str) -> dict[str, Taken]:
    """Times as multiples of those of ``base``."""
    own = times[base]
    return {name: Taken(wall / own.wall, cpu / own.cpu) for name, (wall, cpu) in times.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the power law value = c size^p that fits best: least squares of the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or a number that has no logarithm.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or not all(v > 0 for v in (*sizes, *values)):
        raise ValueError(f"an exponent needs two sizes and positive numbers, got {list(sizes)} and {list(values)}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def setting(name: str, args: argparse.Namespace, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Under what a benchmark runs: command, machine, threads, version, load, date.

    Args:
        name: of the module in this folder.
        args: ``device`` of them is looked at, if there is one.
        argv: the arguments; those of the process if None.
    """
    device = str(getattr(args, "device", "cpu"))
    return {
        "command": " ".join([f"python -m benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)]),
        "machine": f"{machine(device.partition(':')[0])}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(about: Mapping[str, Any]) -> None:
    """The setting in a line, without the command, which is on the screen already."""
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "command"), flush=True)


def save(file: Path | None, about: Mapping[str, Any], results: Any) -> None:
    """Writes setting and results as JSON; nothing without a file."""
    if file is not None:
        file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def of_experiments(
    name: str,
    description: str | None,
    configs: Mapping[str, str],
    counted: str,
    measure: Callable[[str, int], dict[str, Any]],
    report: Callable[[str, dict[str, Any]], None],
    argv: Sequence[str] | None = None,
) -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
    """The command line of a benchmark that measures experiments, some of which may lack their data.

    Args:
        name: of the module in this folder.
        description: for ``--help``.
        configs: experiments by name.
        counted: what ``--rounds`` are.
        measure: an experiment's file and the rounds -> figures.
        report: prints the figures of an experiment.
        argv: the arguments; those of the process if None.

    Returns:
        The file of ``--json``, the setting, and figures by experiment.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--experiments", nargs="+", choices=configs, default=list(configs))
    parser.add_argument("--rounds", type=int, default=10, help=counted)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    about = setting(name, args, argv)
    show(about)
    results: dict[str, Any] = {}
    for experiment in args.experiments:
        try:
            results[experiment] = measure(configs[experiment], args.rounds)
        except UserError as error:  # Fashion-MNIST is not everywhere
            print(f"\n{experiment}: left out: {error}")
            continue
        report(experiment, results[experiment])
    return args.json, about, results
