"""Sine encodings of where in its image a patch lies."""

import math

import torch
from torch import Tensor


def sine_positions(mask: Tensor, channels: int) -> Tensor:
    """Sines and cosines of y, then of x, each counted from the image's edge and scaled to (0, 2 pi].

    Frequencies fall from 1 to 1 / 10000 in ``channels / 4`` steps. DETR's encoding (arXiv 2005.12872), as ViDT adds it
    to the patches in cross-attention.

    Args:
        mask: (B, H, W), bool, True on padding.
        channels: a multiple of 4.

    Returns:
        (B, H, W, channels) in float32.
    """
    y, x = ((~mask).cumsum(axis, dtype=torch.float32) for axis in (1, 2))
    y, x = (y / (y[:, -1:] + 1e-6) * (2 * math.pi), x / (x[:, :, -1:] + 1e-6) * (2 * math.pi))
    half = channels // 2
    step = torch.arange(half, dtype=torch.float32, device=mask.device)
    scale = 10000 ** (2 * (step // 2) / half)
    return torch.cat([_sine_and_cosine(place[..., None] / scale) for place in (y, x)], dim=-1)


def _sine_and_cosine(angle: Tensor) -> Tensor:
    """Sine of every even channel, cosine of every odd one."""
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
