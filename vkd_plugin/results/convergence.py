"""How fast projectors of each kind fit a run's features: an experiment of its own, student and teacher frozen."""

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from ..projectors import build_projector
from ..stiefel import ORTHOGONAL_MAPS
from .opened import Distilled
from .page import Chart, layout, log_axis

STEPS = 100
LEARNING_RATE = 1e-2

LARGEST = 2**17
"""Entries of a projector up to which all orthogonal maps are fitted; some would take minutes beyond."""

_MAPS_OF_LARGE = ("matrix_exp", "cholesky_qr")

_COLOURS = {
    "matrix_exp": "#0072b2", "cayley": "#56b4e9", "householder": "#009e73", "cholesky_qr": "#7f3c8d",
    "polar": "#cc79a7", "LinearProjector": "#d55e00", "MLPProjector": "#e69f00",
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A projector fitted to frozen features.

    Attributes:
        name: the orthogonal map, or the projector's class.
        losses: before each step, and after the last.
        projected: the student's rows through it (N, C_t).
    """

    name: str
    losses: list[float]
    projected: Tensor


def is_large(feature: Distilled) -> bool:
    """Whether some orthogonal maps are left out."""
    return feature.source.shape[1] * feature.teacher.shape[1] > LARGEST


def fit_projectors(feature: Distilled) -> list[Fit]:
    """New projectors of each kind, trained on the same rows with the same loss and optimizer."""
    maps = _MAPS_OF_LARGE if is_large(feature) else tuple(ORTHOGONAL_MAPS)
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (name, "OrthogonalProjector", {"orthogonal_map": name}) for name in maps
    ]
    kinds += [(name, name, {}) for name in ("LinearProjector", "MLPProjector")]
    return [_fit(name, _new(feature, key, options), feature) for name, key, options in kinds]


def _new(feature: Distilled, key: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_projector(key, feature.source.shape[1], feature.teacher.shape[1], **options).to(feature.source.device)


def _fit(name: str, projector: nn.Module, feature: Distilled) -> Fit:
    optimizer = torch.optim.Adam(projector.parameters(), lr=LEARNING_RATE)
    losses: list[Tensor] = []
    for _ in range(STEPS):
        loss = feature.criterion(projector(feature.source), feature.teacher)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        projected = projector(feature.source)
        losses.append(feature.criterion(projected, feature.teacher))
    return Fit(name, torch.stack(losses).double().tolist(), projected)


@torch.no_grad()
def trained_loss(feature: Distilled) -> float:
    """Of the run's own projector, on the same rows."""
    return float(feature.criterion(feature.projected, feature.teacher))


def convergence_chart(fits: list[Fit], trained: float) -> Chart:
    """Loss by step of each fit, and that of the run's own projector as a dashed line."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(range(STEPS + 1)),
            "y": [value if math.isfinite(value) else None for value in fit.losses],
            "line": {"color": _COLOURS.get(fit.name, "#6b7280"), "width": 2},
            "name": escape(fit.name),
        }
        for fit in fits
    ]
    if math.isfinite(trained):
        dashed = {"color": "#1c2430", "width": 1.5, "dash": "dash"}
        traces.append(
            {"type": "scatter", "mode": "lines", "x": [0, STEPS], "y": [trained] * 2, "line": dashed,
             "name": "its own, as trained"}
        )  # fmt: skip
    values = [value for trace in traces for value in trace["y"] if value is not None]
    shown: dict[str, Any] = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.2},
        "height": 380,
        "yaxis": log_axis(*values),
    }
    return {"data": traces, "layout": layout("step", "loss", **shown)}
