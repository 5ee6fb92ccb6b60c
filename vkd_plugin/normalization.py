"""Task-specific normalisation of features (Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213).

An orthogonal projector keeps the similarities between the student's features, so what the student learns is
decided by how the teacher's features are scaled. The paper prefers statistics of each sample
(`layer_norm`) for classification, of each channel (`standardize`) for its detectors, and whitened
channels (`whiten`) for generative tasks.

Legend: N rows (samples, tokens or locations), C channels; rows of all ranks together where statistics over
rows are synchronised. Variances and covariances over N are unbiased, that is divided by N - 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import number, one_of
from .distributed import all_reduce_sum, gather_rows, is_distributed, row_counts
from .numerics import at_least_float32, without_autocast

DEFAULT_EPS: dict[str, float] = {
    "none": 0.0,
    "l2": 1e-12,
    "layer_norm": 1e-5,
    "standardize": 1e-12,
    "whiten": 0.0,
}


def normalize(x: Tensor, method: str, eps: float | None = None, *, synchronize: bool = True) -> Tensor:
    """Normalise the rows or the channels of ``x``.

    ======================  ==========================================================  ================
    method                  row x_i becomes                                             default ``eps``
    ======================  ==========================================================  ================
    ``none``                x_i                                                         not used
    ``l2``                  x_i / max(||x_i||, eps)                                     1e-12
    ``layer_norm``          (x_i - mean(x_i)) / sqrt(var(x_i) + eps), over C, biased    1e-5
    ``standardize``         see :func:`standardize`                                     1e-12
    ``whiten``              see :func:`whiten`                                          0
    ======================  ==========================================================  ================

    Args:
        x: features (N, C), real.
        method: one of the names above.
        eps: its meaning depends on the method; None for the default.
        synchronize: take the statistics of ``standardize`` and ``whiten`` over the rows of all ranks when
            torch.distributed is initialised (every rank has to call), with gradients to match; ranks may hold
            different numbers of rows. The other methods look at one row at a time.

    Returns:
        (N, C) in float32, or float64 if ``x`` is; computed with autocast off.

    Raises:
        ValueError: unknown method (the nearest is named), ``eps`` out of range, or ``x`` not (N, C) and real.
    """
    one_of("normalization", method, DEFAULT_EPS)
    eps = _check_eps(method, eps)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"normalization '{method}' reads real features (N, C), got {x.dtype} of shape {tuple(x.shape)}: "
            f"choose a readout that makes rows of them"
        )
    with without_autocast(x):
        x = at_least_float32(x)
        if method == "l2":
            return F.normalize(x, dim=1, eps=eps)
        if method == "layer_norm":
            return F.layer_norm(x, x.shape[1:], eps=eps)
        if method == "standardize":
            return standardize(x, eps, synchronize=synchronize)
        if method == "whiten":
            return whiten(x, eps, synchronize=synchronize)
        return x


class Normalization(nn.Module):
    """:func:`normalize` as a module, its arguments checked when it is built.

    It has no running statistics and does the same in training and evaluation.
    """

    def __init__(self, method: str, eps: float | None = None, synchronize: bool = True) -> None:
        super().__init__()
        self.method = one_of("normalization", method, DEFAULT_EPS)
        self.eps = _check_eps(method, eps)
        self.synchronize = synchronize

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.method, self.eps, synchronize=self.synchronize)

    def extra_repr(self) -> str:
        return f"'{self.method}', eps={self.eps:g}, synchronize={self.synchronize}"


def standardize(x: Tensor, eps: float = DEFAULT_EPS["standardize"], *, synchronize: bool = True) -> Tensor:
    """Zero mean and unit variance of each channel: (x - mean) / sqrt(var + eps), over N.

    The variance is unbiased, as in the paper's detection code, which has no epsilon: there a constant channel
    is NaN. Here it is 0, and so is a single row. The default epsilon is a floor of 1e-6 on the standard
    deviation: low enough not to shrink the faint channels of a ReLU network.

    Args:
        x: features (N, C), float32 or float64.
        eps: added to the variance.
        synchronize: as in :func:`normalize`.

    Returns:
        (N, C), in the type of ``x``.
    """
    centred, variance, _ = _centre(x, synchronize and is_distributed())
    return centred * torch.rsqrt(variance + eps)


def _centre(x: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` less its mean (N, C), the unbiased variance (C,) and the mean (C,), of all ranks if ``shared``.

    The mean has no gradient and is right up to rounding only.
    """
    with torch.no_grad():
        sums = torch.cat([x.new_full((1,), x.shape[0]), x.sum(dim=0)])
        if shared:
            sums = all_reduce_sum(sums)
        count = sums[0].clamp_min(1)
        shift = sums[1:] / count
    # What is left of the mean after a first shift is tiny, so that E[r^2] - E[r]^2 does not cancel, however
    # far from 0 a channel lies, and a constant channel is 0 and not amplified rounding. The result does not
    # depend on the shift, so it needs no gradient, and only one sum over ranks is differentiated.
    rest = x - shift
    sums = torch.stack([rest.sum(dim=0), rest.square().sum(dim=0)])
    if shared:
        sums = all_reduce_sum(sums)
    mean = sums[0] / count
    variance = (sums[1] - count * mean.square()) / (count - 1).clamp_min(1)
    return rest - mean, variance.clamp_min(0), shift


