"""The learning rate by step, against the reference's recipe and torch's own cosine."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchdistill.optim.registry import get_scheduler

from vkd_plugin.schedules import WarmupCosineLR


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates], lr=1.0)


def rate_at(scheduler: WarmupCosineLR, step: int) -> float:
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(10, 4.9864e-4), (75, 4.2751e-4), (150, 2.5250e-4), (225, 7.7492e-5), (299, 5.0136e-6)],
)
def test_the_rates_of_the_reference(epoch: int, rate: float) -> None:
    """As its trainer was seen to set them at 2502 batches an epoch, to the digits that were noted."""
    scheduler = WarmupCosineLR(optimizer(5e-4), total_steps=300 * 2502, min_lr=5e-6, delay=1)
    assert float(f"{rate_at(scheduler, epoch * 2502):.4e}") == rate


def test_the_first_two_steps_and_the_last_of_the_reference() -> None:
    scheduler = WarmupCosineLR(optimizer(5e-4), total_steps=300 * 2502, min_lr=5e-6, delay=1)
    assert rate_at(scheduler, 0) == rate_at(scheduler, 1) == 5e-4 > rate_at(scheduler, 2)
    assert rate_at(scheduler, 300 * 2502 - 1) == pytest.approx(5.00000001e-6, rel=1e-8)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_without_warm_up_it_is_torchs_cosine_for_each_group_and_then_flat() -> None:
    ours, theirs = optimizer(0.1, 0.4), optimizer(0.1, 0.4)
    scheduler, reference = WarmupCosineLR(ours, 20, 0.01), CosineAnnealingLR(theirs, 20, 0.01)
    for _ in range(20):
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups], rel=1e-12)
        scheduler.step()
        reference.step()
    for _ in range(5):
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([0.01, 0.01])
        scheduler.step()


def test_the_warm_up_rises_to_the_cosines_top() -> None:
    scheduler = WarmupCosineLR(optimizer(1.0), total_steps=14, warmup_steps=4)
    assert [rate_at(scheduler, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate_at(scheduler, 9) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"total_steps": 0}, "total_steps must lie in"),
        ({"total_steps": 5, "warmup_steps": 5}, "warmup_steps must lie in"),
        ({"total_steps": 5, "min_lr": -1.0}, "min_lr must lie in"),
        ({"total_steps": 5, "delay": -1}, "delay must lie in"),
        ({"total_steps": "1e3"}, "total_steps must be a number"),
    ],
)
def test_numbers_out_of_range(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scheduler(optimizer(0.1), "WarmupCosineLR", **kwargs)
