"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928): where the teacher looks; no projector."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..numerics import at_least_float32, without_autocast


class AttentionTransferLoss(nn.Module):
    r"""The mean squared difference of attention maps, each scaled to length 1.

    .. math:: L = \frac{1}{B L} \sum_b \lVert \hat a^s_b - \mathrm{sg}(\hat a^t_b) \rVert_2^2, \quad
        \hat a = a / \lVert a \rVert_2

    with a the L = H W values of one map. So its authors' code computes it, and torchdistill's ``ATLoss`` with
    ``mode: 'code'``; the paper's formula (its equation 2) has the norm in place of the mean square. Those take feature
    maps of one size. Here the readouts make the maps, of tokens as well, and where one grid is finer than the other, it
    is averaged onto the coarser one (adaptive pooling): a ViT can learn from a CNN.

    .. code-block:: yaml

        criterion: {key: 'AttentionTransferLoss', kwargs: {}}
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs:
            student: {module: 'blocks', readout: 'token_attention_map', num_prefix_tokens: 1}
            teacher: {module: 'final_conv', readout: 'attention_map'}
        weight: 1000.0
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar in float32, or in float64 if a map is.

        Args:
            student: (B, H, W), not negative.
            teacher: (B, H', W'), not negative; gets no gradient.

        Raises:
            ConfigError: the shapes do not fit.
        """
        if student.dim() != 3 or teacher.dim() != 3 or len(student) != len(teacher):
            raise ConfigError(
                "AttentionTransferLoss reads two attention maps (B, H, W) of as many images, got student "
                f"{tuple(student.shape)}, teacher {tuple(teacher.shape)}: read them out with 'attention_map' or "
                "'token_attention_map'"
            )
        grid = (min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2]))
        with without_autocast(student):
            return F.mse_loss(_unit(student, grid), _unit(teacher.detach(), grid))


def _unit(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W) to (B, L): averaged onto a grid of L locations, and scaled to length 1."""
    return F.normalize(F.adaptive_avg_pool2d(at_least_float32(maps), grid).flatten(1))
