"""From the hooked inputs and outputs of student and teacher to the two tensors that a loss compares."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..errors import BadValue, ConfigError
from ..readouts import PREFIX_READOUTS, get_readout, pick
from ..suggest import closest, nearest

IODict = Mapping[str, Mapping[str, Any]]


class ReadOut(dict["Feature", Tensor]):
    """What features make of one hooked output, in the place of that output: a cache keeps the rows, not the maps."""


class NotHookedError(ConfigError):
    """A loss reads what ``forward_hook`` does not name.

    Args:
        side: ``student`` or ``teacher``.
        module: path of what is read.
        io: ``output`` or ``input``.
        hooked: path -> what is hooked of it.
    """

    def __init__(self, side: str, module: str, io: str, hooked: Mapping[str, Collection[str]]) -> None:
        self.side = side
        self.module = module
        self.io = io if module in hooked else None
        if module in hooked:
            message = (
                f"the loss reads the {io} of module '{module}' of the {side}, but only its "
                f"{' and '.join(hooked[module])} is hooked: list it under forward_hook: {io}"
            )
        elif hooked:
            near = closest(module, hooked)
            hint = f" (did you mean '{near}'?)" if near else ""
            message = (
                f"the loss reads module '{module}' of the {side}, which is not hooked{hint}; "
                f"hooked: {', '.join(sorted(hooked, key=lambda path: (path == '.', path)))}"
            )
        else:
            message = (
                f"nothing of the {side} is hooked, and the loss reads its module '{module}': "
                f"add the module to forward_hook, or the {side} itself"
            )
        super().__init__(message)


@dataclass(frozen=True)
class Feature:
    """Where one side of a pair comes from.

    Args:
        side: ``student`` or ``teacher``, for messages.
        module: path of the hooked module, ``.`` for the whole model.
        io: ``output`` or ``input`` of that module.
        readout: a name of :mod:`vkd_plugin.readouts`.
        num_prefix_tokens: class and distillation tokens in front of the patch tokens; required by the readouts that
            leave them out, as a wrong number would go unnoticed.
        index: which part of a tuple, list or dict, if the module puts out one.

    Raises:
        ValueError: an unknown ``io`` or ``readout`` (the nearest is named), or ``num_prefix_tokens`` is missing.
    """

    side: str
    module: str
    io: str = "output"
    readout: str = "identity"
    num_prefix_tokens: int | None = None
    index: int | str | None = None

    def __post_init__(self) -> None:
        one_of("io", self.io, ("output", "input"))
        get_readout(self.readout)
        if self.num_prefix_tokens is None and self.readout in PREFIX_READOUTS:
            raise ValueError(
                f"{self.side}: readout '{self.readout}' needs num_prefix_tokens, the number of class and "
                "distillation tokens in front of the patch tokens (0 if none)"
            )

    @classmethod
    def from_config(cls, side: str, config: Mapping[str, Any]) -> "Feature":
        """The feature that a YAML mapping describes.

        Raises:
            TypeError: a key is unknown (the nearest is named), or ``module`` is missing.
        """
        known = [f.name for f in fields(cls) if f.name != "side"]
        if not isinstance(config, Mapping) or "module" not in config:
            raise TypeError(f"{side} must be a mapping with a 'module' and perhaps other keys, got {config!r}")
        for key in config:
            if key not in known:
                raise TypeError(f"{side} has no key '{key}'{nearest(key, known)}")
        return cls(side, **config)

    def read(self, io_dict: IODict) -> Tensor:
        """The feature, as its readout puts it.

        Raises:
            NotHookedError: nothing was hooked there; the message names what was.
            BadValue: the readout does not fit the layer.
        """
        hooked = {path: list(io) for path, io in io_dict.items() if io}
        if self.io not in hooked.get(self.module, ()):
            raise NotHookedError(self.side, self.module, self.io, hooked)
        whole = io_dict[self.module][self.io]
        if isinstance(whole, ReadOut):
            return whole[self]
        try:
            value = pick(whole, self.index, self._where)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            return get_readout(self.readout)(value, self.num_prefix_tokens or 0)
        except ValueError as error:
            raise BadValue(f"{self._where}: {error}", self.readout) from None

    @property
    def _where(self) -> str:
        return f"{self.io} of module '{self.module}' of the {self.side}"


class FeaturePair(nn.Module):
    """A loss wrapper: calls ``criterion(student, teacher)`` with one feature of each.

    .. code-block:: yaml

        criterion: {key: 'VkDLoss', kwargs: {normalization: 'layer_norm', distance: 'smooth_l1'}}
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs:
            student: {module: 'features.tokens'}
            teacher: {module: 'final_conv', readout: 'spatial_mean'}
        weight: 1.0

    Images of different sizes are padded to one batch, and padding is compared like the rest unless a mask says where it
    is; of a :class:`~vkd_plugin.models.vidt.detector.ViDT`::

        student: {module: 'features.patch0'}
        teacher: {module: 'patch_tokens.0', readout: 'every_location'}
        mask: {module: 'model.patch_masks.0'}

    Args:
        criterion: a loss of two tensors.
        student: ``{module, io: 'output', readout: 'identity', num_prefix_tokens, index}``, as in
            :class:`Feature`.
        teacher: likewise.
        mask: a boolean map of the student, likewise, True in the rows that are left out of both features
            (:func:`unmasked`).

    Raises:
        TypeError: a key of ``student``, ``teacher`` or ``mask`` is unknown or missing.
        ValueError: an unknown ``io`` or ``readout``.
    """

    def __init__(
        self,
        criterion: nn.Module,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        mask: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.student = Feature.from_config("student", student)
        self.teacher = Feature.from_config("teacher", teacher)
        self.mask = None if mask is None else Feature.from_config("student", mask)

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, targets: object = None) -> Tensor:
        """The criterion's value; ``targets`` are not read."""
        student, teacher = self.student.read(student_io_dict), self.teacher.read(teacher_io_dict)
        if self.mask is not None:
            mask = self.mask.read(student_io_dict)
            student, teacher = unmasked(student, mask), unmasked(teacher, mask)
        return self.criterion(student, teacher)

    def extra_repr(self) -> str:
        lines = [f"{f.side}: {f.readout} of {f.io} of '{f.module}'" for f in (self.student, self.teacher)]
        return "\n".join([*lines, f"without '{self.mask.module}'"] if self.mask is not None else lines)


def unmasked(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows for which the mask is False.

    Args:
        rows: (N, C).
        mask: bool, of N elements in any shape, which are those of the rows in row-major order: (B, H, W) for the rows
            that ``every_location`` makes of (B, C, H, W).

    Returns:
        (K, C), in the same order. A device is waited for, to learn K.

    Raises:
        ConfigError: the mask is not boolean, or has another number of elements.
    """
    if mask.dtype != torch.bool:
        raise ConfigError(f"the mask should be of bool, True where a row is left out, got {mask.dtype}")
    if mask.numel() != len(rows):
        raise ConfigError(f"the mask {tuple(mask.shape)} is not one for features {tuple(rows.shape)}")
    return selected(rows, ~mask.flatten())


def selected(rows: Tensor, which: Tensor) -> Tensor:
    """The rows (K, C) of (N, C) for which a boolean vector (N,) is True."""
    return rows[which]
