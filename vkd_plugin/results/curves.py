"""Curves of what runs recorded by epoch, one chart for each figure, all runs in it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .page import Chart, layout, line
from .runs import Run, is_number

GROUPS = (
    ("Loss and its terms", ("loss", "loss/")),
    ("Validation", ("val/", "val_ema/")),
    ("Orthogonality error", ("orthogonality_error/",)),
)
"""Of keys that are, or with a slash begin with, one of the names; all others are of the training itself."""

OTHERS = "Training"

_MOST_MARKERS = 40
"""Epochs up to which each is a point too: a single one would be no line."""


def grouped(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The keys of all records, by group, in the order in which runs wrote them."""
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    found: dict[str, list[str]] = {name: [] for name in (*(group for group, _ in GROUPS), OTHERS)}
    for key in keys:
        if key not in ("epoch", "step"):
            found[_group(key)].append(key)
    return found


def curves(runs: Sequence[Run], key: str) -> tuple[Chart, str]:
    """The chart of ``key`` by epoch, and where the figure was no number."""
    traces: list[dict[str, Any]] = []
    caption: list[str] = []
    for index, run in enumerate(runs):
        records = [record for record in run.records if key in record]
        if not records:
            continue
        epochs = [record["epoch"] for record in records]
        values = [record[key] if is_number(record[key]) else None for record in records]
        bad = [str(epoch) for epoch, value in zip(epochs, values, strict=True) if value is None]
        if bad:
            caption.append(f"{run.name}: {absence(key)} in epoch {', '.join(bad[:8])}{', ...' if len(bad) > 8 else ''}")
        traces.append(
            {
                "type": "scatter",
                "x": epochs,
                "y": values,
                "mode": "lines+markers" if len(epochs) <= _MOST_MARKERS else "lines",
                "marker": {"size": 4},
                "line": line(index),
                "name": escape(run.name),
                "meta": index,
            }
        )
    longest = max((len(trace["x"]) for trace in traces), default=0)
    x: dict[str, Any] = {"dtick": 1} if longest <= 10 else {"tickformat": "d"}
    y: dict[str, Any] = {"type": "log", "exponentformat": "power"} if _group(key) == "Orthogonality error" else {}
    return {"data": traces, "layout": layout("epoch", xaxis=x, yaxis=y)}, "; ".join(caption)


def absence(key: str) -> str:
    """Why a record has no number for a key."""
    # Average precision of boxes is a number wherever there is an object; models that are not finite end the run.
    return "no object of this size" if key.rpartition("/")[2].startswith("AP_") else "not finite"


def _group(key: str) -> str:
    for group, names in GROUPS:
        if any(key == name or (name.endswith("/") and key.startswith(name)) for name in names):
            return group
    return OTHERS
