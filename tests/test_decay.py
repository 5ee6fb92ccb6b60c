"""Marked parameters stay out of weight decay, also in torchdistill's default single parameter group."""

import inspect

import pytest
import torch
from torch import nn
from torchdistill.optim.registry import OPTIM_DICT, get_optimizer

import vkd_plugin
from vkd_plugin.decay import without_decay


def _pair() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(3, 3), vkd_plugin.OrthogonalProjector(3, 5)])


def _decay_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    (decay,) = [g["weight_decay"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return decay


@pytest.mark.parametrize("key", ["SGD", "AdamW", "Adam", "RMSprop"])
def test_torchdistills_default_group_leaves_projectors_out(key: str) -> None:
    linear, projector = modules = _pair()
    optimizer = get_optimizer(modules, key, lr=0.1, weight_decay=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == key
    assert _decay_of(optimizer, linear.weight) == 0.5
    assert _decay_of(optimizer, projector.raw_weight) == 0.0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(modules.parameters()))


def test_without_marks_nothing_changes() -> None:
    parameters = list(nn.Linear(3, 3).parameters())
    assert without_decay(iter(parameters)) == parameters
    optimizer = OPTIM_DICT["SGD"](parameters, lr=0.1, weight_decay=0.5)
    assert len(optimizer.param_groups) == 1


def test_an_explicit_decay_of_a_group_is_the_users_wish() -> None:
    linear, projector = _pair()
    groups = [
        {"params": linear.parameters(), "lr": 0.3},
        {"params": list(projector.parameters()), "weight_decay": 0.25},
    ]
    optimizer = OPTIM_DICT["AdamW"](groups, lr=0.1, weight_decay=0.5)
    assert _decay_of(optimizer, linear.weight) == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert _decay_of(optimizer, projector.raw_weight) == 0.25


def test_groups_without_decay_of_their_own_are_split() -> None:
    modules = _pair()
    optimizer = OPTIM_DICT["SGD"]([{"params": modules.parameters(), "lr": 0.3}], lr=0.1, weight_decay=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]
    assert _decay_of(optimizer, modules[1].raw_weight) == 0.0


def test_registered_optimizers_keep_their_signature() -> None:
    assert inspect.signature(OPTIM_DICT["AdamW"]) == inspect.signature(torch.optim.AdamW)


def test_installing_twice_changes_nothing() -> None:
    before = dict(OPTIM_DICT)
    vkd_plugin.host.install()
    assert before == OPTIM_DICT
