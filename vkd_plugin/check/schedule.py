"""The course of the learning rate, and what an optimizer keeps, found out without training."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler
from torchdistill.optim.registry import get_optimizer

POINTS = 40
"""Of a curve."""
_STEPPED = 20_000
"""So many steps are simply taken; a longer course is looked at here and there."""


def schedule_problem(scheduler: Any, steps: int) -> str | None:
    """What is wrong with a scheduler that is to make ``steps`` steps; None if nothing is known to be."""
    total = getattr(scheduler, "total_steps", None)
    if isinstance(scheduler, lr_scheduler.OneCycleLR) and isinstance(total, int) and total < steps:
        return f"OneCycleLR ends after {total} steps (total_steps), training makes {steps}"
    return None


def learning_rates(scheduler: Any, steps: int) -> list[float] | None:
    """The first group's learning rate at up to POINTS equal distances; None where it depends on the training.

    Args:
        scheduler: a fresh one; it is used up.
        steps: how many it makes.
    """
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) or steps < 1:
        return None
    at = sorted({round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer step was made before
        if steps > _STEPPED:
            return _looked_up(scheduler, at)
        rates = [float(scheduler.get_last_lr()[0])]
        for _ in range(steps - 1):
            scheduler.step()
            rates.append(float(scheduler.get_last_lr()[0]))
    return [rates[i] for i in at]


def _looked_up(scheduler: Any, at: list[int]) -> list[float] | None:
    """By the scheduler's closed form, or its rule where that depends on the step alone."""
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    if closed is None and not isinstance(scheduler, lr_scheduler.LambdaLR | lr_scheduler.OneCycleLR):
        return None
    rates = []
    for step in at:
        scheduler.last_epoch = step
        rates.append(float((closed or scheduler.get_lr)()[0]))
    return rates


def optimizer_state_factor(config: Mapping[str, Any]) -> float:
    """Numbers that an optimizer keeps for each number that it trains, found by a step on a few of them."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones(64, 64)
    kwargs = {name: value for name, value in (config.get("kwargs") or {}).items() if name != "weight_decay_of"}
    optimizer = get_optimizer(torch.nn.ParameterList([parameter]), config["key"], **kwargs)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return float(sum(value.numel() for value in kept if value.numel() > 1) / parameter.numel())
