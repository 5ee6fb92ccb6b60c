"""Two processes with half of the rows each give the loss and the gradients of one process with all rows.

The processes run once, over gloo, through DistributedDataParallel, and write what they got to files, which
the tests compare with this process.
"""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes_helper import work_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vkd_plugin.distributed import all_reduce_sum, gather_rows, row_counts
from vkd_plugin.losses import FeaturePair, VkDLoss
from vkd_plugin.normalization import normalize

WORLD = 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SHAPES = {"more rows than channels": (24, 5), "more channels than rows": (6, 9)}
# Rows of rank 0; the other rank has the rest.
SPLITS = {"equal": 0.5, "unequal": 0.75, "one rank almost empty": 0.95}
CASES = [
    (method, shape, split, dtype)
    for method in ("standardize", "whiten", "layer_norm")
    for shape in SHAPES
    for split in SPLITS
    for dtype in TOLERANCE
]


def rand(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model_and_rows(shape: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A student, its inputs and the teacher's features, far from zero mean."""
    n, c = SHAPES[shape]
    model = nn.Linear(4, c).to(dtype)
    with torch.no_grad():
        model.weight.copy_(rand(c, 4, seed=0, dtype=dtype))
        model.bias.copy_(rand(c, seed=1, dtype=dtype))
    # Without the cubes a linear student of 4 inputs would have features of rank 4 only.
    student = nn.Sequential(model, Cube())
    return student, rand(n, 4, seed=2, dtype=dtype), 3 + rand(n, c, seed=3, dtype=dtype)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x**3


def result(model: nn.Module, loss: Tensor) -> dict[str, Any]:
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": [p.grad.clone() for p in model.parameters() if p.grad is not None],
    }


def own_rows(n: int, split: str, rank: int) -> slice:
    first = min(round(n * SPLITS[split]), n - 1)
    return slice(0, first) if rank == 0 else slice(first, n)


def train_step(rank: int, method: str, shape: str, split: str, dtype: torch.dtype) -> dict[str, Any]:
    """One forward and backward of a rank.

    A rank's loss is the mean over its own rows, so each is weighted with its share of the rows: what is
    compared is the statistics, not the average of unequal means.
    """
    model, inputs, teacher = model_and_rows(shape, dtype)
    rows = own_rows(len(inputs), split, rank)
    model = DistributedDataParallel(model)
    loss = VkDLoss(method, normalize_student=True)(model(inputs[rows]), teacher[rows])
    share = WORLD * (rows.stop - rows.start) / len(inputs)
    return result(model, share * loss)


PADDING = torch.arange(24).reshape(2, 3, 4) % torch.tensor([[[5]], [[2]]]) == 0  # an image for each rank


def masked_step(images: slice) -> dict[str, Any]:
    """A step on the rows that are no padding; see :func:`train_step` for the weight of its loss."""
    model, _, _ = model_and_rows("more rows than channels", torch.float64)
    inputs, teacher = rand(2, 12, 4, seed=4, dtype=torch.float64), 3 + rand(2, 5, 3, 4, seed=5, dtype=torch.float64)
    own = PADDING[images]
    share = int((~own).sum()) / int((~PADDING).sum())
    if dist.is_initialized():
        model, share = DistributedDataParallel(model), WORLD * share
    pair = FeaturePair(
        VkDLoss("standardize", normalize_student=True),
        {"module": "features"},
        {"module": "map", "readout": "every_location"},
        {"module": "padding"},
    )
    rows = model(inputs[images].flatten(0, 1))
    hooked = {"features": {"output": rows}, "padding": {"output": own}}
    return result(model, share * pair(hooked, {"map": {"output": teacher[images]}}))


def collectives(rank: int) -> dict[str, Any]:
    x = torch.full((rank + 1, 2), rank + 1.0, dtype=torch.float64, requires_grad=True)
    counts = row_counts(x)
    rows, own = gather_rows(x, counts)
    # Each rank's loss weighs the rows of all ranks, and each differently.
    (rows.T @ torch.arange(1.0, 4.0, dtype=torch.float64) * (rank + 1)).sum().backward()
    y = torch.tensor(rank + 2.0, requires_grad=True)
    total = all_reduce_sum(y)
    (total**2 * (rank + 1)).backward()
    return {
        "counts": counts,
        "rows": rows.detach(),
        "own": own,
        "grad": x.grad,
        "y": (total.detach(), y.grad),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[Any, Any] = {case: train_step(rank, *case) for case in CASES}
    results["collectives"] = collectives(rank)
    results["masked"] = masked_step(slice(rank, rank + 1))
    x = rand(8, 3, seed=rank, dtype=torch.float64)
    results["local"] = {m: normalize(x, m, synchronize=False) for m in ("standardize", "whiten")}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    work_together(worker, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize(("method", "shape", "split", "dtype"), CASES)
def test_two_processes_equal_one(
    ranks: list[dict[Any, Any]], method: str, shape: str, split: str, dtype: torch.dtype
) -> None:
    model, inputs, teacher = model_and_rows(shape, dtype)
    expected = result(model, VkDLoss(method, normalize_student=True)(model(inputs), teacher))
    results = [rank[method, shape, split, dtype] for rank in ranks]
    tolerance = TOLERANCE[dtype]
    loss = torch.stack([r["loss"] for r in results]).mean()
    torch.testing.assert_close(loss, expected["loss"], rtol=tolerance, atol=tolerance)
    assert len(expected["gradients"]) == 2
    for r in results:
        for actual, gradient in zip(r["gradients"], expected["gradients"], strict=True):
            torch.testing.assert_close(actual, gradient, rtol=tolerance, atol=tolerance)


def test_two_processes_that_leave_out_different_numbers_of_rows_equal_one(ranks: list[dict[Any, Any]]) -> None:
    assert (~PADDING).flatten(1).sum(dim=1).tolist() == [9, 6]
    expected, results = masked_step(slice(0, 2)), [rank["masked"] for rank in ranks]
    loss = torch.stack([r["loss"] for r in results]).mean()
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-10, atol=1e-10)
    for r in results:
        torch.testing.assert_close(r["gradients"], expected["gradients"], rtol=1e-10, atol=1e-10)


def test_statistics_of_one_process_would_differ() -> None:
    """So that the comparison above means something."""
    model, inputs, teacher = model_and_rows("more rows than channels", torch.float64)
    student = model(inputs)
    for method in ("standardize", "whiten"):
        loss = VkDLoss(method, normalize_student=True)
        halves = [loss(z, t) for z, t in zip(student.chunk(2), teacher.chunk(2), strict=True)]
        assert (sum(halves) / 2 - loss(student, teacher)).abs() > 1e-3


@pytest.mark.parametrize("method", ["standardize", "whiten"])
def test_synchronize_false_keeps_statistics_local(ranks: list[dict[Any, Any]], method: str) -> None:
    for rank in range(WORLD):
        expected = normalize(rand(8, 3, seed=rank, dtype=torch.float64), method)
        torch.testing.assert_close(ranks[rank]["local"][method], expected, rtol=1e-12, atol=1e-12)


def test_collectives_sum_values_and_gradients(ranks: list[dict[Any, Any]]) -> None:
    for rank, expected_own in enumerate((slice(0, 1), slice(1, 3))):
        r = ranks[rank]["collectives"]
        assert r["counts"] == [1, 2]
        assert r["own"] == expected_own
        assert r["rows"].tolist() == [[1, 1], [2, 2], [2, 2]]
        # d/dx of (1 + 2) times the weight 1, 2 or 3 of the row.
        weights = torch.tensor([[3.0], [6.0], [9.0]], dtype=torch.float64)
        assert torch.equal(r["grad"], weights[expected_own].expand(-1, 2))
        total, grad = r["y"]
        assert total == 5
        assert grad == 2 * 5 * (1 + 2)
