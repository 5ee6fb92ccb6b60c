"""Maps from an unconstrained matrix to one with orthonormal columns, a point of the Stiefel manifold.

VkD (Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213) projects the student's features with a matrix P that
keeps their pairwise similarities, P^T P = I, and trains a free matrix W from which P is computed at every
forward. Five such maps stand here; ``orthogonalize`` chooses by name.

Legend: W (n, k) with n >= k (a wide matrix is transposed first), E the first k columns of the identity, P the
(n, k) result, eps the rounding unit.

Cost. Only products touch the long side n: a Gram matrix W^T W, and W times a k x k matrix. What makes a map
that map (an exponential, an inverse, a Cholesky factor) is a *core* on k x k matrices, at most 2k x 2k. No n x n
matrix is formed.

Precision. A Gram matrix squares condition numbers, so everything is computed in float64 and rounded at the end,
whatever the dtype of W. Only where looking at the data is free, which is in eager mode on a CPU, float32 weights
that are seen to be harmless (the normal case in training) stay in float32, which halves the cost. On a GPU the
look would wait for the device, under torch.compile it would break the graph: there the algorithms are static.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .arguments import one_of

# Up to this bound of the generator's norm float32 is enough: its Gram matrix costs eps * norm^2 of orthonormality
# (and the bound is above the norm by half or more where it matters).
_FLOAT32_NORM = 8.0
# Up to this norm the exponential's series is summed without scaling; cancellation costs eps * exp(norm).
_UNSCALED_NORM = 4.0
# The largest norm is 2 to this power, since without a look at the data the number of squarings is fixed. A
# 3024 x 192 weight with entries of 1e2 has 7e3.
_MAX_SQUARINGS = 16
# Float32 is enough for a matrix whose columns (scaled to length 1) all keep this squared distance from the span
# of the others.
_FLOAT32_DISTANCE = 1 / 4
# The smallest pivot of W^T W after preconditioning is near 1 up to a condition number of about 1e7, then falls,
# and is 0 for a matrix without full rank.
_FULL_RANK_PIVOT = 1e-3
# Scaled Newton reaches the polar factor of a matrix of condition 1e8 in 8 steps; the ninth serves the gradient.
_NEWTON_STEPS = 9

# From S, G (None for square weights) and a bound of the generator's norm to C1, C2: see "Maps through a generator".
_Core = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


class UndefinedMapError(ValueError):
    """The weight has no image under the orthogonal map: it is not finite, too large, or not of full rank."""


def orthogonalize(weight: Tensor, orthogonal_map: str = "matrix_exp", *, base: Tensor | None = None) -> Tensor:
    """The matrix with orthonormal columns (rows, if wide) that ``weight`` stands for.

    ==============  ======================================================================================
    matrix_exp      exp(A) E, A = L E^T - E L^T, L = tril(W, -1): the paper's map
    cayley          (I + A/2) (I - A/2)^-1 E, same A
    householder     H_1 ... H_k E D, H_j the reflector along E_j + L_j, D the signs of W's diagonal (0 is +)
    cholesky_qr     the Q of W = Q R, R upper triangular with positive diagonal
    polar           W (W^T W)^(-1/2), the matrix with orthonormal columns nearest to W
    ==============  ======================================================================================

    The first three are those of ``torch.nn.utils.parametrizations.orthogonal(use_trivialization=False)``, for
    ``householder`` where the diagonal is +-1; they read the lower triangle of ``weight`` only. The diagonal gets
    no gradient. ``matrix_exp`` and ``cayley`` of a square weight are rotations (determinant 1).

    Args:
        weight: (n, k), real floating point.
        orthogonal_map: a name of ``ORTHOGONAL_MAPS``.
        base: for ``matrix_exp`` and ``cayley``: start from this matrix with orthonormal columns (rows), of the
            weight's shape, rather than from E: A = W base^T - base W^T, result exp(A) base. All of W counts then,
            and W = 0 gives ``base``.

    Returns:
        (n, k) with orthonormal columns if n >= k, orthonormal rows otherwise; float64 for float64, float32 for
        all others. Computed in float32 or wider, under autocast too.

    Raises:
        ValueError: not a real matrix; unknown map; ``base`` does not fit. On a CPU in eager mode also where the
            result is undefined: entries that are not finite, a generator with a norm above 2^16, or, for
            ``cholesky_qr`` and ``polar``, no full column rank (condition number above about 1e7; zero weights).
            Elsewhere, where a look at the values would cost a synchronisation, the whole result is NaN. (A device-side
            assertion would leave a process that cannot even read back what was wrong.)

    Sources: Edelman, Arias, Smith, SIAM J. Matrix Anal. Appl. 20 (1998), cor. 2.2 (the exponential from 2k x 2k
    matrices); Schreiber, Van Loan, SIAM J. Sci. Stat. Comput. 10 (1989) (compact WY form); Fukaya et al., SIAM J.
    Sci. Comput. 42 (2020) (shifted Cholesky QR); Higham, SIAM J. Sci. Stat. Comput. 7 (1986) (polar factor by
    scaled Newton).
    """
    one_of("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"expected a real floating-point matrix (n, k), got shape {tuple(weight.shape)} of {weight.dtype}"
        )
    if base is not None and orthogonal_map not in BASE_MAPS:
        raise ValueError(f"base is for {' and '.join(BASE_MAPS)}, not for '{orthogonal_map}'")
    if base is not None and base.shape != weight.shape:
        raise ValueError(f"base has shape {tuple(base.shape)}, the weight {tuple(weight.shape)}")
    wide = weight.shape[0] < weight.shape[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        w = (weight.mT if wide else weight).to(dtype)
        if base is None:
            p = ORTHOGONAL_MAPS[orthogonal_map](w)
        else:
            p = BASE_MAPS[orthogonal_map](w, (base.mT if wide else base).to(dtype))
    return p.mT if wide else p


# ------------------------------------------------------------------------------------------------------------
# Maps through a generator
#
# With L = [L1; L2] split at row k, S = L1 - L1^T and G = L2^T L2, the generator A = L E^T - E L^T acts on the
# span of E and [0; L2] as N = [[S, -G], [I, 0]]. Hence f(A) E = [C1; L2 C2] with [C1; C2] = f(N) [I; 0] for every
# function f. The reflectors' product has the same form. A square weight has no L2, and f(A) = f(S).
# ------------------------------------------------------------------------------------------------------------


def _matrix_exp(weight: Tensor, base: Tensor | None = None) -> Tensor:
    return _from_generator(weight, base, _exp_core, "matrix_exp")


def _cayley(weight: Tensor, base: Tensor | None = None) -> Tensor:
    return _from_generator(weight, base, _cayley_core, "cayley")


def _householder(weight: Tensor) -> Tensor:
    # The sign and never the value: torch casts the diagonal to int, so that the first weight decay, which makes
    # a -1 to -0.9999, turns the whole matrix into zeros for good.
    signs = torch.where(weight.detach().diagonal() < 0, -1.0, 1.0)
    return _from_generator(weight, None, partial(_householder_core, signs), "householder")


def _from_generator(weight: Tensor, base: Tensor | None, core: _Core, name: str) -> Tensor:
    n, k = weight.shape
    g = None
    if base is not None:  # base plays the part of E, base^T W that of L1 and what is left of W that of L2
        top = lower = base.mT @ weight
        if n > k:
            rest = weight - base @ top
            g = _Gram.apply(rest)
    else:
        top, g = _Split.apply(weight) if n > k else (weight, None)
        lower = top.tril(-1)
    s = lower - lower.mT
    with torch.no_grad():
        norm = _generator_norm(s, g)
    if weight.dtype != torch.float64 and not (_may_look(norm) and float(norm) <= _FLOAT32_NORM):
        base = None if base is None else base.double()
        return _from_generator(weight.double(), base, core, name).to(weight.dtype)
    defined = _require(
        (norm <= 2.0**_MAX_SQUARINGS) & top.detach().isfinite().all(),
        f"orthogonal_map '{name}': the weight is not finite, or the norm of its generator is above 2^{_MAX_SQUARINGS}",
    )
    c1, c2 = core(s, g, norm)
    if base is not None:
        p = base @ c1 + rest @ c2 if n > k else base @ c1
    else:
        p = _Join.apply(weight, c1, c2) if n > k else c1
    if p.dtype == torch.float64:
        # For large norms even float64 leaves eps * norm^2 in P^T P - I. A step P (3 I - P^T P) / 2 squares that;
        # it moves P by a rounding error, hence carries no gradient.
        with torch.no_grad():
            step = (p - p @ (p.mT @ p)) / 2
        p = p + step
    return _or_nan(p, defined)


def _exp_core(s: Tensor, g: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
    """exp(N) [I; 0]: by its Taylor series while the norm is small, by scaling and squaring of exp(N) otherwise."""
    if g is not None and _may_look(norm) and float(norm) <= _UNSCALED_NORM:
        return _ExpSeries.apply(s, g, _degree(float(norm), torch.finfo(s.dtype).eps))
    k, dtype = s.shape[0], s.dtype
    s = s.double()
    needed = norm.double().log2().ceil().clamp(min=0)
    h = torch.exp2(-needed)
    if g is None:
        x = _exp_scaled(h * s)
    else:
        # h N is similar to [[h S, -h^2 G], [I, 0]] through diag(I, h I), which balances its blocks.
        eye = _eye_like(s)
        x = _exp_scaled(torch.cat([torch.cat([h * s, -h * h * g], 1), torch.cat([eye, torch.zeros_like(eye)], 1)]))
    if _may_look(norm):
        for _ in range(int(needed)):
            x = x @ x
    else:
        for i in range(_MAX_SQUARINGS):
            x = torch.where(needed > i, x @ x, x)
    return x[:k, :k].to(dtype), (h * x[k:, :k]).to(dtype)


def _exp_scaled(a: Tensor) -> Tensor:
    """exp(A) for a norm of at most 1: the Taylor polynomial of degree 19 from 7 products (Paterson, Stockmeyer)."""
    a2 = a @ a
    powers = (_eye_like(a), a, a2, a2 @ a)
    a4 = a2 @ a2
    result = torch.zeros_like(a)
    for i in range(16, -1, -4):
        block = sum((power / math.factorial(i + j) for j, power in enumerate(powers)), torch.zeros_like(a))
        result = block if i == 16 else result @ a4 + block
    return result


def _cayley_core(s: Tensor, g: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(I + N/2) (I - N/2)^-1 [I; 0]: elimination leaves C2 = (I - S/2 + G/4)^-1 and C1 = 2 C2 - I.

    The symmetric part of the inverted matrix is at least I, so it is never singular.
    """
    eye = _eye_like(s)
    c2 = torch.linalg.inv_ex(eye - s / 2 if g is None else eye - s / 2 + g / 4).inverse
    return 2 * c2 - eye, c2