def whiten(x: Tensor, eps: float = DEFAULT_EPS["whiten"], *, synchronize: bool = True) -> Tensor:
    """Zero mean and identity covariance over N: Y = Z R^(-1/2), with Z the standardised features.

    R = (1 - eps) Z'Z / (N - 1) + eps I is the correlation matrix of the channels, shrunk by ``eps``; with the
    default 0 the covariance of Y is the identity, for channels of any scale and standardised features of
    condition number up to 1e6. What float32 does not resolve (a constant channel, a copy, the rounding of a
    sum of others) is left out or damped, and not made as large as the rest.

    With N <= C the rank is N - 1 and no identity can be reached: Y / sqrt(N - 1) then has N - 1 singular
    values 1 (it is the partial isometry nearest to Z), and all rows are *equally far from each other*, so
    that nothing is left of the teacher's similarities. Give it more rows (the readouts `every_token`,
    `every_location`) or some shrinkage, such as ``eps: 0.1``. Shrinkage also bounds the gradient where
    features that need one (a student's) are nearly dependent: without it, a direction of relative size s
    amplifies gradients by 1 / s.

    Which whitening: any Y Q with Q orthogonal is white too. The author points to the Cholesky form
    (github.com/htdt/self-supervised: centre, shrink, multiply by the inverse Cholesky factor). Here it is the
    symmetric root of the correlation matrix (ZCA-cor; Kessy, Lewin, Strimmer, arXiv 1512.00809), because

    - of all whitened features these are the most correlated with the original ones, channel by channel, so
      an image's target wobbles least from batch to batch;
    - it does not depend on the order of the channels. The Cholesky form gives channel k what the channels
      before it leave over; with N <= C all but the first N - 1 channels would be empty;
    - the rotation between the two is one that the orthogonal projector can learn.

    The root is found by multiplications and inverses only (:func:`inverse_sqrt`): no eigenvectors, so
    repeated eigenvalues do no harm, and no wait for the device. Computed in float64 (float32 on MPS).
    Synchronised over ranks, one wait per call remains, to learn how many rows the others hold.

    Args:
        x: features (N, C), float32 or float64.
        eps: shrinkage in [0, 1) towards uncorrelated channels.
        synchronize: as in :func:`normalize`.

    Returns:
        (N, C), in the type of ``x``.
    """
    shared = synchronize and is_distributed()
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    # No epsilon here: the covariance is to be the identity whatever the scale of a channel. A channel is
    # constant if it varies by less than its values are resolved.
    centred, variance, mean = _centre(x.to(wide), shared)
    constant = variance <= (torch.finfo(wide).eps * mean).square()
    z = centred * torch.where(constant, 0, torch.rsqrt(torch.where(constant, 1, variance)))
    counts = row_counts(z) if shared else [z.shape[0]]
    count = max(sum(counts), 1)
    freedom = max(count - 1, 1)

    if count <= z.shape[1]:
        # (ZZ')^(-1/2) Z = Z (Z'Z)^(-1/2): the smaller root does, and only lacks the direction (1, ..., 1).
        # That one is absent from centred rows; filling it changes nothing but the condition of the root.
        rows, own = gather_rows(z, counts) if shared else (z, slice(None))
        root = inverse_sqrt(_shrink(rows @ rows.T / freedom, eps) + 1 / count)
        return (root[own] @ rows).to(x.dtype)

    def covariance(y: Tensor) -> Tensor:
        gram = y.T @ y
        return (all_reduce_sum(gram) if shared else gram) / freedom

    y = z @ inverse_sqrt(_shrink(covariance(z), eps))
    if eps == 0:
        # Forming R squares the condition number. A Newton-Schulz step from the whitened features themselves
        # restores what that loses.
        y = 1.5 * y - 0.5 * y @ covariance(y)
    return y.to(x.dtype)


