"""Readouts: from what a layer puts out to the (N, C) rows, or the attention maps, that a projector or a loss works on.

A convolutional teacher puts out feature maps (B, C, H, W), a transformer student tokens (B, T, C) whose
first ``num_prefix_tokens`` are class and distillation tokens. A readout says which rows are compared.

Legend: B images, T tokens (prefix tokens included), H x W locations, C channels.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .arguments import one_of
from .numerics import at_least_float32


def _check(x: Tensor, dims: int, layout: str, name: str) -> None:
    if x.dim() != dims:
        raise ValueError(f"readout '{name}' reads {layout}, got a tensor of shape {tuple(x.shape)}")


def _patch_tokens(x: Tensor, num_prefix_tokens: int, name: str) -> Tensor:
    _check(x, 3, "tokens (B, T, C)", name)
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} should not be negative")
    if num_prefix_tokens >= x.shape[1]:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} leaves none of the {x.shape[1]} tokens")
    return x[:, num_prefix_tokens:]


def identity(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """What the layer puts out, unchanged."""
    return x


def mean_patch_tokens(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, T, C) to (B, C): the mean over the patch tokens, prefix tokens left out (the paper's student feature)."""
    return _patch_tokens(x, num_prefix_tokens, "mean_patch_tokens").mean(dim=1)


def class_token(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, T, C) to (B, C): the first token."""
    _check(x, 3, "tokens (B, T, C)", "class_token")
    return x[:, 0]


def distillation_token(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, T, C) to (B, C): the second token (DeiT's distillation token)."""
    _check(x, 3, "tokens (B, T, C)", "distillation_token")
    if x.shape[1] < 2:
        raise ValueError("readout 'distillation_token' reads the second token, got one token only")
    return x[:, 1]


def every_token(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, T, C) to (B * (T - num_prefix_tokens), C): every patch token is a row."""
    return _patch_tokens(x, num_prefix_tokens, "every_token").reshape(-1, x.shape[-1])


def spatial_mean(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, C, H, W) to (B, C): global average pooling (the paper's teacher feature)."""
    _check(x, 4, "a feature map (B, C, H, W)", "spatial_mean")
    return x.mean(dim=(2, 3))


def every_location(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, C, H, W) to (B * H * W, C): every location is a row, in row-major order."""
    _check(x, 4, "a feature map (B, C, H, W)", "every_location")
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def attention_map(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, C, H, W) to (B, H, W): the mean over channels of squares, in float32 or wider.

    How strongly each location is attended to (Zagoruyko, Komodakis, ICLR 2017, section 3.1: the sum of squares).
    """
    _check(x, 4, "a feature map (B, C, H, W)", "attention_map")
    return at_least_float32(x).square().mean(dim=1)


def token_attention_map(x: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """(B, T, C) to (B, n, n): :func:`attention_map` of the n * n patch tokens, in row-major order on a square.

    Behind a LayerNorm nearly all tokens have the same sum of squares: read the blocks' output, not the norm's.
    """
    patches = _patch_tokens(x, num_prefix_tokens, "token_attention_map")
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"readout 'token_attention_map' reads patch tokens that make a square, got {patches.shape[1]} "
            f"behind num_prefix_tokens={num_prefix_tokens}"
        )
    return at_least_float32(patches).square().mean(dim=2).unflatten(1, (side, side))


READOUTS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        identity, mean_patch_tokens, class_token, distillation_token, every_token, spatial_mean, every_location,
        attention_map, token_attention_map,
    )
}  # fmt: skip


# Those that leave prefix tokens out, and so have to be told how many there are.
PREFIX_READOUTS = ("mean_patch_tokens", "every_token", "token_attention_map")


def get_readout(name: str) -> Callable[..., Tensor]:
    """The readout called ``name``.

    Raises:
        ValueError: no such readout; the message names the nearest one.
    """
    return READOUTS[one_of("readout", name, READOUTS)]


def pick(value: Any, index: int | str | None, where: str) -> Tensor:
    """The tensor that a layer puts out, or the one at ``index`` of the tuple, list or mapping that it puts out.

    Args:
        value: what it puts out.
        index: see above; None for the tensor itself.
        where: names the layer in messages.

    Raises:
        ValueError: there is no such part, or it is not a tensor.
    """
    picked = value
    if index is not None:
        try:
            picked = value[index]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"no index {index!r} in the {where}, which is {_describe(value)}") from None
    if not isinstance(picked, Tensor):
        raise ValueError(f"the {where} is {_describe(picked)}, not a tensor: choose one with 'index'")
    return picked


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
