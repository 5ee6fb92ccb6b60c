"""The loss around the test samples: how it grows when noise is added to the images."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from .opened import OpenedRun
from .page import Chart, colour, layout, line, log_axis

SIZES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Standard deviations of the noise, in units of the normalised images."""

DRAWS = 4
SAMPLES = 100

Landscape = Mapping[str, NDArray[np.float64]]
"""``loss``, ``loss/<term>`` and ``loss/<term>, normalization none`` to values (sizes, draws)."""


def landscape(opened: OpenedRun) -> Landscape:
    """Loss and terms along DRAWS random directions, student and teacher seeing the same perturbed images.

    Raises:
        UserError: samples that noise cannot be added to, or a loss that cannot be computed in evaluation.
    """
    samples, targets = opened.samples.some(SAMPLES)
    if not samples.is_floating_point():
        raise UserError(f"noise cannot be added to samples of type {samples.dtype}")
    found: dict[str, NDArray[np.float64]] = {}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)  # on the CPU: the same noise for all runs and devices
        noise = torch.randn(samples.shape, generator=generator).to(samples)
        for place, size in enumerate(SIZES):
            for name, value in opened.losses_at(samples + size * noise, targets).items():
                found.setdefault(name, np.full((len(SIZES), DRAWS), np.nan))[place, draw] = value
    return found


def landscape_chart(name: str, found: Sequence[tuple[int, str, Landscape]]) -> Chart:
    """The chart of one figure for several runs; that without normalisation is dashed.

    Args:
        name: ``loss`` or ``loss/<term>``.
        found: number and name of a run, and its landscape.
    """
    traces: list[dict[str, Any]] = []
    all_values: list[float] = []
    for index, run, values in found:
        for key, dash in ((name, None), (f"{name}, normalization none", "dot")):
            if key not in values:
                continue
            finite = np.where(np.isfinite(values[key]), values[key], np.nan)
            all_values += [float(value) for value in finite[np.isfinite(finite)]]
            label = escape(run if dash is None else f"{run}, normalization none")
            traces += [*_band(finite, index), _mean(finite, index, label, dash)]
    return {"data": traces, "layout": layout("standard deviation of the noise", yaxis=log_axis(*all_values))}


def _mean(values: NDArray[np.float64], index: int, name: str, dash: str | None) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(SIZES),
        "y": _listed(values.mean(axis=1)),
        "line": line(index) | ({"dash": dash} if dash else {}),
        "name": name,
        "meta": index,
    }


def _band(values: NDArray[np.float64], index: int) -> list[dict[str, Any]]:
    """Between the lowest and the highest of the draws."""
    plain = {"type": "scatter", "mode": "lines", "x": list(SIZES), "line": {"width": 0}, "hoverinfo": "skip"}
    red, green, blue = (int(colour(index)[at : at + 2], 16) for at in (1, 3, 5))
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.15)"}
    return [
        {**plain, "y": _listed(values.min(axis=1)), "meta": index},
        {**plain, "y": _listed(values.max(axis=1)), "meta": index, **fill},
    ]


def _listed(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
