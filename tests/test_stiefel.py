"""The Stiefel maps against independent references, and the properties that every one of them promises."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from vkd_plugin import stiefel
from vkd_plugin.stiefel import BASE_MAPS, ORTHOGONAL_MAPS, orthogonalize

GENERATOR_MAPS = ("matrix_exp", "cayley", "householder")
NORMALIZING_MAPS = ("cholesky_qr", "polar")
SHAPES = ((20, 6), (10, 8), (6, 6), (5, 1), (1, 5), (4, 9), (1, 1))
every_map = pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conditioned(n: int, k: int, condition: float, scale: float, seed: int) -> Tensor:
    """A matrix with singular values from ``scale`` down to ``scale / condition``."""
    rank = min(n, k)
    left, right = torch.linalg.qr(draw(n, rank, seed=seed))[0], torch.linalg.qr(draw(k, rank, seed=seed + 1))[0]
    return left * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ right.mT * scale


def error(p: Tensor) -> float:
    p = p.detach().double()
    p = p if p.shape[0] >= p.shape[1] else p.mT
    return float((p.mT @ p - torch.eye(p.shape[1])).abs().max())


def torch_reference(weight: Tensor, orthogonal_map: str) -> tuple[Tensor, nn.Parameter]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    parametrizations.orthogonal(layer, orthogonal_map=orthogonal_map, use_trivialization=False)
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw.copy_(weight)
    return layer.weight, raw


# What the maps are


@pytest.mark.parametrize("orthogonal_map", GENERATOR_MAPS)
@every_shape
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_equals_torchs_parametrization(
    orthogonal_map: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, tolerance: float
) -> None:
    weight = scale * draw(*shape, dtype=dtype)
    weight.diagonal().copy_(draw(min(shape), seed=1).sign())
    weight.requires_grad_()
    expected, raw = torch_reference(weight, orthogonal_map)
    p = orthogonalize(weight, orthogonal_map)
    assert p.dtype == dtype
    assert torch.allclose(p, expected, rtol=0, atol=tolerance)
    if dtype == torch.float64:
        cotangent = draw(*shape, seed=2)
        (p * cotangent).sum().backward()
        (expected * cotangent).sum().backward()
        if orthogonal_map == "householder":  # torch gives the diagonal no gradient either
            assert not weight.grad.diagonal().any()
        assert torch.allclose(weight.grad, raw.grad, rtol=0, atol=tolerance)


@every_shape
def test_cholesky_qr_is_the_q_of_qr(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    tall = weight if shape[0] >= shape[1] else weight.mT
    q, r = torch.linalg.qr(tall)
    expected = q * r.diagonal().sign()
    p = orthogonalize(weight, "cholesky_qr")
    assert torch.allclose(p if shape[0] >= shape[1] else p.mT, expected, rtol=0, atol=1e-12)


@every_shape
def test_polar_is_the_nearest(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    p = orthogonalize(weight, "polar")
    assert torch.allclose(p, u @ vh, rtol=0, atol=1e-12)
    other = orthogonalize(draw(*shape, seed=3), "cholesky_qr")
    assert torch.dist(weight, p) <= torch.dist(weight, other) + 1e-12


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned_polar_and_qr_stay_accurate(condition: float) -> None:
    """The error of a stable algorithm: the condition number times the rounding of float64."""
    weight = conditioned(60, 20, condition, 1.0, seed=0)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    q, r = torch.linalg.qr(weight)
    tolerance = 100 * condition * torch.finfo(torch.float64).eps
    assert torch.allclose(orthogonalize(weight, "polar"), u @ vh, rtol=0, atol=tolerance)
    assert torch.allclose(orthogonalize(weight, "cholesky_qr"), q * r.diagonal().sign(), rtol=0, atol=tolerance)


def test_householder_reads_the_sign_of_the_diagonal() -> None:
    weight = draw(9, 4)
    weight.diagonal().copy_(torch.tensor([0.3, -1e-5, 0.0, -7.0]))
    signs = weight.clone()
    signs.diagonal().copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert torch.equal(orthogonalize(weight, "householder"), orthogonalize(signs, "householder"))


@pytest.mark.parametrize("orthogonal_map", BASE_MAPS)
@every_shape
def test_base_is_the_starting_point(orthogonal_map: str, shape: tuple[int, int]) -> None:
    base = orthogonalize(draw(*shape, seed=4), "polar")
    weight = draw(*shape)
    zero = orthogonalize(torch.zeros_like(weight), orthogonal_map, base=base)
    assert torch.allclose(zero, base, rtol=0, atol=1e-14)

    p = orthogonalize(weight, orthogonal_map, base=base)
    tall = shape[0] >= shape[1]
    w, q0 = (weight, base) if tall else (weight.mT, base.mT)
    a = w @ q0.mT - q0 @ w.mT
    eye = torch.eye(len(a), dtype=a.dtype)
    full = (
        torch.linalg.matrix_exp(a) if orthogonal_map == "matrix_exp" else torch.linalg.solve(eye - a / 2, eye + a / 2)
    )
    assert torch.allclose(p if tall else p.mT, full @ q0, rtol=0, atol=1e-12)


# Orthonormal, whatever the weight


@st.composite
def weights(draw_: Any, scales: tuple[float, float]) -> Tensor:
    n, k = draw_(st.sampled_from([(1, 7), (7, 1), (3, 2), (8, 8), (33, 32), (64, 9), (300, 20), (12, 50), (200, 64)]))
    condition = 10 ** draw_(st.floats(0, 6))
    scale = 10 ** draw_(st.floats(*(math.log10(s) for s in scales)))
    return conditioned(n, k, condition, scale, draw_(st.integers(0, 2**20)))


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("orthogonal_map", GENERATOR_MAPS)
@settings(max_examples=30, deadline=None)
@given(weight=weights(scales=(1e-6, 1e2)), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_generator_maps_are_orthonormal(orthogonal_map: str, weight: Tensor, dtype: torch.dtype) -> None:
    assert error(orthogonalize(weight.to(dtype), orthogonal_map)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("orthogonal_map", NORMALIZING_MAPS)
@settings(max_examples=30, deadline=None)
@given(weight=weights(scales=(1e-6, 1e6)), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_normalizing_maps_are_orthonormal(orthogonal_map: str, weight: Tensor, dtype: torch.dtype) -> None:
    assert error(orthogonalize(weight.to(dtype), orthogonal_map)) <= TOLERANCE[dtype]


@every_map
@settings(max_examples=10, deadline=None)
@given(weight=weights(scales=(1e-6, 1e2)), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_static_algorithms_are_orthonormal(orthogonal_map: str, weight: Tensor, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stiefel, "_may_look", lambda x: False)
        assert error(orthogonalize(weight.to(dtype), orthogonal_map)) <= TOLERANCE[dtype]


@every_map
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_large_weight_of_large_entries(orthogonal_map: str, dtype: torch.dtype) -> None:
    assert error(orthogonalize(100 * draw(3024, 192, dtype=dtype), orthogonal_map)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("orthogonal_map", GENERATOR_MAPS)
def test_zero_weights_of_generator_maps(orthogonal_map: str) -> None:
    weight = torch.zeros(6, 3, requires_grad=True)
    p = orthogonalize(weight, orthogonal_map)
    assert error(p) == 0
    p.sum().backward()
    assert weight.grad.isfinite().all()


# Gradients


@every_map
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((7, 3), 0.3), ((7, 3), 3.0), ((5, 4), 1.0), ((4, 4), 3.0), ((3, 6), 0.3), ((1, 3), 1.0)],
    ids=str,
)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_gradcheck(
    orthogonal_map: str, shape: tuple[int, int], scale: float, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if static:
        monkeypatch.setattr(stiefel, "_may_look", lambda x: False)
    weight = (scale * draw(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: orthogonalize(w, orthogonal_map), weight, fast_mode=static)


@pytest.mark.parametrize("orthogonal_map", BASE_MAPS)
@pytest.mark.parametrize("shape", [(7, 3), (4, 4), (3, 6)], ids=str)
def test_gradcheck_with_base(orthogonal_map: str, shape: tuple[int, int]) -> None:
    base = orthogonalize(draw(*shape, seed=4), "polar")
    weight = draw(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: orthogonalize(w, orthogonal_map, base=base), weight)


@every_map
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_float32_gradients_agree_with_float64(orthogonal_map: str, scale: float) -> None:
    weight, cotangent = scale / 8 * draw(64, 16), draw(64, 16, seed=1)
    grads = []
    for dtype in (torch.float32, torch.float64):
        w = weight.to(dtype).requires_grad_()
        (orthogonalize(w, orthogonal_map) * cotangent).sum().backward()
        grads.append(w.grad.double())
    assert torch.dist(*grads) <= 1e-5 * grads[1].norm()


def test_equal_singular_values_do_not_disturb_the_polar_gradient() -> None:
    weight = orthogonalize(draw(9, 4), "polar").float().requires_grad_()
    orthogonalize(weight, "polar")[0, 0].backward()
    assert weight.grad.isfinite().all()


# Cost


class Record(TorchDispatchMode):
    """The operators that ran, and the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@every_map
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_no_long_square_matrix_and_no_look_at_the_data(
    orthogonal_map: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 500, 8
    weight = (draw(n, k, dtype=torch.float32) / n**0.5).requires_grad_()
    if static:
        monkeypatch.setattr(stiefel, "_may_look", lambda x: False)
    with Record() as record:
        orthogonalize(weight, orthogonal_map).sum().backward()
    assert record.largest <= n * k
    looked = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default"} & record.names
    assert bool(looked) is not static
    if static:  # these wait for the GPU to check their result
        assert not any(name in op for op in record.names for name in ("eigh", "svd", "geqrf", "lu_solve"))


# Precision and compilation


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_precision_weights(orthogonal_map: str, dtype: torch.dtype) -> None:
    weight = draw(40, 12, dtype=torch.float32).requires_grad_()
    expected = orthogonalize(weight, orthogonal_map)
    with torch.autocast("cpu", dtype=dtype):
        p = orthogonalize(weight, orthogonal_map)
    assert p.dtype == torch.float32
    assert torch.equal(p, expected)

    half = weight.detach().to(dtype).requires_grad_()
    p = orthogonalize(half, orthogonal_map)
    assert p.dtype == torch.float32
    assert error(p) <= 1e-5
    p[0].sum().backward()
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()


def assert_compiles(orthogonal_map: str, backend: str) -> None:
    compiled = torch.compile(lambda w: orthogonalize(w, orthogonal_map), fullgraph=True, backend=backend)
    for step in range(3):
        weight = draw(24, 6, seed=step, dtype=torch.float32).requires_grad_()
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            p = compiled(weight)
        (grad,) = torch.autograd.grad(p[0].sum(), weight)
        expected = orthogonalize(weight, orthogonal_map)
        (expected_grad,) = torch.autograd.grad(expected[0].sum(), weight)
        assert torch.allclose(p, expected, rtol=0, atol=1e-5)
        assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-5)


