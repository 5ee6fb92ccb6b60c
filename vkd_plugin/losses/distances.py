"""Distances between the student's and the teacher's features, both (N, C): plain tensors in, a scalar out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_l1(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Mean over all entries of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2 (the paper's code)."""
    return F.smooth_l1_loss(student, teacher, beta=beta)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all entries of d^2."""
    return F.mse_loss(student, teacher)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all entries of |d|."""
    return F.l1_loss(student, teacher)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean over rows of the cosine of the angle between student and teacher."""
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def log_sum(student: Tensor, teacher: Tensor, alpha: float = 4.0) -> Tensor:
    """log sum |d|^alpha over all entries (Miles, Mikolajczyk, AAAI 2024, arXiv 2303.11098).

    It grows with the number of rows, as torchdistill's ``SRDLoss`` does. Where that is -inf (no difference at
    all) this is the logarithm of the smallest normal number, with gradient 0.
    """
    total = (student - teacher).abs().pow(alpha).sum()
    return total.clamp_min(torch.finfo(total.dtype).tiny).log()


DISTANCES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (smooth_l1, mse, l1, cosine, log_sum)}
