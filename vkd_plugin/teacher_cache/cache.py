"""The teacher's outputs, computed once for each view of a sample."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchdistill.losses.high_level import AbstractLoss
from torchdistill.losses.mid_level import SimpleLossWrapper

from ..engine.randomness import SAMPLE, VIEW
from ..errors import BadValue, UserError
from ..losses.feature_pair import Feature, FeaturePair, ReadOut
from .rows import Rows

IODict = dict[str, dict[str, Any]]
Indices = NDArray[np.int64]
_ROUNDING = 0.02
"""Relative, of a row: some roundings of bfloat16, 2^-8 each."""
_ATTEMPTS = 3
"""At writing a batch's rows: a run beside this one may be about to write the same."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class TeacherCache:
    """Gives a batch's teacher outputs from a folder, and computes and keeps those that are not there.

    Kept is what the losses read: rows where a :class:`~vkd_plugin.losses.feature_pair.FeaturePair` reads them out of a
    map, whole outputs of hooked modules where a loss of another kind may want them. What has just been computed is
    rounded like what is read back, so a run that fills the cache and one that finds it full are the same run.

    Args:
        folder: signed for this teacher and data set (:func:`~vkd_plugin.teacher_cache.identity.sign`).
        samples: of the data set.
        dtype: a name in :data:`DTYPES`, of what is kept. Losses get what the teacher put out, rounded to it.
        criterion: torchdistill's, with its terms.

    Attributes:
        found, computed: samples so far.
    """

    def __init__(self, folder: Path, samples: int, dtype: str, criterion: nn.Module) -> None:
        self.folder = folder
        self.samples = samples
        self.dtype = DTYPES[dtype]
        self.features = read_features(criterion)
        self.found = self.computed = 0
        self._outputs: dict[Feature, _Output] = {}

    def outputs(
        self, supplement: Mapping[str, Tensor], device: torch.device, compute: Callable[[Tensor], IODict]
    ) -> tuple[Any, IODict]:
        """What torchdistill's ``get_teacher_output`` returns for a batch.

        Args:
            supplement: of the batch, with the samples' indices and views, on the CPU.
            device: where outputs go.
            compute: the teacher's forward pass for some of the batch's samples, which are given by their places.

        Raises:
            UserError: the teacher's outputs cannot be kept: no tensors, not so many rows for each sample, or not a
                function of the sample alone.
        """
        first = not self._outputs
        indices, views = supplement[SAMPLE].numpy(), supplement[VIEW].numpy()
        kept, there = self._read(indices, views)
        self.found, self.computed = self.found + int(there.sum()), self.computed + int((~there).sum())
        if not there.all():
            (missing,) = np.nonzero(~there)
            values = compute(torch.from_numpy(missing))
            for _ in range(_ATTEMPTS):
                try:
                    self._keep(values, indices[missing], views[missing])
                except OSError as error:
                    raise UserError(f"teacher_cache: {error.filename or self.folder}: {error.strerror}") from error
                kept, there = self._read(indices, views)
                if there.all():
                    break
            else:
                raise UserError(f"'{self.folder}': rows are not what has just been written to them; is the disk full?")
            if first:
                some = missing[::2]
                self._prove(compute(torch.from_numpy(some)), indices[some], views[some])
        io_dict = _io_dict({feature: _to(device, value) for feature, value in kept.items()}, self.features)
        return io_dict["."].get("output"), io_dict

    def share_found(self) -> float:
        """Samples that were found, of all since the last call; then counts anew."""
        share = self.found / max(self.found + self.computed, 1)
        self.found = self.computed = 0
        return share

    def _read(self, indices: Indices, views: Indices) -> tuple[dict[Feature, Tensor], NDArray[np.bool_]]:
        """What is kept of a batch, and of which samples all of it; nothing before the first forward pass.

        That one says the shapes, and proves what was kept before.
        """
        kept, there = {}, np.full(len(indices), bool(self._outputs) or self.features == [])
        for feature, output in self._outputs.items():
            kept[feature], whole = output.read(indices, views)
            there &= whole
        return kept, there

    def _keep(self, io_dict: IODict, indices: Indices, views: Indices) -> None:
        """Writes what is not there yet, and compares the rest to what is."""
        for feature, value in self._values(io_dict, len(indices)):
            output = self._outputs.get(feature)
            if output is None:
                folder = self.folder / _name(feature)
                output = self._outputs[feature] = _Output(folder, self.samples, value, len(indices), self.dtype)
            if not output.fits(value, len(indices)):
                raise UserError(
                    f"teacher_cache keeps outputs of one shape, and the {_where(feature)} is {tuple(value.shape)} for "
                    f"{len(indices)} samples, where each had {output.rows_each} x {tuple(output.shape)} before"
                )
            before, whole = output.read(indices, views)
            if not _alike(before, value, torch.from_numpy(whole.repeat(output.rows_each))):
                raise BadValue(
                    f"the {_where(feature)} is not what '{self.folder}' has of the same samples: images, libraries or "
                    "code have changed; delete the folder",
                    str(self.folder),
                )
            output.write(value, indices, views, ~whole)

    def _prove(self, io_dict: IODict, indices: Indices, views: Indices) -> None:
        """Compares what the teacher says of some samples on their own to what it said of them among others."""
        for feature, value in self._values(io_dict, len(indices)):
            output = self._outputs[feature]
            kept, _ = output.read(indices, views)
            if not kept.isfinite().all():
                raise UserError(f"teacher_cache: the {_where(feature)} is not finite as {output.kept}")
            everywhere = torch.ones(len(kept), dtype=torch.bool)
            if not output.fits(value, len(indices)) or not _alike(kept, value, everywhere):
                raise UserError(
                    f"teacher_cache: the {_where(feature)} is another in another batch, so it cannot be kept"
                )

    def _values(self, io_dict: IODict, samples: int) -> Iterator[tuple[Feature, Tensor]]:
        """What is to be kept of a forward pass of so many samples.

        Raises:
            UserError: it is no tensor, or has not as many rows for each sample.
        """
        for feature in self.features if self.features is not None else _everything(io_dict):
            value: Any = io_dict[feature.module][feature.io] if self.features is None else feature.read(io_dict)
            if not isinstance(value, Tensor) or not value.ndim or not len(value) or len(value) % samples:
                shape = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UserError(
                    "teacher_cache keeps tensors with as many rows for each of a batch's samples, and the "
                    f"{_where(feature)} is {shape} for {samples} samples"
                )
            yield feature, value


