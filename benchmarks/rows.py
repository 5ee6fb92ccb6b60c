"""What a training step of each row of a table costs, as a ratio to the step of the row that the others are paired with.

    python -m benchmarks.rows [configs/tables/fashion_mnist_methods.yaml] [--steps 20] [--rounds 5] [--json FILE]

Forward passes of teacher and student, losses, backward pass and optimizer, through the engine's box, on one batch that
stays the same; without loading, validation and saving, and with the teacher computed at each step. Rows take turns in
one process; printed are medians over the rounds. The data and the teacher's weights have to be here.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vkd_plugin.config import load_experiment
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Row


def stepper(row: Row, device: torch.device) -> Callable[[], None]:
    """A function that takes one step of the row's training, on the first batch."""
    assert row.config is not None
    experiment = load_experiment(row.config, (*row.overrides, "train.teacher_cache=null"))
    teacher, student = (
        build_model(experiment, section, device, False) if section else None for section in model_sections(experiment)
    )
    assert student is not None
    trainer = Trainer(experiment, teacher, student, Processes(0, 1, device), None, seed=0)
    box = trainer.box
    box.pre_epoch_process(epoch=0)
    batch = trainer.task.unpack(next(iter(box.train_data_loader)), device)

    def step() -> None:
        box.post_forward_process(loss=box.forward_process(*batch))

    return step


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Of one of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default="configs/tables/fashion_mnist_methods.yaml")
    parser.add_argument("--steps", type=int, default=20, help="of a row at its turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    table = load_table(args.table)
    steps = {row.name: stepper(row, args.device) for row in table.rows if row.config}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.rounds + 1):
        for name, step in steps.items():
            taken = seconds(step, args.steps if index else 2, args.device)
            if index:
                times[name].append(taken)
    base = table.paired_with or next(iter(steps))
    print(f"{'':44}{'ms a step':>10}{'ratio':>8}")
    found = {}
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times[base], strict=True))
        found[name] = {"milliseconds": 1e3 * statistics.median(taken), "ratio": ratio}
        print(f"{name:44}{found[name]['milliseconds']:10.1f}{ratio:8.3f}")
    if args.json:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        args.json.write_text(json.dumps({"table": args.table, "base": base, "rows": found, **versions}, indent=1))


if __name__ == "__main__":
    main()
