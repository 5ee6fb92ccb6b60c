"""Tensors without contents: shapes, dtypes and gradients are real, and no memory or arithmetic is spent."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..losses import feature_pair
from ..models.vidt import criterion, targets
from ..models.vidt.matcher import HungarianMatcher
from ..models.vidt.targets import Objects

NEEDS_CONTENTS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
    NotImplementedError,
)
"""What is raised where a result depends on what is in a tensor; such a model is tried with contents."""


class Contents:
    """Whether tensors have contents.

    Args:
        real: they have.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self._mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context within which tensors are made so."""
        if self._mode is None:
            yield
            return
        with ExitStack() as stack:
            for owner, name, instead in _INSTEAD:
                stack.enter_context(patch.object(owner, name, instead))
            stack.enter_context(self._mode)
            yield

    def empty(self, model: nn.Module) -> None:
        """Takes the contents out of the parameters and buffers of ``model``, if they are not to be there."""
        if self._mode is None:
            return
        done: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in done:  # tied weights stay one
                        fake = self._mode.from_tensor(parameter.detach())
                        done[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                    module._parameters[name] = done[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._mode.from_tensor(buffer)


def _apply(self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, on which ``to`` is built; torch's puts new contents into a parameter, and fails."""
    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is not None and (changed := function(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(changed.detach(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _any_pairs(self: HungarianMatcher, logits: Tensor, boxes: Tensor, objects: Sequence[Objects]) -> list[Tensor]:
    """Pairs of the right shapes: which prediction answers for which object depends on what is in the tensors."""
    counts = [min(logits.shape[2], len(own.labels)) for own in objects]
    return [torch.arange(count).expand(logits.shape[0], 2, count) for count in counts]


def _any_losses(boxes: Tensor, wanted: Tensor, **_: object) -> Tensor:
    """(T,) of (T, 4), in place of torchvision's generalised IoU, which selects the boxes that overlap."""
    return (boxes - wanted).sum(dim=1)


def _all_rows(rows: Tensor, which: Tensor) -> Tensor:
    """In place of those that a mask leaves, whose number is not known."""
    return rows


def _nothing(*args: object) -> None:
    """In place of what looks whether contents are sound."""


_INSTEAD: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (nn.Module, "_apply", _apply),
    (HungarianMatcher, "forward", _any_pairs),
    (feature_pair, "selected", _all_rows),
    (criterion, "generalized_box_iou_loss", _any_losses),
    (targets, "_check_values", _nothing),
)
"""What reads contents, and what stands in for it where there are none: object, attribute, replacement."""


class SavedBytes:
    """Counts the bytes that a forward pass keeps for the backward pass, each storage once."""

    def __init__(self, *models: nn.Module) -> None:
        self._own = {
            tensor.untyped_storage()._cdata for model in models for tensor in (*model.parameters(), *model.buffers())
        }
        self._saved: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no storage's address is used again

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._saved.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts within it."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._saved[storage._cdata] = storage.nbytes()
                self._kept.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
