"""Numbers that are not finite: told apart, counted, explained in a file, and stopped before they are saved.

float16   Gradients that overflow because the scaler's factor is too large are its way of finding the factor. The
          optimizer leaves the step out, the scaler halves its factor. They are counted and no more, unless there is
          no end to them.
all else  A loss that is not finite, or gradients that are not, end the run (exit code 3), or are left out a few
          times where ``skip_nonfinite`` allows it.

The figures come from :class:`~vkd_plugin.engine.meter.Readback`: a healthy step is not made to wait for them. On a
GPU a few more steps may therefore have run when the bad one is noticed; none of them is ever saved.
"""

import math
import operator
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .meter import StepFigures
from .sharding import local

# The factor begins at 2^16; below 2^-34 nothing of a gradient is left in float16.
SCALER_SKIPS_IN_A_ROW = 50

_RECENT = 20
_NAMED = 50


class Verdict(Enum):
    """What a step's figures mean for the run."""

    FINE = "fine"
    SCALER = "the gradient scaler left the step out"
    SKIPPED = "left out, as skip_nonfinite allows"
    SKIPPED_TOO = "part of an accumulation that is left out already"
    STOP = "the run has to stop"


class NumberGuard:
    """Judges each step's figures.

    Args:
        scaled: a gradient scaler is in use.
        skips_allowed: ``skip_nonfinite``.

    Attributes:
        skipped: steps left out because of ``skip_nonfinite``.
        scaler_skips: steps left out by the scaler.
        recent: the last figures, oldest first.
    """

    def __init__(self, scaled: bool, skips_allowed: int = 0) -> None:
        self.scaled = scaled
        self.skips_allowed = skips_allowed
        self.skipped = 0
        self.scaler_skips = 0
        self.recent: deque[StepFigures] = deque(maxlen=_RECENT)
        self._scaler_skips_in_a_row = 0
        self._leaving_out = False

    def judge(self, figures: StepFigures) -> Verdict:
        """The verdict on a step; to be asked once for each, in order."""
        self.recent.append(figures)
        # What the optimizer's step goes by; a term that is not finite makes the loss so, unless it has no part in it.
        decisive: dict[str, float] = {
            name: figures.values[name] for name in ("loss", "gradient_norm") if name in figures.values
        }
        norm, bad = decisive.get("gradient_norm"), not_finite(decisive)
        left_out, self._leaving_out = self._leaving_out, self._leaving_out and norm is None
        if bad and left_out:
            return Verdict.SKIPPED_TOO
        if self.scaled and bad == ["gradient_norm"]:
            self.scaler_skips += 1
            self._scaler_skips_in_a_row += 1
            return Verdict.SCALER if self._scaler_skips_in_a_row <= SCALER_SKIPS_IN_A_ROW else Verdict.STOP
        if norm is not None:
            self._scaler_skips_in_a_row = 0
        if not bad:
            return Verdict.FINE
        if self.skipped < self.skips_allowed:
            self.skipped += 1
            self._leaving_out = norm is None  # the optimizer's step, with more batches in it, is still to come
            return Verdict.SKIPPED
        return Verdict.STOP

    def state(self) -> dict[str, int]:
        """What :meth:`load` takes."""
        names = ("skipped", "scaler_skips", "_scaler_skips_in_a_row", "_leaving_out")
        return {name.lstrip("_"): int(getattr(self, name)) for name in names}

    def load(self, state: Mapping[str, int]) -> None:
        """Goes on counting."""
        self.skipped, self.scaler_skips = state["skipped"], state["scaler_skips"]
        self._scaler_skips_in_a_row = state["scaler_skips_in_a_row"]
        self._leaving_out = bool(state["leaving_out"])


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Names of the figures that are nan or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def explain(figures: StepFigures) -> str:
    """What was not finite, in half a line: ``the loss is nan (ce nan, vkd 0.1)``."""
    values = figures.values
    terms = ", ".join(f"{name.removeprefix('loss/')} {v:g}" for name, v in values.items() if name.startswith("loss/"))
    if not math.isfinite(values["loss"]):
        return f"the loss is {values['loss']:g}{f' ({terms})' if terms else ''}"
    return f"the gradient's norm is {values.get('gradient_norm', math.nan):g} at a loss of {values['loss']:g}"


def diagnosis(
    figures: StepFigures,
    recent: Iterable[StepFigures],
    samples: list[Any] | None,
    paths: list[str] | None,
    trained: Mapping[str, nn.Parameter],
    rank: int,
) -> dict[str, Any]:
    """What is known of a step that went wrong, for a JSON file.

    Args:
        figures: the step's.
        recent: those of the steps up to it.
        samples: indices into the training data set, where they can be told.
        paths: their files, where the data set knows them.
        trained: what trains, by name; of shards, the norm of this process's part is told.
        rank: the process whose batch it was.
    """
    weights = {name: float(local(parameter.detach()).float().norm()) for name, parameter in trained.items()}
    gradients: dict[str, float] = {}
    if figures.gradients is not None:
        names = {id(parameter): name for name, parameter in trained.items()}
        parameters, norms = figures.gradients
        found = zip(parameters, norms.tolist(), strict=True)
        gradients = {names.get(id(parameter), "?"): norm for parameter, norm in found}
    return {
        "step": figures.step,
        "epoch": figures.epoch + 1,
        "batch": figures.batch,
        "rank": rank,
        "what": explain(figures),
        "not_finite": not_finite(figures.values),
        "values": _readable(figures.values),
        "samples": None if samples is None else [_plain(sample) for sample in samples],
        "paths": paths,
        "gradient_norms": _readable(_worst(gradients)),
        "weight_norms": _readable(_worst(weights)),
        "recent": [{"step": f.step, **_readable(f.values)} for f in recent if f.step <= figures.step],
    }


def file_name(step: int, rank: int, world_size: int) -> str:
    """Name of the diagnosis in the run's folder."""
    return f"nonfinite-step{step}.json" if world_size == 1 else f"nonfinite-step{step}-rank{rank}.json"


def sample_paths(dataset: Any, samples: Iterable[Any]) -> list[str] | None:
    """Files of samples, of data sets that list them as torchvision's ``ImageFolder`` does."""
    files = getattr(dataset, "samples", None)
    try:
        found = [files[index][0] for index in samples] if files is not None else []
    except (TypeError, LookupError):
        return None
    return [str(path) for path in found] if found and all(isinstance(p, str | Path) for p in found) else None


def weights_are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all of them are, as far as this process holds them; waits for the device once."""
    tensors = [local(p.detach()) for p in parameters if p.is_floating_point()]
    return not tensors or bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def _plain(sample: Any) -> Any:
    """An index that JSON knows: samplers may yield numpy's integers, or tensors."""
    try:
        return operator.index(sample)
    except TypeError:
        return str(sample)


def _worst(norms: Mapping[str, float]) -> dict[str, float]:
    """Those that are not finite first, then the largest."""
    order = sorted(norms, key=lambda name: -norms[name] if math.isfinite(norms[name]) else -math.inf)
    return {name: norms[name] for name in order[:_NAMED]}


def _readable(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON knows no nan and no infinity, and null would not tell them apart."""
    return {name: value if math.isfinite(value) else f"{value:g}" for name, value in values.items()}
