"""What checkpoints cost: training time of the quickstart with them, as a ratio to the same training without any.

    python -m benchmarks.checkpoint [--every 50] [--epochs 10] [--rounds 5] [--output DIR] [--json FILE]

Whole runs take turns in one process: no checkpoint at all; one at the end of each epoch (and ``best.pt``), which a run
always writes; these and one every so many steps. Printed is the median over the rounds of the ratio to the run without,
and the part of the training time that was spent in saving, by the clock: the smaller, steadier figure.
"""

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vkd_plugin.engine.checkpoint import Checkpoints
from vkd_plugin.engine.run import Options, run
from vkd_plugin.engine.train import Result, Trainer

CONFIG = "configs/digits/vkd/vit_from_cnn.yaml"


class Spent:
    """Seconds of ``Trainer.train``, and what was saved within them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.saving = 0.0
        self.saves = 0
        self.megabytes = 0.0


@contextmanager
def measured(saving: bool) -> Iterator[Spent]:
    """Times training in the block, with or without the calls that save something."""
    spent, train, write = Spent(), Trainer.train, Checkpoints._save
    save: dict[str, Callable[..., None]] = {name: getattr(Trainer, name) for name in ("save_last", "_save_epoch")}

    def timed(self: Trainer) -> Result:
        start = time.perf_counter()
        result = train(self)
        spent.seconds = time.perf_counter() - start
        return result

    def counted(self: Checkpoints, state: Any, path: Path) -> None:
        write(self, state, path)
        spent.saves += 1
        spent.megabytes = path.stat().st_size / 1e6

    def clocked(function: Callable[..., None]) -> Callable[..., None]:
        def inner(self: Trainer, *args: Any) -> None:
            start = time.perf_counter()
            function(self, *args)
            spent.saving += time.perf_counter() - start

        return inner

    Trainer.train = timed  # type: ignore[method-assign]
    Checkpoints._save = counted  # type: ignore[method-assign]
    for name in save:
        setattr(Trainer, name, clocked(save[name]) if saving else lambda self, *args: None)
    try:
        yield spent
    finally:
        Trainer.train, Checkpoints._save = train, write  # type: ignore[method-assign]
        for name, function in save.items():
            setattr(Trainer, name, function)


def once(output: Path, epochs: int, every: int | None, saving: bool) -> Spent:
    """One run of the quickstart's student."""
    overrides = [f"train.num_epochs={epochs}", "models.student_model.dst_ckpt=null"]
    overrides += [f"train.checkpoint={{every_steps: {every}}}"] if every else []
    options = Options(CONFIG, device="cpu", overrides=overrides, output=str(output), student_only=True)
    with measured(saving) as spent:
        try:
            run(options)
        except Exception as error:
            if saving or "no weights to test" not in str(error):
                raise
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    kinds: dict[str, tuple[int | None, bool]] = {
        "none": (None, False),
        "each epoch": (None, True),
        f"each epoch and every {args.every} steps": (args.every, True),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    shares: dict[str, list[float]] = {name: [] for name in kinds}
    saved: dict[str, Spent] = {}
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        for index in range(args.rounds + 1):
            for name, (every, saving) in kinds.items():
                spent = once(Path(folder, f"{index} {name}"), args.epochs, every, saving)
                saved[name] = spent
                if index:  # the first round warms up
                    times[name].append(spent.seconds)
                    shares[name].append(spent.saving / spent.seconds)
    results = {
        name: {
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(times[name], times["none"], strict=True)),
            "saves": saved[name].saves,
            "share": statistics.median(shares[name]),
        }
        for name in kinds
    }
    size = max(spent.megabytes for spent in saved.values())
    setting = {
        "config": CONFIG,
        "epochs": args.epochs,
        "rounds": args.rounds,
        "checkpoint_mb": round(size, 2),
        "device": f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": str(torch.__version__),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'checkpoints':36}{'seconds':>10}{'saves':>8}{'ratio':>8}{'in saving':>11}")
    for name, r in results.items():
        print(f"{name:36}{r['seconds']:10.2f}{r['saves']:8.0f}{r['ratio']:8.3f}{r['share']:11.1%}")
    if args.json:
        args.json.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
