"""Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv 2010.04159, section 4.1), in PyTorch.

Every query looks at a few places of every feature map, near a box, and takes their weighted sum.

Legend: B images, Q queries, L feature maps of H_l x W_l locations, S locations in all of them together, M heads,
K channels of a head, P places a head looks at in each map, C = M * K.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...arguments import one_of
from ...numerics import at_least_float32
from .precision import full_precision

Kernel = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]
"""A function with the arguments and the result of :func:`deformable_attention`."""


def deformable_attention(value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples; what lies outside of a map is 0.

    Args:
        value: (B, S, M, K), the maps one after the other, each row by row.
        sizes: (H_l, W_l) of each map.
        locations: (B, Q, M, L, P, 2), x and y in fractions of a map: (0, 0) is its top left corner, (1, 1) its bottom
            right one, and locations' centres lie at halves.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * K). All arguments are of one dtype, which the result has too.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2)
    maps = value.split([height * width for height, width in sizes], dim=1)
    sampled = []
    for level, (image, (height, width)) in enumerate(zip(maps, sizes, strict=True)):
        image = image.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        sampled.append(F.grid_sample(image, grids[:, :, level], align_corners=False))  # (B * M, K, Q, P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.cat(sampled, dim=-1) * weights).sum(-1)
    return summed.view(batch, heads * channels, queries).transpose(1, 2)


KERNELS: dict[str, Kernel] = {"grid_sample": deformable_attention}
"""Implementations by name. A faster one is put in here, and chosen by a model's ``attention_kernel``."""


class DeformableAttention(nn.Module):
    """Queries that look at feature maps near their boxes.

    Places, weights and sums are float32 or wider, also under autocast.

    Args:
        dim: C.
        num_levels: L.
        num_heads: M.
        num_points: P.
        kernel: a name in :data:`KERNELS`.

    Raises:
        ValueError: no such kernel; the nearest is named.
    """

    def __init__(
        self, dim: int, num_levels: int = 4, num_heads: int = 8, num_points: int = 4, kernel: str = "grid_sample"
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.kernel = one_of("attention kernel", kernel, KERNELS)
        places = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, places * 2)
        self.attention_weights = nn.Linear(dim, places)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m looks into direction 2 pi m / M, its point p at p + 1 steps, all points alike."""
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self, query: Tensor, boxes: Tensor, memory: Tensor, sizes: Sequence[tuple[int, int]], padding: Tensor
    ) -> Tensor:
        """(B, Q, C).

        Args:
            query: (B, Q, C).
            boxes: (B, Q, L, 4), centre, width and height in fractions of each map; an offset of P is half a box.
            memory: (B, S, C), the maps one after the other.
            sizes: (H_l, W_l) of each.
            padding: (B, S), bool, True where there is no image: such locations count as 0.
        """
        value = self.value_proj(memory).masked_fill(padding[..., None], 0)
        value = at_least_float32(value).unflatten(-1, (self.num_heads, -1))
        offsets = full_precision(self.sampling_offsets, query)
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        weights = full_precision(self.attention_weights, query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        boxes = boxes[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / self.num_points * boxes[..., 2:] * 0.5
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        attended = KERNELS[self.kernel](value, sizes, locations.to(value.dtype), weights.to(value.dtype))
        return self.output_proj(attended.to(memory.dtype))