@every_map
def test_compiles_to_one_graph_once(orthogonal_map: str) -> None:
    assert_compiles(orthogonal_map, "aot_eager")


@pytest.mark.slow
@every_map
def test_compiles_with_inductor(orthogonal_map: str) -> None:
    assert_compiles(orthogonal_map, "inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_map
def test_gpu_agrees_and_does_not_synchronise(orthogonal_map: str) -> None:
    weight = draw(300, 40, dtype=torch.float32).cuda().requires_grad_()
    orthogonalize(weight, orthogonal_map).sum().backward()  # library handles are made in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        p = orthogonalize(weight, orthogonal_map)
        p.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(p.cpu(), orthogonalize(weight.detach().cpu(), orthogonal_map), rtol=0, atol=1e-5)


# Errors


@pytest.mark.parametrize("orthogonal_map", NORMALIZING_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["zero", "zero column", "equal columns", "rank one"])
def test_no_full_rank_is_an_error(
    orthogonal_map: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(30, 5, dtype=dtype)
    if kind == "zero":
        weight.zero_()
    elif kind == "zero column":
        weight[:, 2] = 0
    elif kind == "equal columns":
        weight[:, 4] = weight[:, 1]
    else:
        weight = torch.ones(30, 1, dtype=dtype) @ torch.arange(1, 6, dtype=dtype)[None]
    with pytest.raises(ValueError, match="no full column rank"):
        orthogonalize(weight, orthogonal_map)
    monkeypatch.setattr(stiefel, "_may_look", lambda x: False)
    assert orthogonalize(weight, orthogonal_map).isnan().all()


@every_map
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (9, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_not_finite_is_an_error(
    orthogonal_map: str, value: float, place: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(10, 3, dtype=dtype)
    weight[place] = value
    with pytest.raises(ValueError, match="not finite"):
        orthogonalize(weight, orthogonal_map)
    monkeypatch.setattr(stiefel, "_may_look", lambda x: False)
    assert orthogonalize(weight, orthogonal_map).isnan().all()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'matrix_exp'"):
        orthogonalize(torch.ones(3, 2), "matrix_expo")
    with pytest.raises(ValueError, match="expected a real floating-point matrix"):
        orthogonalize(torch.ones(3, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="expected a real floating-point matrix"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="base is for"):
        orthogonalize(torch.ones(3, 2), "polar", base=torch.ones(3, 2))
    with pytest.raises(ValueError, match="base has shape"):
        orthogonalize(torch.ones(3, 2), base=torch.ones(2, 2))
