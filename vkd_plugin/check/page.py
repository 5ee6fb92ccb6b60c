"""What a check has found out, as a page for the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .facts import Facts, FeatureFacts, MemoryFacts, StageFacts

_PIPED_WIDTH = 120
_BARS = "▁▂▃▄▅▆▇█"
_ROLES = {"teacher_model": "teacher", "student_model": "student", "model": "student"}


def print_page(facts: Facts) -> None:
    """Prints the page of an experiment in which nothing is wrong."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    console.print(Text.assemble((facts.path, "bold"), "  ", ("ok", "green")))
    _section(
        console,
        "models",
        [
            (
                _ROLES[m.role],
                m.name,
                f"{m.parameters:,} parameters",
                f"{_amount(m.flops)}FLOPs a sample" if m.flops else "",
            )
            for m in facts.models
        ],
    )
    _section(
        console,
        "data",
        [
            (
                d.name,
                d.kind,
                _samples(d.length),
                f"of {_shape(d.sample)}" if d.sample else "",
                "" if d.is_here else "not read",
            )
            for d in facts.datasets
        ],
    )
    for stage in facts.stages:
        _print_stage(console, stage)
    if facts.extras:
        _section(console, "engine", [(", ".join(facts.extras),)])
    console.print()


def _print_stage(console: Console, stage: StageFacts) -> None:
    if stage.name:
        console.print(Text(f"\n  {stage.name}", style="bold"))
    _section(console, "features", [_feature(f) for f in stage.features])
    _section(console, "loss", [(f"{t.weight:g} x", t.name, t.criterion) for t in stage.terms])
    _section(
        console,
        "optimizer",
        [
            (
                stage.optimizer if i == 0 else "",
                f"lr {g.lr:.3g}",
                _decay(g.weight_decay),
                f"{_count(g.tensors, 'tensor')}, {g.parameters:,} numbers",
            )
            for i, g in enumerate(stage.groups)
        ],
    )
    if stage.scheduler:
        rates = stage.schedule
        _section(console, "schedule", [(stage.scheduler, curve(rates) if rates else "", _course(rates))])
    steps = "?" if stage.steps_per_epoch is None else f"{stage.steps_per_epoch:,}"
    size = f" x {stage.batch_size} samples" if stage.batch_size else ""
    whose = "in all" if stage.batch_is_global else "per process"
    _section(console, "training", [(f"{_count(stage.epochs, 'epoch')} x {steps} steps{size}, {whose}",)])
    if stage.memory:
        _section(console, "memory", [(_memory(stage.memory),)])


def curve(values: Sequence[float]) -> str:
    """Values as bars, from zero to the highest."""
    highest = max(values) or 1.0
    return "".join(_BARS[min(int(value / highest * len(_BARS)), len(_BARS) - 1)] for value in values)


def _section(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", min_width=11)
    for _ in range(max(len(row) for row in rows)):
        grid.add_column(overflow="fold")
    for index, row in enumerate(rows):
        grid.add_row(f"  {title}" if index == 0 else "", *(Text(cell) for cell in row))
    console.print(grid)


def _feature(feature: FeatureFacts) -> tuple[str, str, str, str]:
    path = "its output" if feature.path == "." else feature.path
    io = "" if feature.io == "output" else f" ({feature.io})"
    shape = feature.shape if isinstance(feature.shape, str) else _shape(feature.shape)
    return feature.side, path + io, shape, feature.projector or ""


def _shape(shape: Sequence[int] | None) -> str:
    return " x ".join(str(size) for size in shape) if shape else "one number"


def _samples(length: int | None) -> str:
    return "? samples" if length is None else f"{length:,} samples"


def _decay(decay: float | None) -> str:
    return "" if decay is None else f"weight decay {decay:g}"


def _count(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _course(rates: Sequence[float] | None) -> str:
    if not rates:
        return "depends on the training"
    highest = max(rates)
    through = "" if highest in (rates[0], rates[-1]) else f"up to {highest:.3g}, then "
    return f"{rates[0]:.3g} {through}to {rates[-1]:.3g}"


def _memory(memory: MemoryFacts) -> str:
    parts: list[tuple[str, Any]] = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
    ]
    listed = ", ".join(f"{name} {_amount(size, 1024)}B" for name, size in parts)
    return f"about {_amount(memory.total, 1024)}B a process ({listed}; estimated)"


def _amount(number: int | None, base: int = 1000) -> str:
    """``number`` with three digits and a prefix: ``1.23 G``, or ``1.15 Gi`` for a base of 1024."""
    value = float(number or 0)
    for prefix in ("", "k", "M", "G", "T"):
        if value < base or prefix == "T":
            break
        value /= base
    binary = "i" if base == 1024 and prefix else ""
    return f"{value:.3g} {prefix.upper() if binary else prefix}{binary}"