def _householder_core(signs: Tensor, s: Tensor, g: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(I - V T V^T) E D, V = E + L: T^-1 is the upper triangle of V^T V with half its diagonal."""
    # In float64, since T grows where the columns of V are nearly parallel; at k x k that costs next to nothing.
    v1 = (_eye_like(s) + s.tril(-1)).double()
    vv = v1.mT @ v1 if g is None else v1.mT @ v1 + g
    t_inverse = vv.triu(1) + torch.diag(vv.diagonal() / 2)
    d = signs.to(v1.dtype)
    c2 = torch.linalg.solve_triangular(t_inverse, v1.mT * -d, upper=True)
    return (torch.diag(d) + v1 @ c2).to(s.dtype), c2.to(s.dtype)


def _generator_norm(s: Tensor, g: Tensor | None) -> Tensor:
    """An upper bound of the norm of A, that is of [[S, -R^T], [R, 0]] with R^T R = G."""
    if g is None:
        return _norm_bound(s)
    half = _norm_bound(s) / 2
    return half + (half.square() + _norm_bound(g)).sqrt()


def _norm_bound(a: Tensor) -> Tensor:
    """sqrt(|A^2|_inf) for A symmetric or skew: above the spectral norm, and far closer to it than |A|_inf."""
    return (a @ a).abs().sum(dim=-1).amax().sqrt()


def _degree(norm: float, eps: float) -> int:
    """The degree from which the terms of the series of exp(norm) are below ``eps``."""
    degree, term = 1, norm
    while term > eps:
        degree += 1
        term *= norm / degree
    return degree


class _ExpSeries(Function):
    """The Taylor polynomial of exp(N) [I; 0], by its two block rows.

    The lower row of N^j is the upper row of N^(j-1), so one sequence is enough: with c_j the upper row of
    N^j [I; 0] / j!, c_j = S c_(j-1) / j - G c_(j-2) / (j (j-1)), and the lower row of the sum is sum c_j / (j+1).
    The backward runs the transposed recurrence: autograd's products, without its many small additions.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, g: Tensor, degree: int) -> tuple[Tensor, Tensor]:
        terms = [_eye_like(s), s]
        upper = terms[0] + s
        lower = torch.add(terms[0], s, alpha=1 / 2)
        for j in range(2, degree + 1):
            term = torch.addmm(s @ terms[-1], g, terms[-2], beta=1 / j, alpha=-1 / (j * (j - 1)))
            upper += term
            lower.add_(term, alpha=1 / (j + 1))
            terms.append(term)
        ctx.save_for_backward(s, g, *terms[2:])
        return upper, lower

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_upper: Tensor, grad_lower: Tensor) -> tuple[Tensor, Tensor, None]:
        s, g, *later_terms = ctx.saved_tensors
        terms = [_eye_like(s), s, *later_terms]
        grad_s, grad_g = torch.zeros_like(s), torch.zeros_like(g)
        grads: list[Tensor] = []  # of c_degree, ..., c_(j+1)
        for j in range(len(terms) - 1, 0, -1):
            grad = torch.add(grad_upper, grad_lower, alpha=1 / (j + 1))
            if len(grads) >= 1:
                grad.addmm_(s.mT, grads[-1], alpha=1 / (j + 1))
            if len(grads) >= 2:
                grad.addmm_(g.mT, grads[-2], alpha=-1 / ((j + 1) * (j + 2)))
            grads.append(grad)
            if j > 1:
                grad_s.addmm_(grad, terms[j - 1].mT, alpha=1 / j)
                grad_g.addmm_(grad, terms[j - 2].mT, alpha=-1 / (j * (j - 1)))
        return grad_s + grads[-1], grad_g, None


