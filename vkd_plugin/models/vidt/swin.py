"""Swin transformers (Liu et al., arXiv 2103.14030) through which detection tokens pass beside the patches: ViDT's body.

Names of the parameters are the release's. Some of these nothing reads: ``expansion`` and ``norm2`` of each merging,
``norm1`` to ``norm3`` of the body. They are here so that its weights fit, and frozen, so that DistributedDataParallel
waits for no gradient of theirs.

Legend: B images, H x W patches at a stage, D detection tokens, C channels of a stage, P channels of positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from .attention import MASKED, ReconfiguredAttention, shift_mask
from .padding import resize_mask
from .positions import sine_positions

_PATCH = 4


class Memory(NamedTuple):
    """What detection tokens need to attend to patches.

    Args:
        positions: (B, H * W, C), added to the patches.
        mask: (B, 1, 1, H * W + D), added to the logits of patches and detection tokens.
    """

    positions: Tensor
    mask: Tensor


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and with a way around.

    Args:
        dim: C.
        num_heads: of the attention.
        window: its windows' height and width, in patches.
        shift: by which they are shifted.
        pos_dim: P.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, pos_dim: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ReconfiguredAttention(dim, window, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.det_pos_linear = nn.Linear(pos_dim, dim)

    def forward(
        self, tokens: Tensor, size: tuple[int, int], det_pos: Tensor, shifted: Tensor, memory: Memory | None
    ) -> Tensor:
        """Tokens in, tokens out.

        Args:
            tokens: (B, H * W + D, C), the patches first.
            size: (H, W).
            det_pos: (1, D, P).
            shifted: of :func:`shift_mask`, for blocks that shift.
            memory: None where detection tokens attend to each other alone.
        """
        (height, width), length = size, size[0] * size[1]
        normed = self.norm1(tokens)
        patches, det = normed[:, :length], normed[:, length:] + self.det_pos_linear(det_pos)
        windowed = patches.unflatten(1, size)
        windowed = F.pad(windowed, (0, 0, 0, -width % self.window, 0, -height % self.window))
        if self.shift:
            windowed = windowed.roll((-self.shift, -self.shift), dims=(1, 2))
        windowed, det = self.attn(
            windowed,
            det,
            shifted if self.shift else None,
            None if memory is None else patches + memory.positions,
            None if memory is None else memory.mask,
        )
        if self.shift:
            windowed = windowed.roll((self.shift, self.shift), dims=(1, 2))
        attended = torch.cat([windowed[:, :height, :width].flatten(1, 2), det], dim=1)
        tokens = tokens + self.drop_path(attended)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchMerging(nn.Module):
    """2 x 2 patches become one; a detection token, four times beside itself, takes the same way.

    Args:
        dim: C.
        out_dim: channels afterwards.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)
        self.expansion = nn.Linear(dim, out_dim, bias=False).requires_grad_(False)
        self.norm2 = nn.LayerNorm(dim).requires_grad_(False)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H * W + D, C) to (B, ceil(H / 2) * ceil(W / 2) + D, out_dim); ``size`` is (H, W)."""
        (height, width), length = size, size[0] * size[1]
        patches, det = tokens[:, :length].unflatten(1, size), tokens[:, length:]
        patches = F.pad(patches, (0, 0, 0, width % 2, 0, height % 2))
        patches = patches.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (B, H / 2, 2, W / 2, 2, C)
        patches = patches.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(torch.cat([patches, det.repeat(1, 1, 4)], dim=1)))


class Stage(nn.Module):
    """Blocks, every second one with shifted windows, and the merging that ends in the next stage's channels.

    Args:
        dim: C.
        num_heads, window, pos_dim: as in :class:`Block`.
        out_dim: channels after the merging.
        drop_path: rates of stochastic depth, one for each block.
        cross: whether detection tokens attend to patches here.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, pos_dim: int, out_dim: int, drop_path: list[float], cross: bool
    ) -> None:
        super().__init__()
        self.dim = dim
        self.window = window
        self.cross = cross
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window, window // 2 if number % 2 else 0, pos_dim, rate)
            for number, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim, out_dim)

    def forward(self, tokens: Tensor, size: tuple[int, int], det_pos: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens before and after the merging.

        Args:
            tokens: (B, H * W + D, C).
            size: (H, W).
            det_pos: (1, D, P).
            mask: (B, any height, any width), bool, True on padding.
        """
        padded = [side + -side % self.window for side in size]
        shifted = shift_mask(padded[0], padded[1], self.window, self.window // 2, tokens.device)
        memory = self._memory(tokens, size, mask) if self.cross else None
        for block in self.blocks:
            tokens = block(tokens, size, det_pos, shifted, memory)
        return tokens, self.downsample(tokens, size)

    def _memory(self, tokens: Tensor, size: tuple[int, int], mask: Tensor) -> Memory:
        mask = resize_mask(mask, size)
        det = tokens.shape[1] - size[0] * size[1]
        logits = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, MASKED)
        # Positions are float32 whatever the tokens are, and are rounded once.
        positions = sine_positions(mask, self.dim).flatten(1, 2).to(tokens.dtype)
        return Memory(positions, F.pad(logits.flatten(1), (0, det))[:, None, None])


class SwinWithDetTokens(nn.Module):
    """ViDT's body: four stages; detection tokens attend to patches in the last.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: of the attention, in patches.
        drop_path_rate: stochastic depth of the last block; it grows evenly from 0 in the first.
        num_det_tokens: D.
        pos_dim: P, and the channels of the coarsest patches.

    Attributes:
        out_dims: channels of the four patch maps that :meth:`forward` puts out.
        det_dim: those of its detection tokens.
    """

    def __init__(
        self,
        embed_dim: int = 48,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        drop_path_rate: float = 0.0,
        num_det_tokens: int = 100,
        pos_dim: int = 256,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.out_dims = [*dims[1:], pos_dim]
        self.det_dim = dims[-1]
        self.det_token = nn.Parameter(torch.empty(1, num_det_tokens, embed_dim))
        self.det_pos_embed = nn.Parameter(torch.empty(1, num_det_tokens, pos_dim))
        for parameter in (self.det_token, self.det_pos_embed):
            trunc_normal_(parameter, std=0.02)
        self.patch_embed = PatchEmbed(
            None, _PATCH, embed_dim=embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True
        )
        rates = iter(drop_path_rate * number / max(sum(depths) - 1, 1) for number in range(sum(depths)))
        self.layers = nn.ModuleList(
            Stage(dim, heads, window, pos_dim, out_dim, [next(rates) for _ in range(depth)], cross=dim == dims[-1])
            for dim, heads, out_dim, depth in zip(dims, num_heads, self.out_dims, depths, strict=True)
        )
        for number, dim in enumerate(dims[1:], 1):
            self.add_module(f"norm{number}", nn.LayerNorm(dim).requires_grad_(False))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that weight decay leaves alone."""
        return {"det_token", "det_pos_embed"}

    def forward(self, images: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Patch maps, detection tokens and the positions of these.

        Args:
            images: (B, 3, height, width).
            mask: (B, height, width), bool, True on padding.

        Returns:
            Four maps (B, out_dims[i], H_i, W_i), at an eighth of the images' resolution, a 16th, a 32nd and a 64th
            (rounded up at each halving); the tokens (B, D, det_dim); their positions (1, D, P).
        """
        patches = self.patch_embed(images)
        size = (patches.shape[1], patches.shape[2])
        # The release makes the mask this small first, then whatever size the last stage has: not always the same.
        coarsest = 2 ** (len(self.layers) - 1)
        mask = resize_mask(mask, (max(size[0] // coarsest, 1), max(size[1] // coarsest, 1)))
        det = self.det_token.expand(len(patches), -1, -1)
        merged = torch.cat([patches.flatten(1, 2), det.to(patches.dtype)], dim=1)
        maps = []
        for number, stage in enumerate(self.layers):
            tokens, merged = stage(merged, size, self.det_pos_embed, mask)
            if number > 0:
                maps.append(_as_map(tokens, size))
            det = tokens[:, size[0] * size[1] :]
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        return [*maps, _as_map(merged, size)], det, self.det_pos_embed


def _as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The patches among tokens (B, H * W + D, C), as a map (B, C, H, W)."""
    return tokens[:, : size[0] * size[1]].unflatten(1, size).permute(0, 3, 1, 2)
