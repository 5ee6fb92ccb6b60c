"""Projectors: from the student's feature space to the teacher's, on the last dimension of (..., C).

``OrthogonalProjector`` is the method of VkD (Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213, section on
orthogonal projections); ``LinearProjector`` and ``MLPProjector`` are what the paper's ablation compares it with;
``ReleasedProjector`` is what its released code trains with.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import one_of
from .numerics import without_autocast
from .stiefel import BASE_MAPS, ORTHOGONAL_MAPS, orthogonalize
from .suggest import nearest


class OrthogonalProjector(nn.Module):
    """y = x P^T (+ b) with orthonormal P: P^T P = I where out_features >= in_features, P P^T = I otherwise.

    With P^T P = I, inner products, norms and distances of features pass unchanged: the projector can rotate and
    embed, but learn no representation that the student lacks. With out_features < in_features that cannot be:
    rows are orthonormal, a subspace is dropped, and similarities are kept only for features outside of it.

    P is computed from the parameter ``raw_weight`` at every forward, in float32 or wider and outside of autocast,
    then rounded to the dtype that the product runs in. Whatever an optimiser, weight decay or a cast does to
    ``raw_weight``, P is orthonormal. Decay would pull P towards a fixed matrix to no purpose, so ``raw_weight`` is
    marked to be left out of it, in ``no_weight_decay()`` (timm's convention) and by ``_no_weight_decay``.

    A new projector is random, from torch's generator. With out_features >= 2 in_features its column space is
    uniformly distributed (``householder``, ``cholesky_qr`` and ``polar``: P is, at all sizes).

    Args:
        in_features: C of the student.
        out_features: C of the teacher.
        orthogonal_map: a name of ``vkd_plugin.stiefel.ORTHOGONAL_MAPS``; ``matrix_exp`` is the paper's.
        bias: add a learned offset, which starts at zero.
        device, dtype: of the parameters. For float16 and bfloat16 P is a float32 function of rounded numbers.

    Raises:
        ValueError: unknown map, or sizes below 1.

    YAML::

        projector: {key: 'OrthogonalProjector', orthogonal_map: 'matrix_exp'}
    """

    base: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        orthogonal_map: str = "matrix_exp",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a projector needs sizes of at least 1, got {in_features} to {out_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.orthogonal_map = orthogonal_map
        self.raw_weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        # Where an assigned weight is kept for the maps that have no inverse; None, and free, until then.
        self.register_buffer("base", None)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._mark()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new random P from torch's generator."""
        self.base = None
        if not self.raw_weight.is_meta:
            n, k = max(self.raw_weight.shape), min(self.raw_weight.shape)
            raw = _RANDOM_RAW[self.orthogonal_map](n, k, self.raw_weight.device)
            self._set_raw(raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """P (out_features, in_features), in float32 or wider, differentiable with respect to ``raw_weight``.

        Assigning a matrix of that shape with orthonormal columns (rows, if wide) makes it P, up to the rounding of
        the parameters' dtype; training continues from there.
        """
        return orthogonalize(self.raw_weight, self.orthogonal_map, base=self.base)

    @weight.setter
    @torch.no_grad()
    def weight(self, value: Tensor) -> None:
        if value.shape != self.raw_weight.shape:
            raise ValueError(
                f"the weight has shape {tuple(self.raw_weight.shape)} (out_features, in_features), "
                f"got {tuple(value.shape)}"
            )
        error, tolerance = float(_orthogonality_error(value.double())), torch.finfo(value.dtype).eps ** 0.5
        if not error <= tolerance:
            raise ValueError(
                f"the weight must have orthonormal {'columns' if self._tall else 'rows'}; the largest entry of "
                f"|{'W^T W' if self._tall else 'W W^T'} - I| is {error:.1e}, more than {tolerance:.1e}. "
                "vkd_plugin.orthogonalize(weight, 'polar') is the nearest matrix that has them"
            )
        # What is left of the error would stay in a base for good.
        q = orthogonalize(value.to(self.raw_weight.device, torch.float64), "polar")
        if self.orthogonal_map in BASE_MAPS:
            # These maps have no inverse in closed form; the generator 0 leaves the base as it is.
            self.base = q.to(torch.promote_types(self.raw_weight.dtype, torch.float32))
            self.raw_weight.zero_()
        else:
            q = q if self._tall else q.mT
            self._set_raw(_householder_inverse(q) if self.orthogonal_map == "householder" else q)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), in the dtype of x (under autocast, in autocast's)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    @torch.no_grad()
    def orthogonality_error(self) -> Tensor:
        """The largest entry of |P^T P - I| (|P P^T - I|, if wide): a scalar on P's device, no synchronisation."""
        return _orthogonality_error(self.weight)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone."""
        return {"raw_weight"}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"orthogonal_map='{self.orthogonal_map}', bias={self.bias is not None}"
        )

    @property
    def _tall(self) -> bool:
        return self.out_features >= self.in_features

    def _set_raw(self, tall: Tensor) -> None:
        self.raw_weight.copy_(tall if self._tall else tall.mT)

    def _mark(self) -> None:
        self.raw_weight._no_weight_decay = True  # type: ignore[attr-defined]

    # An attribute of a parameter is lost wherever torch makes a new one: copies and pickles come through
    # __setstate__, casts and moves through _apply, load_state_dict(assign=True) through _load_from_state_dict.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OrthogonalProjector":
        base = self.base
        super()._apply(fn, recurse)
        # A base rounded to half precision is not orthonormal any more, and P would inherit that.
        if base is not None and self.base is not None and self.base.dtype.itemsize < 4:
            self.base = base.to(self.base.device)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "raw_weight" in state_dict:
            saved = state_dict.get(prefix + "base")
            self.base = None if saved is None else torch.empty_like(saved, device=self.raw_weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._mark()

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would try to register a Parameter under the name of the property.
        if name == "weight" and isinstance(value, nn.Parameter):
            value = value.detach()
        super().__setattr__(name, value)


def _orthogonality_error(weight: Tensor) -> Tensor:
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    with without_autocast(weight):
        return (tall.mT @ tall - torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)).abs().amax()


# What a map makes a random orthonormal matrix of, in float64. Legend: n >= k, Q (n, k) uniformly distributed.


def _random_orthonormal(n: int, k: int, device: torch.device) -> Tensor:
    return orthogonalize(torch.randn(n, k, dtype=torch.float64, device=device), "cholesky_qr")


def _random_householder(n: int, k: int, device: torch.device) -> Tensor:
    return _householder_inverse(_random_orthonormal(n, k, device))


def _householder_inverse(q: Tensor) -> Tensor:
    """W with ``householder`` map Q: below the diagonal LAPACK's reflectors, on it the signs of R in Q = H R."""
    packed, tau = torch.geqrf(q)
    # tau = 0 says that LAPACK left a reflector out (a column that was right already), where the map has one along
    # the basis vector: it turns the sign.
    signs = torch.where((packed.diagonal() < 0) == (tau == 0), 1.0, -1.0).to(q.dtype)
    return packed.tril(-1).diagonal_scatter(signs)


def _random_generator(n: int, k: int, device: torch.device, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """L with f(A) E a random point, f(i t) having the angle phi = t in ``scale``'s terms.

    For n >= 2k, L1 = 0: turned on the right to Q' with a symmetric top block V cos(phi) V^T, which leaves the
    column space, Q is f(A) E of L2 = Q2' V (t(phi) / sin(phi)) V^T, Q2' the rows below. For n < 2k this would be
    close to the identity (at n = k the identity), so L1 gets a random rotation's logarithm, too.
    """
    q = _random_orthonormal(n, k, device)
    v, cos, uh = torch.linalg.svd(q[:k])
    sin = ((1 - cos) * (1 + cos)).clamp(min=0).sqrt()
    # sin = 0: columns of Q2' V that are 0 themselves.
    ratio = torch.where(sin > 1e-6, scale(torch.atan2(sin, cos)) / sin.clamp(min=1e-6), 1.0)
    lower = q[k:] @ uh.mT @ torch.diag(ratio) @ v.mT
    top = torch.zeros_like(q[:k])
    if n < 2 * k:
        rotation = _random_orthonormal(k, k, device)
        rotation[:, 0] *= torch.linalg.det(rotation).sign()  # the exponential reaches rotations only
        values, vectors = torch.linalg.eig(rotation)
        log = ((vectors * (1j * values.angle())) @ vectors.mH).real
        top = ((log - log.mT) / 2).tril(-1)
    return torch.cat([top, lower])


def _random_matrix_exp(n: int, k: int, device: torch.device) -> Tensor:
    return _random_generator(n, k, device, lambda phi: phi)


def _random_cayley(n: int, k: int, device: torch.device) -> Tensor:
    return _random_generator(n, k, device, lambda phi: 2 * (phi / 2).tan())


_RANDOM_RAW: dict[str, Callable[[int, int, torch.device], Tensor]] = {
    "matrix_exp": _random_matrix_exp,
    "cayley": _random_cayley,
    "householder": _random_householder,
    "cholesky_qr": _random_orthonormal,
    "polar": _random_orthonormal,
}


class LinearProjector(nn.Linear):
    """y = x W^T (+ b) with a free W: the paper's first baseline.

    Args:
        in_features: C of the student.
        out_features: C of the teacher.
        bias: add a learned offset.
        device, dtype: of the parameters.

    YAML::

        projector: {key: 'LinearProjector'}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)


class MLPProjector(nn.Sequential):
    """``depth`` linear layers with ReLU between them: the paper's baseline that has capacity of its own.

    Args:
        in_features: C of the student.
        out_features: C of the teacher.
        hidden_features: C between the layers; ``in_features`` by default.
        depth: number of linear layers.
        bias: of every linear layer.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``depth`` below 1.

    YAML::

        projector: {key: 'MLPProjector', hidden_features: 1024, depth: 2}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        depth: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"MLPProjector has at least one layer, got depth={depth}")
        hidden = in_features if hidden_features is None else hidden_features
        widths = [in_features, *[hidden] * (depth - 1), out_features]
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(widths[i], widths[i + 1], bias, device, dtype))
        super().__init__(*layers)
        self.in_features = in_features
        self.out_features = out_features


class ReleasedProjector(nn.Module):
    """The projector of the method's released ImageNet code, for comparison alone: weight decay makes it zero.

    torch's orthogonal parametrisation takes the Householder map for a weight that is not square, and truncates the
    diagonal of its raw matrix, -1 at first, to whole numbers. With weight decay on that matrix, as there, the first
    step of the optimizer makes the diagonal -0.99..., which becomes 0, and so does all that is projected. Nothing is
    changed here: the raw matrix is left to weight decay, and no orthogonality is measured.

    Args:
        in_features: C of the student.
        out_features: C of the teacher.

    YAML::

        projector: {key: 'ReleasedProjector'}
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.linear = nn.utils.parametrizations.orthogonal(nn.Linear(in_features, out_features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.linear(x)


PROJECTORS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (OrthogonalProjector, LinearProjector, MLPProjector, ReleasedProjector)
}


def build_projector(key: str, in_features: int, out_features: int, **kwargs: Any) -> nn.Module:
    """The projector registered as ``key``.

    Args:
        key: a name of ``PROJECTORS``.
        in_features: C of the student.
        out_features: C of the teacher.
        **kwargs: the class's own arguments.

    Raises:
        ValueError: unknown key or argument; the message names the nearest one.
    """
    one_of("projector", key, PROJECTORS)
    known = list(inspect.signature(PROJECTORS[key]).parameters)[2:]
    for name in kwargs:
        if name not in known:
            raise ValueError(f"{key} has no argument '{name}'{nearest(name, known)}")
    return PROJECTORS[key](in_features, out_features, **kwargs)
