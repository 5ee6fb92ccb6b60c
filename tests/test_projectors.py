"""The projectors as modules: what training, casting, saving and copying do to them."""

import copy
import io
import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from processes_helper import work_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torchdistill.optim.registry import get_optimizer

from vkd_plugin.projectors import PROJECTORS, LinearProjector, MLPProjector, OrthogonalProjector, build_projector
from vkd_plugin.stiefel import BASE_MAPS, ORTHOGONAL_MAPS, orthogonalize

SIZES = ((6, 20), (6, 9), (7, 7), (9, 4), (5, 1), (1, 5))  # in, out
every_map = pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(size: tuple[int, int], seed: int = 1) -> Tensor:
    """Orthonormal, with determinant -1 where square: out of reach of a rotation."""
    q = orthogonalize(draw(size[1], size[0], seed=seed), "polar")
    if size[0] == size[1] and torch.linalg.det(q) > 0:
        q = q[torch.tensor([1, 0, *range(2, len(q))])]
    return q


def build(size: tuple[int, int], orthogonal_map: str, seed: int = 0, **kwargs: object) -> OrthogonalProjector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OrthogonalProjector(*size, orthogonal_map=orthogonal_map, **kwargs)


def train_step(projector: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, scaler: object = None) -> Tensor:
    """One step of a regression; the gradient that reached the input."""
    x = x.clone().requires_grad_()
    optimizer.zero_grad()
    y = projector(x)
    loss = (y - draw(*y.shape, seed=9)).square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return x.grad


# The function


@every_map
@every_size
def test_projects_the_last_dimension(orthogonal_map: str, size: tuple[int, int]) -> None:
    projector = build(size, orthogonal_map)
    x = draw(2, 3, size[0])
    y = projector(x)
    assert y.shape == (2, 3, size[1])
    assert torch.allclose(y, x @ projector.weight.T, atol=1e-6)
    assert projector.weight.shape == (size[1], size[0])
    if size[1] >= size[0]:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        assert torch.allclose(y @ y.T, x @ x.T, atol=1e-4)


@every_map
@every_size
def test_starts_random_and_orthonormal(orthogonal_map: str, size: tuple[int, int]) -> None:
    projector, same, other = (build(size, orthogonal_map, seed=s) for s in (0, 0, 1))
    assert projector.orthogonality_error() <= 1e-6
    assert torch.equal(projector.weight, same.weight)
    if max(size) > 1 and min(size) > 1:
        assert not torch.allclose(projector.weight, other.weight, atol=0.1)
    assert projector.base is None
    assert list(projector.state_dict()) == ["raw_weight"]


@every_map
def test_start_has_no_preferred_direction(orthogonal_map: str) -> None:
    """A uniform column space: the mean of P P^T over draws is k / n times the identity."""
    n, k, draws = 9, 3, 100
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = OrthogonalProjector(k, n, orthogonal_map)
        mean = torch.zeros(n, n)
        for _ in range(draws):
            projector.reset_parameters()
            p = projector.weight.detach()
            mean += p @ p.T / draws
    # An entry of P P^T lies in [-1/2, 1] and has a standard deviation below 0.25.
    assert (mean - k / n * torch.eye(n)).abs().max() < 5 * 0.25 / draws**0.5