class _Split(Function):
    """The top k x k block L1 of W, and the Gram matrix L2^T L2 of the rows below it.

    With ``_Join`` this says what slicing and ``torch.cat`` would; it is written out because every copy of an
    (n, k) matrix that autograd would make of them costs half as much as a product with it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        k = weight.shape[1]
        return weight[:k].clone(), weight[k:].mT @ weight[k:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_top: Tensor, grad_gram: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        grad = weight @ (grad_gram + grad_gram.mT)
        grad[: weight.shape[1]] = grad_top
        return grad


class _Join(Function):
    """[C1; L2 C2], where L2 stands below the top k x k block of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        ctx.save_for_backward(weight, c2)
        p = weight @ c2
        p[: weight.shape[1]] = c1
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, c2 = ctx.saved_tensors
        k = weight.shape[1]
        grad_weight = grad @ c2.mT
        grad_weight[:k] = 0
        return grad_weight, grad[:k], weight[k:].mT @ grad[k:]


# ------------------------------------------------------------------------------------------------------------
# Maps that normalise W itself: P = W C with a k x k matrix C
# ------------------------------------------------------------------------------------------------------------


def _cholesky_qr(weight: Tensor) -> Tensor:
    return _normalize(weight, polar=False)


def _polar(weight: Tensor) -> Tensor:
    return _normalize(weight, polar=True)


