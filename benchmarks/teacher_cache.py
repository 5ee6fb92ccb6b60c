"""What a cache of the teacher's outputs saves: an epoch without it, one that fills it, and one that finds it full.

    OMP_NUM_THREADS=1 python -m benchmarks.teacher_cache [--experiments quickstart] [--rounds 10] [--json FILE]

Three runs of the same experiment through run.py's engine take turns, an epoch each, in one process on a CPU. That which
fills meets a new view of each image in every epoch; that which finds the cache full has one view, kept before the first
round. Validation and checkpoints are left out. Printed are medians over the rounds and ratios of these, and what the
files take for an image and a view.

What a cache saves is the teacher's part of a step, and what it costs hardly depends on the teacher: the teachers here
are as small as their students. So the last line says what it takes to read rows of the ImageNet experiments' size
(3,024 channels and 1,000 logits in bfloat16) from files that are in memory already, which a teacher is to be compared
to.
"""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import CONFIGS, Engine
from benchmarks.measuring import in_turn, of_experiments, ratios, save, taken
from vkd_plugin.teacher_cache.rows import Rows

NONE, FILLING, FULL = "none", "filling", "full"
IMAGENET_ROW = 2 * (3024 + 1000)
"""Bytes of an image and view in the ImageNet experiments."""


def runs(config: str, folder: Path) -> dict[str, Engine]:
    """The three, by name; below ``folder`` are their caches."""
    views = {NONE: None, FILLING: 10_000, FULL: 1}
    return {
        name: Engine(
            config,
            folder / name / "board",
            [f"train.teacher_cache={{folder: '{folder / name / 'cache'}', views: {count}}}"] if count else [],
        )
        for name, count in views.items()
    }


def bytes_of_a_sample(folder: Path, samples: int) -> float:
    """What the files of the first view hold for a sample, checksums included."""
    return sum(file.stat().st_size for file in folder.rglob("view-0000.*")) / samples


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Figures of one experiment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = runs(config, folder)
        shares: dict[str, list[float]] = {FILLING: [], FULL: []}

        def epoch(name: str) -> None:
            found[name].epoch()
            if cache := found[name].trainer.box.teacher_cache:
                shares[name].append(cache.share_found())

        for run in found:
            epoch(run)  # warm, and fill the cache of one view
        for values in shares.values():
            values.clear()
        times = in_turn({run: lambda run=run: epoch(run) for run in found}, rounds)
        dataset: Any = found[FULL].trainer._train_loader().dataset
        result = {
            "steps": found[NONE].steps,
            "samples": len(dataset),
            "seconds": times,
            "ratio": ratios(times, NONE),
            "found_share": {run: statistics.median(values) for run, values in shares.items()},
            "bytes_of_a_sample_and_view": bytes_of_a_sample(folder / FULL, len(dataset)),
        }
        for engine in found.values():
            engine.close()
    return result


def reading(samples: int, batch: int, rounds: int) -> dict[str, float]:
    """Microseconds an image of reading and of writing rows of the ImageNet experiments' size, in one thread."""
    draw = np.random.default_rng(0)
    values = draw.integers(0, 256, (batch, IMAGENET_ROW), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), samples, IMAGENET_ROW)
        order = [draw.permutation(samples)[:batch] for _ in range(rounds + 1)]
        writes = [taken(lambda indices=indices: rows.write(0, indices, values)).wall for indices in order]
        reads = [taken(lambda indices=indices: rows.read(0, indices)).wall for indices in order]
    return {
        "bytes": IMAGENET_ROW,
        "read": 1e6 * statistics.median(reads[1:]) / batch,
        "write": 1e6 * statistics.median(writes[1:]) / batch,
    }


def report(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}, {result['steps']} steps an epoch, {result['samples']} images")
    print(f"{'':10}{'s an epoch':>12}{'/ none':>9}{'processor':>12}{'/ none':>9}{'found':>9}")
    for run, (wall, cpu) in result["seconds"].items():
        ratio, share = result["ratio"][run], result["found_share"].get(run)
        print(f"{run:10}{wall:12.3f}{ratio.wall:9.3f}{cpu:12.3f}{ratio.cpu:9.3f}", end="")
        print("" if share is None else f"{100 * share:7.0f} %")
    print(f"{result['bytes_of_a_sample_and_view']:.0f} bytes for an image and a view", flush=True)


def main(argv: list[str] | None = None) -> None:
    file, about, results = of_experiments(
        "teacher_cache", __doc__, CONFIGS, "epochs of each run that are counted", measure, report, argv
    )
    results["reading"] = reading(samples=10_000, batch=256, rounds=20)
    print(
        f"\nrows of {IMAGENET_ROW} bytes: {results['reading']['read']:.1f} microseconds an image to read, "
        f"{results['reading']['write']:.1f} to write"
    )
    save(file, about, results)


if __name__ == "__main__":
    main()
