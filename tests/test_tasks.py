"""Classification: exact counts, also over processes that hold parts of different sizes."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processes_helper import work_together
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from vkd_plugin.engine.loaders import build_loader
from vkd_plugin.errors import UserError
from vkd_plugin.tasks import Classification

CPU = torch.device("cpu")


def problem(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, classes) that stand for images, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
def test_every_sample_counts_once(n, classes, batch_size, seed):
    logits, targets = problem(n, classes, seed)
    loader = DataLoader(TensorDataset(logits, targets), batch_size)
    figures = Classification().evaluate(nn.Identity(), loader, CPU)
    rank_of_target = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert figures["top1"] == pytest.approx(100 * (rank_of_target < 1).double().mean().item())
    assert figures["top5"] == pytest.approx(100 * (rank_of_target < 5).double().mean().item())
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5, abs=1e-6)


def test_fewer_than_five_classes():
    loader = DataLoader(TensorDataset(*problem(20, 3)), 7)
    assert Classification().evaluate(nn.Identity(), loader, CPU)["top5"] == 100


class TwoHeads(nn.Module):
    def forward(self, x):
        return x + 1, x.roll(1, dims=1) - 1


def test_heads_are_averaged():
    logits, targets = problem(30, 6)
    loader = DataLoader(TensorDataset(logits, targets), 8)
    mean = DataLoader(TensorDataset((logits + logits.roll(1, dims=1)) / 2, targets), 8)
    task = Classification()
    heads, one = task.evaluate(TwoHeads(), loader, CPU), task.evaluate(nn.Identity(), mean, CPU)
    assert heads == pytest.approx(one, rel=1e-5)


def test_each_module_keeps_its_mode():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))
    model[1].eval()
    seen: list[bool] = []
    model[0].register_forward_hook(lambda module, _args, _output: seen.append(module.training))
    Classification().evaluate(model, DataLoader(TensorDataset(*problem(4, 4)), 4), CPU)
    assert seen == [False]
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.Unflatten(1, (2, 2)), r"got shape \(4, 2, 2\)"), (lambda x: {"x": x}, "got dict")],
)
def test_outputs_must_be_logits(model, message):
    if not isinstance(model, nn.Module):
        function, model = model, nn.Module()
        model.forward = function
    with pytest.raises(UserError, match=f"a classifier must return logits .*{message}"):
        Classification().evaluate(model, DataLoader(TensorDataset(*problem(4, 4)), 4), CPU)
    assert model.training


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="the data set is empty"):
        Classification().evaluate(nn.Identity(), [], CPU)


def test_unpack():
    task = Classification()
    samples, targets = torch.zeros(2, 1), torch.zeros(2)
    assert task.unpack((samples, targets), CPU) == (samples, targets, {})
    assert task.unpack([samples, targets, {"pos_idx": 1}], CPU)[2] == {"pos_idx": 1}


def evaluate_a_part(rank: int, world_size: int, port: int, n: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        dataset = TensorDataset(*problem(n, 10))
        config = {"kwargs": {"batch_size": 3}}
        loader = build_loader(dataset, config, train=False, seed=0, rank=rank, world_size=world_size)
        # BatchNorm has buffers, which DistributedDataParallel exchanges whenever its own forward is called.
        model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 10)))
        with torch.no_grad():
            model.module[1].weight.copy_(torch.eye(10))
            model.module[1].bias.zero_()
        result = {"batches": len(loader), "figures": Classification().evaluate(model, loader, CPU)}
        (folder / f"{rank}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


def test_two_processes_count_exactly(tmp_path):
    n = 13
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work_together(evaluate_a_part, (2, port, n, tmp_path), 2)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["batches"] for part in parts] == [3, 2]  # the ranks do not even agree on their number
    logits, targets = problem(n, 10)
    alone = Classification().evaluate(nn.Identity(), DataLoader(TensorDataset(logits, targets), 5), CPU)
    for part in parts:
        assert part["figures"] == pytest.approx(alone, rel=1e-4)
        assert part["figures"]["top1"] == alone["top1"]