def _normalize(weight: Tensor, polar: bool) -> Tensor:
    name = "polar" if polar else "cholesky_qr"
    k = weight.shape[1]
    if weight.dtype != torch.float64:
        p = _normalize_harmless(weight, polar) if _may_look(weight) else None
        return _normalize(weight.double(), polar).to(weight.dtype) if p is None else p

    # Once to make the columns nearly orthonormal: W T, with T from a Cholesky factor that the shift keeps from
    # breaking down. T is a constant to autograd: the Q of W T is that of W for every triangular T, and the polar
    # factor takes T back.
    with torch.no_grad():
        gram = weight.mT @ weight
        _require(gram.diagonal().isfinite().all(), f"orthogonal_map '{name}': the weight is not finite")
        r, d = _factor(gram, shift=8 * k * torch.finfo(gram.dtype).eps)
        t, t_inverse = _inverse_upper(r) / d[:, None], r * d
    w = weight @ t
    # And once more for what rounding left, at most a condition number of a few.
    r, d = _factor(_Gram.apply(w))
    defined = _require(
        ((r * d).detach().diagonal().square() >= _FULL_RANK_PIVOT).all(),
        f"orthogonal_map '{name}' is undefined: the {tuple(weight.shape)} weight has no full column rank "
        "(condition number above about 1e7)",
    )
    c = _inverse_upper(r) / d[:, None]
    if polar:
        c = c @ _newton_polar((r * d) @ t_inverse)
    return _or_nan(w @ c, defined)


