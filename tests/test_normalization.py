"""Normalisations against float64 references and against what their names promise."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd_plugin.normalization import DEFAULT_EPS, Normalization, inverse_sqrt, normalize

METHODS = list(DEFAULT_EPS)
OVER_ROWS = ["standardize", "whiten"]
TALL, WIDE = (14, 5), (5, 9)


def features(n: int, c: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated channels of different scale, far from zero mean."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g, dtype=torch.float64) @ torch.randn(c, c, generator=g, dtype=torch.float64)
    return (x * torch.logspace(-1, 1, c, dtype=torch.float64) + torch.arange(c)).to(dtype)


def of_condition(n: int, c: int, condition: float, seed: int = 0) -> Tensor:
    """Centred rows (n, c) whose singular values fall evenly from 1 to 1 / condition on a log scale."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, c, generator=g, dtype=torch.float64)
    u, _ = torch.linalg.qr(rows - rows.mean(dim=0))
    v, _ = torch.linalg.qr(torch.randn(c, c, generator=g, dtype=torch.float64))
    return u * torch.logspace(0, -np.log10(condition), c, dtype=torch.float64) @ v.T


def covariance_error(y: Tensor) -> float:
    y = y.detach().double()
    return (torch.cov(y.T) - torch.eye(y.shape[1], dtype=torch.float64)).abs().max().item()


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, seed: int = 1) -> Tensor:
    """Of a fixed random combination of the entries of f(x)."""
    x = x.detach().requires_grad_()
    y = f(x)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    (y * w).sum().backward()
    assert x.grad is not None
    return x.grad


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0, ddof=1)


def polar(z: np.ndarray) -> np.ndarray:
    """sqrt(N - 1) times the partial isometry nearest to z, from the singular value decomposition."""
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    keep = s > 1e-9 * s[0]
    return np.sqrt(len(z) - 1) * u[:, keep] @ vt[keep]


REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "l2": lambda x: x / np.linalg.norm(x, axis=1, keepdims=True),
    "layer_norm": lambda x: (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5),
    "standardize": standardized,
    "whiten": lambda x: polar(standardized(x)),
}


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("method", METHODS)
def test_equals_float64_reference(method: str, shape: tuple[int, int]) -> None:
    x = features(*shape)
    expected = torch.from_numpy(REFERENCES[method](x.numpy()))
    torch.testing.assert_close(normalize(x, method), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normalize(x.float(), method).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(9, 4), (4, 6), (3, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str, shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda x: normalize(x, method), (x.requires_grad_(),))


def test_two_rows_whiten_to_signs() -> None:
    x = torch.tensor([[1.0, 5.0, -2.0], [3.0, 1.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64) / 6**0.5
    torch.testing.assert_close(normalize(x, "whiten"), expected)
    assert gradient(lambda x: normalize(x, "whiten"), x).abs().max() < 1e-9


@given(n=st.integers(3, 40), c=st.integers(1, 30), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_l2_rows_have_norm_one(n: int, c: int, seed: int) -> None:
    norms = normalize(features(n, c, seed), "l2").norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@given(
    c=st.integers(1, 24),
    more=st.integers(4, 60),
    seed=st.integers(0, 2**16),
    decades=st.integers(0, 8),
    condition=st.sampled_from([1.0, 1e2, 1e4]),
)
@settings(max_examples=40, deadline=None)
def test_whitened_covariance_is_the_identity(c: int, more: int, seed: int, decades: int, condition: float) -> None:
    """In float32, for any scale of each channel, with more rows than channels."""
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (decades * (torch.rand(c, generator=g, dtype=torch.float64) - 0.5))
    x = (of_condition(c + more, c, condition, seed) * scale).float()
    y = normalize(x, "whiten")
    assert y.dtype == torch.float32
    assert covariance_error(y) < 1e-4
    assert y.double().mean(dim=0).abs().max() < 1e-5


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
@pytest.mark.parametrize(("n", "c"), [(80, 64), (300, 96)])
def test_whitening_of_ill_conditioned_float32_features(n: int, c: int, condition: float) -> None:
    assert covariance_error(normalize(of_condition(n, c, condition).float(), "whiten")) < 1e-4


@given(n=st.integers(1, 20), extra=st.integers(0, 30), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_whitening_of_few_rows_is_an_isometry(n: int, extra: int, seed: int) -> None:
    """Of rank N - 1, so that all rows are equally far apart."""
    y = normalize(features(n, n + extra, seed), "whiten")
    expected = (n - 1) * torch.eye(n, dtype=torch.float64) - (n - 1) / n
    torch.testing.assert_close(y @ y.T, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.9])
def test_whitening_with_shrinkage(eps: float, shape: tuple[int, int]) -> None:
    x = features(*shape)
    z = standardized(x.numpy())
    values, vectors = np.linalg.eigh((1 - eps) * np.cov(z.T) + eps * np.eye(shape[1]))
    expected = torch.from_numpy(z @ (vectors / np.sqrt(values)) @ vectors.T)
    torch.testing.assert_close(normalize(x, "whiten", eps), expected)


@given(
    method=st.sampled_from(OVER_ROWS),
    shape=st.sampled_from([TALL, WIDE]),
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-2, 1e3),
    shift=st.floats(-100, 100),
)
@settings(max_examples=40, deadline=None)
def test_affine_changes_of_channels_are_ignored(
    method: str, shape: tuple[int, int], seed: int, scale: float, shift: float
) -> None:
    x = features(*shape, seed)
    a = torch.linspace(1, scale, shape[1], dtype=torch.float64)
    torch.testing.assert_close(normalize(a * x + shift, method), normalize(x, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("method", OVER_ROWS)
def test_order_of_channels_does_not_matter(method: str, shape: tuple[int, int]) -> None:
    x = features(*shape)
    torch.testing.assert_close(normalize(x.flip(1), method), normalize(x, method).flip(1))


@pytest.mark.parametrize("value", [0.0, 3.7, -12345.678, 1e6])
@pytest.mark.parametrize("shape", [(64, 6), WIDE, (1, 4)])
@pytest.mark.parametrize("method", OVER_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channel_is_zero(method: str, shape: tuple[int, int], value: float, dtype: torch.dtype) -> None:
    x = features(*shape, dtype=dtype)
    x[:, 1] = value
    y = normalize(x, method)
    assert y[:, 1].abs().max() < 1e-6 * max(1.0, abs(value) / 1e3)
    assert y.isfinite().all()
    assert gradient(lambda x: normalize(x, method), x).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1, 1), (5, 4), (4, 5)])
def test_degenerate_shapes_are_finite(method: str, shape: tuple[int, int]) -> None:
    for x in (features(*shape), torch.zeros(shape)):
        assert normalize(x, method).isfinite().all()
        assert gradient(lambda x: normalize(x, method), x).isfinite().all()


@pytest.mark.parametrize("method", OVER_ROWS)
def test_single_row_is_zero(method: str) -> None:
    assert normalize(torch.randn(1, 7), method).eq(0).all()


def test_far_from_zero_mean() -> None:
    """Statistics do not cancel: 1e4 + unit noise, whose own rounding is 5e-4."""
    x = (torch.randn(256, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    for method in OVER_ROWS:
        expected = torch.from_numpy(REFERENCES[method](x.double().numpy()))
        torch.testing.assert_close(normalize(x, method).double(), expected, rtol=1e-5, atol=1e-5)


def test_dependent_channels_are_left_out() -> None:
    """Two equal channels and a sum of two others: white on the rest, as with a pseudo-inverse."""
    b = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mix = torch.cat([torch.eye(5), torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])]).double().T
    expected = torch.from_numpy(polar(standardized((b @ mix).numpy())))
    torch.testing.assert_close(normalize(b @ mix, "whiten"), expected, rtol=1e-6, atol=1e-6)

    single = (b @ mix).float()
    variances = torch.linalg.eigvalsh(torch.cov(normalize(single, "whiten").double().T))
    torch.testing.assert_close(variances[2:], torch.ones(5, dtype=torch.float64))
    assert variances[0] < 1e-9, "the copy is left out"
    assert variances[1] < 0.5, "the rounding of the sum is damped"
    assert gradient(lambda x: normalize(x, "whiten"), single).isfinite().all()


@pytest.mark.parametrize(("rows", "copies"), [(8, 1), (4, 2)])
def test_repeated_eigenvalues_have_gradients(rows: int, copies: int) -> None:
    """Uncorrelated channels: all eigenvalues are equal, and a backward through eigenvectors divides by 0."""
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    x = signs.repeat(rows // 4, copies).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalize(x, "whiten"), (x,))


@pytest.mark.parametrize(("dtype", "condition"), [(torch.float64, 1e5), (torch.float32, 1e2)])
def test_inverse_sqrt(dtype: torch.dtype, condition: float) -> None:
    x = of_condition(40, 20, condition) * 1e3
    values, vectors = torch.linalg.eigh(x.T @ x)
    expected = (vectors * values.rsqrt()) @ vectors.T
    actual = inverse_sqrt((x.T @ x).to(dtype)).double()
    tolerance = 10 * torch.finfo(dtype).eps * condition**2
    assert (actual - expected).norm() / expected.norm() < tolerance


def test_inverse_sqrt_of_zero_is_finite() -> None:
    a = torch.zeros(3, 3, dtype=torch.float64)
    assert inverse_sqrt(a).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_comes_out_as_nan(method: str) -> None:
    x = features(12, 5)
    x[0, 0] = float("nan")
    assert normalize(x, method).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method: str, dtype: torch.dtype) -> None:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = normalize(x.float(), method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = normalize(x, method)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert normalize(x.double(), method).dtype == torch.float64


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_compiles_to_one_graph(shape: tuple[int, int]) -> None:
    x = features(*shape, dtype=torch.float32)
    for method in METHODS:
        module = Normalization(method)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x))
            torch.testing.assert_close(gradient(compiled, x), gradient(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("method", METHODS)
def test_does_not_wait_for_the_device(method: str, shape: tuple[int, int]) -> None:
    x = features(*shape, dtype=torch.float32).cuda().requires_grad_()
    normalize(x, method).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalize(x, method).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_module_is_the_function() -> None:
    x = features(*TALL)
    module = Normalization("layer_norm", eps=0.5)
    assert torch.equal(module(x), normalize(x, "layer_norm", 0.5))
    assert repr(module) == "Normalization('layer_norm', eps=0.5, synchronize=True)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: normalize(torch.ones(2, 2), "whitening"),
            "no normalization 'whitening' .did you mean 'whiten'",
        ),
        (lambda: Normalization("layernorm"), "did you mean 'layer_norm'"),
        (lambda: normalize(torch.ones(2, 3, 4), "l2"), r"\(N, C\), got torch.float32 of shape \(2, 3, 4\)"),
        (lambda: normalize(torch.ones(2, 3, dtype=torch.int64), "l2"), "got torch.int64"),
        (lambda: Normalization("standardize", eps=-1.0), r"eps must lie in \[0, inf\), got -1"),
        (lambda: Normalization("whiten", eps=1.0), r"eps must lie in \[0, 1\), got 1"),
        (lambda: Normalization("l2", eps="1e-5"), "write 1.0e-5"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