class _Output:
    """One output of the teacher for all samples and views.

    Args:
        folder, samples: of its rows.
        value: of a batch, for shapes.
        batch: samples of it.
        dtype: of what is kept, where ``value`` is of floating point.
    """

    def __init__(self, folder: Path, samples: int, value: Tensor, batch: int, dtype: torch.dtype) -> None:
        self.returned = value.dtype
        self.kept = dtype if value.is_floating_point() else value.dtype
        self.rows_each = len(value) // batch
        self.shape = value.shape[1:]
        size = self.rows_each * self.shape.numel() * self.kept.itemsize
        shape = "x".join(map(str, (self.rows_each, *self.shape)))
        self.rows = Rows(folder / f"{str(self.kept).removeprefix('torch.')}-{shape}", samples, size)

    def read(self, indices: Indices, views: Indices) -> tuple[Tensor, NDArray[np.bool_]]:
        """Values as the teacher put them out, rounded, and which samples' they are; those of others are arbitrary."""
        found, whole = np.empty((len(indices), self.rows.size), np.uint8), np.empty(len(indices), bool)
        for view in np.unique(views).tolist():
            own = views == view
            found[own], whole[own] = self.rows.read(view, indices[own])
        value = torch.from_numpy(found).view(self.kept)
        return value.reshape(len(indices) * self.rows_each, *self.shape).to(self.returned), whole

    def fits(self, value: Tensor, samples: int) -> bool:
        """Whether a value of so many samples has the shape of the first."""
        return len(value) == samples * self.rows_each and value.shape[1:] == self.shape

    def write(self, value: Tensor, indices: Indices, views: Indices, which: NDArray[np.bool_]) -> None:
        """Keeps the values of those samples that ``which`` chooses."""
        kept = value.detach().to("cpu", self.kept).reshape(len(indices), -1).contiguous()
        data = kept.view(torch.uint8).numpy()
        for view in np.unique(views[which]).tolist():
            own = which & (views == view)
            self.rows.write(view, indices[own], data[own])


def read_features(criterion: nn.Module) -> list[Feature] | None:
    """What the terms of a criterion read of the teacher; None if one of them does not say."""
    if not isinstance(criterion, AbstractLoss):
        return None
    features: dict[Feature, None] = {}  # in order, each once
    for term, _ in criterion.term_dict.values():
        if isinstance(term, FeaturePair):
            features[term.teacher] = None
        elif not (
            type(term) is SimpleLossWrapper and not term.is_input_from_teacher and not term.is_target_from_teacher
        ):
            return None
    return list(features)


def _everything(io_dict: IODict) -> list[Feature]:
    return [Feature("teacher", module, io) for module, ios in io_dict.items() for io in ios]


def _io_dict(kept: Mapping[Feature, Tensor], features: list[Feature] | None) -> IODict:
    """Of what is kept, as if the teacher had just been hooked."""
    io_dict: IODict = {".": {}}
    for feature, value in kept.items():
        place = io_dict.setdefault(feature.module, {})
        if features is None:
            place[feature.io] = value
        else:
            place.setdefault(feature.io, ReadOut())[feature] = value
    return io_dict


def _where(feature: Feature) -> str:
    return f"{feature.io} of module '{feature.module}' of the teacher"


def _name(feature: Feature) -> str:
    module = "outputs" if feature.module == "." else feature.module
    parts = [module, feature.io, feature.readout]
    parts += [] if feature.num_prefix_tokens is None else [f"without{feature.num_prefix_tokens}"]
    parts += [] if feature.index is None else [f"part{feature.index}"]
    return "-".join(parts)


def _alike(kept: Tensor, value: Tensor, where: Tensor) -> bool:
    """Whether rows differ by rounding alone where they are there: of bfloat16, in storage or autocast, or of kernels.

    Those of another image or transform are no more alike than two images are.
    """
    kept, value = kept[where].double().flatten(1), value.detach().cpu()[where].double().flatten(1)
    distance = torch.linalg.vector_norm(kept - value, dim=1)
    return bool((distance <= _ROUNDING * torch.linalg.vector_norm(value, dim=1)).all())


def _to(device: torch.device, value: Tensor) -> Tensor:
    if device.type != "cuda":
        return value
    return value.pin_memory().to(device, non_blocking=True)