def test_orthogonality_error_is_measured() -> None:
    projector = build((4, 8), "polar")
    error = projector.orthogonality_error()
    assert error.shape == ()
    assert not error.requires_grad
    projector.forward(draw(2, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrthogonalProjector, "weight", torch.ones(8, 4))
        assert projector.orthogonality_error() == 8


def test_bias_starts_at_zero_and_learns() -> None:
    projector = build((4, 8), "polar", bias=True)
    assert torch.equal(projector.bias, torch.zeros(8))
    projector(draw(2, 4)).sum().backward()
    assert torch.equal(projector.bias.grad, torch.full((8,), 2.0))
    assert "bias=True" in repr(projector)


# Assignment


@every_map
@every_size
def test_assigned_weight_is_kept_and_trained_from(orthogonal_map: str, size: tuple[int, int]) -> None:
    projector, weight = build(size, orthogonal_map), random_weight(size)
    raw = projector.raw_weight
    projector.weight = weight
    assert projector.raw_weight is raw  # an optimiser that holds it stays valid
    assert torch.allclose(projector.weight, weight, rtol=0, atol=1e-6)

    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    for _ in range(3):
        train_step(projector, optimizer, draw(16, size[0]))
    assert projector.orthogonality_error() <= 1e-5
    if min(size) > 1:
        moved = (projector.weight - weight).abs().max()
        assert 1e-5 < moved < 0.5


@every_map
def test_assignment_takes_a_parameter_and_float64(orthogonal_map: str) -> None:
    projector = build((3, 7), orthogonal_map, dtype=torch.float64)
    weight = orthogonalize(draw(7, 3).double(), "polar")
    projector.weight = nn.Parameter(weight)
    assert torch.allclose(projector.weight, weight, rtol=0, atol=1e-14)
    assert [name for name, _ in projector.named_parameters()] == ["raw_weight"]


@every_map
def test_basis_vectors_can_be_assigned(orthogonal_map: str) -> None:
    """LAPACK leaves the reflectors of such columns out."""
    projector = build((4, 6), orthogonal_map)
    for weight in (torch.eye(6, 4), -torch.eye(6, 4), torch.eye(6)[:, [2, 0, 5, 3]]):
        projector.weight = weight
        assert torch.allclose(projector.weight, weight, rtol=0, atol=1e-6)


def test_only_orthonormal_weights_of_the_right_shape_are_assigned() -> None:
    projector = build((3, 7), "matrix_exp")
    before = projector.weight
    with pytest.raises(ValueError, match=r"shape \(7, 3\) \(out_features, in_features\), got \(3, 7\)"):
        projector.weight = torch.eye(3, 7)
    for wrong in (2 * torch.eye(7, 3), torch.full((7, 3), torch.nan)):
        with pytest.raises(ValueError, match="orthonormal columns"):
            projector.weight = wrong
    with pytest.raises(ValueError, match="orthonormal rows"):
        build((7, 3), "matrix_exp").weight = torch.ones(3, 7)
    assert torch.equal(projector.weight, before)


# Training


def optimizers() -> dict[str, object]:
    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.05),
        "adamw, strong decay": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=5.0),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    }


@every_map
@pytest.mark.parametrize("optimizer", optimizers())
@pytest.mark.parametrize("size", [(6, 20), (7, 7), (9, 4)], ids=str)
def test_lives_through_weight_decay(orthogonal_map: str, optimizer: str, size: tuple[int, int]) -> None:
    projector = build(size, orthogonal_map)
    optim = optimizers()[optimizer](projector.parameters())
    for _ in range(10):
        grad = train_step(projector, optim, draw(32, size[0]))
        assert grad.norm() > 1e-3
        assert projector.orthogonality_error() <= 1e-5


@every_map
def test_lives_through_float16_and_a_gradient_scaler(orthogonal_map: str) -> None:
    projector = build((6, 20), orthogonal_map)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = projector.raw_weight.detach().clone()
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.float16):
            grad = train_step(projector, optimizer, draw(32, 6), scaler)
        assert grad.isfinite().all()
        assert grad.norm() > 0
        assert projector.orthogonality_error() <= 1e-5
    assert not torch.equal(projector.raw_weight, start)


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_one_step_of_decay_kills_torchs_default_map_but_not_ours(ours: bool) -> None:
    """The defect that silenced the feature loss of the published ImageNet code."""
    if ours:
        projector = build((32, 192), "householder")
        projector.weight = torch.eye(192, 32)
    else:
        projector = parametrizations.orthogonal(nn.Linear(32, 192, bias=False))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-4, weight_decay=0.05)
    x = draw(16, 32)
    assert train_step(projector, optimizer, x).norm() > 0
    after = train_step(projector, optimizer, x).norm()
    if ours:
        assert after > 0
        assert projector.orthogonality_error() <= 1e-5
    else:
        assert after == 0
        assert not projector.weight.any()


