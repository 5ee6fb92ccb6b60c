"""Layers whose output is a place in the image: half precision, with its 8 or 11 bits, would move it by pixels."""

from torch import Tensor, nn

from ...numerics import at_least_float32, without_autocast


def full_precision(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` with autocast off, in the precision of the module's weights.

    Returns:
        What it puts out, in float32, or in float64 if it is.
    """
    with without_autocast(x):
        return at_least_float32(module(x.to(next(module.parameters()).dtype)))