def _normalize_harmless(weight: Tensor, polar: bool) -> Tensor | None:
    """P from one float32 Gram matrix where that is enough: None where columns are too near to dependent."""
    gram = _Gram.apply(weight)
    r, d = _factor(gram)
    inverse = _inverse_upper(r)
    # The rows of R^-1 hold the columns' inverse distances from the span of the others.
    if not float(inverse.detach().square().sum(dim=1).amax()) <= 1 / _FLOAT32_DISTANCE:
        return None
    return weight @ (_InverseSqrt.apply(gram) if polar else inverse / d[:, None])


def _factor(gram: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """(R, d): W = Q R diag(d), with d the norms of W's columns; NaN where the Cholesky factor does not exist."""
    d = gram.detach().diagonal().sqrt()
    d = torch.where(d > 0, d, 1.0)
    scaled = gram / d / d[:, None] + shift * _eye_like(gram)
    r, info = torch.linalg.cholesky_ex(scaled, upper=True)
    return torch.where(info == 0, r, math.nan), d


def _inverse_upper(r: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(r, _eye_like(r), upper=True)


def _newton_polar(r: Tensor) -> Tensor:
    """The orthogonal U of R = U H, by X <- (z X + X^-T / z) / 2 with Higham's scaling z.

    Products and inverses only: an eigendecomposition would synchronise a GPU, and its derivative divides by
    differences of eigenvalues. The limit does not depend on z, hence neither does the derivative.
    """
    x = r
    for _ in range(_NEWTON_STEPS):
        inverse = torch.linalg.inv_ex(x).inverse.mT
        with torch.no_grad():
            ratio = _one_inf(inverse) / _one_inf(x)
            z = ratio.sqrt().sqrt()
        before, x = x, (z * x + inverse / z) / 2
        if _may_look(x) and float((x - before).detach().abs().amax()) < 1e-11:
            break
    return x


def _one_inf(a: Tensor) -> Tensor:
    """The product of the 1-norm and the infinity-norm."""
    a = a.abs()
    return a.sum(dim=0).amax() * a.sum(dim=1).amax()


class _InverseSqrt(Function):
    """G^(-1/2) of a symmetric positive definite G, with a derivative that equal eigenvalues do not disturb."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        roots = values.sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        # The divided difference of x^(-1/2) at a^2 and b^2 is -1 / (a b (a + b)).
        divided = -1 / (roots * roots[:, None] * (roots + roots[:, None]))
        return vectors @ (divided * (vectors.mT @ grad @ vectors)) @ vectors.mT


class _Gram(Function):
    """A^T A, with the backward as one product, A (g + g^T), where autograd would make two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.mT @ a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return a @ (grad + grad.mT)


def _eye_like(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _may_look(x: Tensor) -> bool:
    """Whether branching on the values of ``x`` is free: no device to wait for, no graph to break, and values at all.

    A tensor of a subclass may have none, as torch's fake tensors.
    """
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def _require(condition: Tensor, message: str) -> Tensor | None:
    """Raises if the condition does not hold; where that cannot be looked at, the condition for :func:`_or_nan`."""
    if not _may_look(condition):
        return condition
    if not condition:
        raise UndefinedMapError(message)
    return None


def _or_nan(p: Tensor, defined: Tensor | None) -> Tensor:
    return p if defined is None else torch.where(defined, p, torch.nan)


ORTHOGONAL_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix_exp": _matrix_exp,
    "cayley": _cayley,
    "householder": _householder,
    "cholesky_qr": _cholesky_qr,
    "polar": _polar,
}
BASE_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"matrix_exp": _matrix_exp, "cayley": _cayley}
