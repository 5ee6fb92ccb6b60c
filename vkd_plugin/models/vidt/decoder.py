"""ViDT's neck: Deformable DETR's decoder without its encoder (arXiv 2110.03921, section 4), refining boxes.

Legend: B images, Q queries (the detection tokens), C channels, L feature maps, S locations in all of them together.
Boxes are (centre x, centre y, width, height) in fractions of the image, without its padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deformable_attention import DeformableAttention
from .padding import valid_ratio
from .precision import full_precision


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), with numerator and denominator at least ``eps``; ``torch.logit`` clamps x instead."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refined(delta: Tensor, reference: Tensor) -> Tensor:
    """Boxes (..., 4), moved in the domain of the inverse sigmoid.

    Args:
        delta: (..., 4).
        reference: boxes (..., 4), or centres (..., 2), with which ``delta`` alone says the size.
    """
    return (delta + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()


class BoxHead(nn.Module):
    """(..., C) to (..., 4): three linear layers with ReLU between them, the last of which begins as a constant.

    Args:
        dim: C.
        size: of that constant's last two entries; the others are 0.
    """

    def __init__(self, dim: int, size: float) -> None:
        super().__init__()
        last = nn.Linear(dim, 4)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, size, size]))
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), last])

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the patches, and a perceptron, each normalised afterwards.

    Args:
        dim: C.
        num_heads: of both attentions.
        hidden_dim: of the perceptron.
        dropout: everywhere.
        num_levels, num_points, kernel: as in :class:`DeformableAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, dropout: float, num_levels: int, num_points: int, kernel: str
    ) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(dim, num_levels, num_heads, num_points, kernel)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        state: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        sizes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """States (B, Q, C) to states; ``position`` (B, Q, C), the rest as in :class:`DeformableAttention`."""
        placed = state + position
        attended, _ = self.self_attn(placed, placed, state, need_weights=False)
        state = self.norm2(state + self.dropout2(attended))
        attended = self.cross_attn(state + position, boxes, memory, sizes, padding)
        state = self.norm1(state + self.dropout1(attended))
        hidden = self.dropout3(self.linear1(state).relu())
        return self.norm3(state + self.dropout4(self.linear2(hidden)))


class Decoder(nn.Module):
    """Layers, each of which looks near the boxes that the one before has refined.

    Args:
        dim: C.
        num_layers: how many.
        kwargs: of :class:`DecoderLayer`.
    """

    def __init__(self, dim: int, num_layers: int, **kwargs: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, **kwargs) for _ in range(num_layers))
        # The first boxes are where they are looked for, a part sigmoid(-2) of the image wide and high.
        self.bbox_embed = nn.ModuleList(BoxHead(dim, -2.0 if number == 0 else 0.0) for number in range(num_layers + 1))

    def forward(
        self,
        state: Tensor,
        position: Tensor,
        centres: Tensor,
        memory: Tensor,
        sizes: Sequence[tuple[int, int]],
        padding: Tensor,
        valid_ratios: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States and boxes: of the body's detection tokens as they come, then after each layer.

        Args:
            state, position: (B, Q, C).
            centres: (B, Q, 2), where the first boxes are looked for.
            memory, sizes, padding: as in :class:`DeformableAttention`.
            valid_ratios: (B, L, 2), of :func:`valid_ratio`: from fractions of the image to those of its padded maps.
        """
        first, *heads = self.bbox_embed
        states = [state]
        boxes = [refined(full_precision(first, state), centres)]
        scale = valid_ratios.repeat(1, 1, 2)[:, None]
        for layer, head in zip(self.layers, heads, strict=True):
            reference = boxes[-1].detach()  # each box learns from its own prediction alone
            states.append(layer(states[-1], position, reference[:, :, None] * scale, memory, sizes, padding))
            boxes.append(refined(full_precision(head, states[-1]), reference))
        return states, boxes


class DeformableTransformer(nn.Module):
    """The decoder, and what it is given: maps in a row, masks, and where to look first.

    Args:
        dim: C.
        num_layers: of the decoder.
        num_levels: L.
        kwargs: of :class:`DecoderLayer`.
    """

    def __init__(self, dim: int, num_layers: int, num_levels: int, **kwargs: Any) -> None:
        super().__init__()
        # Nothing reads it: the release's weights have it, and a frozen parameter is waited for by no DDP.
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim), requires_grad=False)
        self.decoder = Decoder(dim, num_layers, num_levels=num_levels, **kwargs)
        self.reference_points = nn.Linear(dim, 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's uniform distribution for matrices, but for what deformable attention and boxes begin with."""
        nn.init.normal_(self.level_embed)
        for parameter in (*self.decoder.layers.parameters(), *self.reference_points.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(
        self, maps: Sequence[Tensor], masks: Sequence[Tensor], state: Tensor, position: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States (B, Q, C) and boxes (B, Q, 4), num_layers + 1 of each; see :class:`Decoder`.

        Args:
            maps: (B, C, H_l, W_l).
            masks: (B, H_l, W_l), bool, True on padding.
            state: (B, Q, C).
            position: (1, Q, C).
        """
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        ratios = torch.stack([valid_ratio(mask) for mask in masks], dim=1)
        position = position.expand(len(state), -1, -1)
        centres = full_precision(self.reference_points, position).sigmoid()
        return self.decoder(state, position, centres, memory, sizes, padding, ratios)
