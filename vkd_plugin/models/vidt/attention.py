"""The reconfigured attention module of ViDT (Song et al., arXiv 2110.03921, section 3).

Swin's window attention, of whose parameters detection tokens make use as well. Patches attend to the patches of
their window, and to no detection token; detection tokens to each other and, where a memory is given, to every patch.

Legend: B images, H x W patches, D detection tokens, C channels, M heads, K = C / M channels of a head, S x S patches
in a window, N windows in an image.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import get_relative_position_index, window_partition, window_reverse
from torch import Tensor, nn

MASKED = -100.0
"""Added to the logits of pairs that are not to attend to each other, as in Swin; where all are masked, none is."""


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """What keeps patches apart that a cyclic shift brought into one window: (N, S * S, S * S), 0 or :data:`MASKED`.

    Args:
        height, width: in patches, multiples of ``window``.
        window: S.
        shift: in patches, to the left and upwards.
        device: where it is to be.
    """
    rows, columns = (torch.zeros(length, dtype=torch.int64, device=device) for length in (height, width))
    for place in (rows, columns):
        place[-window:] = 1  # the last window holds what was there before,
        place[-shift:] = 2  # and what came in from the other side
    region = (3 * rows[:, None] + columns)[None, :, :, None]
    region = window_partition(region, (window, window)).view(-1, window * window)
    return torch.where(region[:, None] == region[:, :, None], 0.0, MASKED)


class ReconfiguredAttention(nn.Module):
    """Attention of patches within windows, and of detection tokens; see the module.

    Args:
        dim: C.
        window: S.
        num_heads: M.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.window = window
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", get_relative_position_index(window, window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        patches: Tensor,
        det: Tensor,
        shifted: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both, each in the shape that it came in.

        Args:
            patches: (B, H, W, C), H and W multiples of S.
            det: (B, D, C).
            shifted: of :func:`shift_mask`, if the patches are shifted.
            memory: patches (B, any number, C) that the detection tokens attend to besides; None for none.
            memory_mask: (B, 1, 1, that number + D), added to the logits of memory and detection tokens.
        """
        return self._among_patches(patches, shifted), self._of_det(det, memory, memory_mask)

    def _among_patches(self, patches: Tensor, shifted: Tensor | None) -> Tensor:
        size = (self.window, self.window)
        length = self.window**2
        windows = window_partition(patches, size).flatten(1, 2)
        q, k, v = self._heads(self.qkv(windows))
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1)  # (M, S * S, S * S)
        if shifted is not None:
            bias = (bias + shifted[:, None]).flatten(0, 1)  # (N * M, S * S, S * S)
        # All windows of an image stand where heads do, so that its mask need not be repeated for every image.
        shape = (-1, len(bias), length, q.shape[-1])
        attended = F.scaled_dot_product_attention(
            q.reshape(shape), k.reshape(shape), v.reshape(shape), attn_mask=bias[None].to(q.dtype)
        )
        attended = attended.reshape(q.shape).transpose(1, 2).reshape(windows.shape)
        return self.proj(window_reverse(attended, size, *patches.shape[1:3]))

    def _of_det(self, det: Tensor, memory: Tensor | None, memory_mask: Tensor | None) -> Tensor:
        q, k, v = self._heads(self.qkv(det))
        if memory is not None:
            dim = self.qkv.in_features  # no queries of the memory
            keys, values = self._heads(F.linear(memory, self.qkv.weight[dim:], self.qkv.bias[dim:]))
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        mask = None if memory_mask is None else memory_mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, n * C) to (n, batch, M, length, K)."""
        x = x.unflatten(-1, (-1, self.num_heads, self.qkv.in_features // self.num_heads))
        return x.permute(2, 0, 3, 1, 4)