def _shrink(gram: Tensor, eps: float) -> Tensor:
    return (1 - eps) * gram + eps * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def _halley_weights(smallest: float) -> list[tuple[float, float, float]]:
    """(a, b, c) of each step x -> x (a + b x^2) / (1 + c x^2) that takes [smallest, 1] to 1."""
    weights = []
    low = smallest
    while 1 - low > 1e-15:
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        weights.append((a, b, c))
        low = min(low * (a + b * low**2) / (1 + c * low**2), 1.0)
    return weights


# Singular values below 1e-6 of the largest are not resolved. Float32 features hold little more, and the first
# step multiplies rounding by the inverse square of that share, in gradients of dependent channels above all.
_HALLEY_WEIGHTS = {torch.float64: _halley_weights(1e-6), torch.float32: _halley_weights(1e-3)}


def inverse_sqrt(a: Tensor) -> Tensor:
    """The inverse square root of a symmetric positive semi-definite matrix (n, n), float64 or float32.

    The dynamically weighted Halley iteration for the polar factor (Nakatsukasa, Bai, Gygi, SIAM J. Matrix
    Anal. Appl. 31, 2010), which takes all singular values that count to 1 in five steps, written for the Gram
    matrix ``a`` of what it acts on, and differentiated as it stands. Eigenvalues below 1e-12 of the largest
    (1e-6 in float32) are not inverted in full: what they weigh stays bounded.
    """
    eye = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    # Any bound on the largest eigenvalue does. The root does not depend on it, so it needs no gradient.
    bound = torch.linalg.matrix_norm(a.detach()).clamp_min(torch.finfo(a.dtype).tiny)
    root, gram = eye * bound.rsqrt(), a / bound
    for p, q, c in _HALLEY_WEIGHTS[a.dtype]:
        # A step multiplies by u + v inverse. inv_ex does not wait for the device: NaN in, NaN out.
        inverse, _ = torch.linalg.inv_ex(eye + c * gram)
        inverse = (inverse + inverse.T) / 2
        u, v = q / c, p - q / c
        root = u * root + v * root @ inverse
        # gram (u + v inverse)^2 with c gram inverse = 1 - inverse put in: v is as large as 1e4, v^2 / c is 4.
        gram = u * u * gram + (v / c) * (2 * u * eye + v * inverse) @ (eye - inverse)
    return root


def _check_eps(method: str, eps: float | None) -> float:
    below = 1.0 if method == "whiten" else math.inf
    return DEFAULT_EPS[method] if eps is None else number("eps", eps, below=below)