@every_map
def test_learns_a_rotation(orthogonal_map: str) -> None:
    projector, target = build((4, 10), orthogonal_map), random_weight((4, 10), seed=3)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.1)
    x = draw(64, 4)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (projector(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_is_marked_to_be_left_out_of_decay() -> None:
    projector = build((3, 7), "matrix_exp")
    projector.weight = random_weight((3, 7))
    buffer = io.BytesIO()
    torch.save(projector, buffer)
    buffer.seek(0)
    assigned = build((3, 7), "matrix_exp")
    assigned.load_state_dict(projector.state_dict(), assign=True)
    for p in (projector, copy.deepcopy(projector), torch.load(buffer, weights_only=False), projector.half(), assigned):
        assert p.raw_weight._no_weight_decay is True
        assert p.no_weight_decay() == {"raw_weight"}


# Precision


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("assigned", [False, True])
def test_half_precision(orthogonal_map: str, dtype: torch.dtype, assigned: bool) -> None:
    projector, x = build((6, 20), orthogonal_map), draw(5, 6)
    if assigned:
        projector.weight = random_weight((6, 20))
    expected = projector(x)
    with torch.autocast("cpu", dtype=dtype):
        assert projector.weight.dtype == torch.float32
        y = projector(x)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), expected, atol=0.05)

    y = projector(x.to(dtype))  # a half-precision feature without autocast
    assert y.dtype == dtype

    projector.to(dtype)
    assert projector(x.to(dtype)).dtype == dtype
    assert projector.orthogonality_error() <= 1e-5
    assert torch.allclose(projector.weight, build_weight_like(projector), atol=0)
    if assigned:
        assert projector.base is None or projector.base.dtype == torch.float32
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    assert train_step(projector, optimizer, x.to(dtype)).isfinite().all()
    assert projector.orthogonality_error() <= 1e-5


def build_weight_like(projector: OrthogonalProjector) -> Tensor:
    return orthogonalize(projector.raw_weight.float(), projector.orthogonal_map, base=projector.base)


@pytest.mark.parametrize("orthogonal_map", BASE_MAPS)
def test_a_float32_base_serves_float64(orthogonal_map: str) -> None:
    projector = build((6, 20), orthogonal_map)
    projector.weight = random_weight((6, 20))
    assert projector.double().orthogonality_error() <= 1e-12


# Copies, checkpoints, compilation, processes


@every_map
@pytest.mark.parametrize("saved_assigned", [False, True])
@pytest.mark.parametrize("into_assigned", [False, True])
def test_state_dict_round_trip(orthogonal_map: str, saved_assigned: bool, into_assigned: bool) -> None:
    saved, fresh = build((6, 20), orthogonal_map), build((6, 20), orthogonal_map, seed=1)
    if saved_assigned:
        saved.weight = random_weight((6, 20))
    if into_assigned:
        fresh.weight = random_weight((6, 20), seed=2)
    parent = nn.Sequential(fresh)
    parent.load_state_dict(nn.Sequential(saved).state_dict(), strict=True)
    assert torch.equal(fresh.weight, saved.weight)
    parent.load_state_dict({}, strict=False)
    assert torch.equal(fresh.weight, saved.weight)


@every_map
def test_copies_are_equal_and_independent(orthogonal_map: str) -> None:
    projector = build((6, 20), orthogonal_map)
    projector.weight = random_weight((6, 20))
    twin = copy.deepcopy(projector)
    weight = projector.weight.detach()
    assert torch.equal(twin.weight, weight)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    train_step(twin, optimizer, draw(16, 6))
    assert torch.equal(projector.weight, weight)


@every_map
def test_compiled_training_steps_share_one_graph(orthogonal_map: str) -> None:
    projector = build((4, 9), orthogonal_map)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2, weight_decay=0.05)
    for step in range(4):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            assert train_step(compiled, optimizer, draw(8, 4)).norm() > 0
        assert projector.orthogonality_error() <= 1e-5


def _data_parallel(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    gradients = {}
    for orthogonal_map in ORTHOGONAL_MAPS:
        model = DistributedDataParallel(build((6, 20), orthogonal_map, seed=rank))  # rank 0's weights count
        model(draw(8, 6)[rank::2]).square()[:, 0].mean().backward()
        gradients[orthogonal_map] = model.module.raw_weight.grad
    torch.save(gradients, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_data_parallel_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    work_together(_data_parallel, (port, str(tmp_path)), 2)
    gradients = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for orthogonal_map in ORTHOGONAL_MAPS:
        projector = build((6, 20), orthogonal_map)
        projector(draw(8, 6)).square()[:, 0].mean().backward()
        for gradient in gradients:
            assert torch.allclose(gradient[orthogonal_map], projector.raw_weight.grad, atol=1e-5)


# The baselines and the registry


def test_baselines() -> None:
    x = draw(2, 3, 4)
    linear = LinearProjector(4, 9)
    assert linear.bias is None
    assert linear(x).shape == (2, 3, 9)
    mlp = MLPProjector(4, 9, hidden_features=5, depth=3)
    assert [tuple(m.weight.shape) for m in mlp if isinstance(m, nn.Linear)] == [(5, 4), (5, 5), (9, 5)]
    assert mlp(x).shape == (2, 3, 9)
    assert [type(m) for m in MLPProjector(4, 9, depth=1, bias=False)] == [nn.Linear]
    with pytest.raises(ValueError, match="at least one layer"):
        MLPProjector(4, 9, depth=0)


def test_build_projector_builds_and_names_the_nearest() -> None:
    assert isinstance(build_projector("MLPProjector", 4, 9, depth=1), MLPProjector)
    projector = build_projector("OrthogonalProjector", 4, 9, orthogonal_map="cayley")
    assert isinstance(projector, OrthogonalProjector)
    with pytest.raises(ValueError, match="did you mean 'OrthogonalProjector'"):
        build_projector("OrthogonalProjektor", 4, 9)
    with pytest.raises(ValueError, match="did you mean 'orthogonal_map'"):
        build_projector("OrthogonalProjector", 4, 9, ortogonal_map="cayley")
    with pytest.raises(ValueError, match="did you mean 'cayley'"):
        build_projector("OrthogonalProjector", 4, 9, orthogonal_map="caley")
    with pytest.raises(ValueError, match="sizes of at least 1"):
        build_projector("OrthogonalProjector", 0, 9)


@pytest.mark.parametrize("key", PROJECTORS)
def test_the_yaml_of_the_docstring_builds(key: str) -> None:
    lines = PROJECTORS[key].__doc__.split("YAML::\n")[1]
    kwargs = yaml.safe_load(lines)["projector"]
    assert isinstance(build_projector(kwargs.pop("key"), 4, 9, **kwargs), PROJECTORS[key])


@pytest.mark.parametrize(("decay", "alive"), [(0.05, False), (0.0, True)])
def test_the_released_projector_dies_of_weight_decay(decay: float, alive: bool) -> None:
    """And is the control that it should be only if it does: also where this package exempts its own from decay."""
    torch.manual_seed(0)
    projector = build_projector("ReleasedProjector", 8, 20)
    optimizer = get_optimizer(projector, "AdamW", lr=5e-4, weight_decay=decay, weight_decay_of="matrices")
    x = torch.randn(6, 8)
    y = projector(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    y.square().mean().backward()
    optimizer.step()
    assert bool(projector(x).abs().max() > 0) == alive
