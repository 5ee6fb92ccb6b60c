"""Learning rates by step, registered with torchdistill."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchdistill.optim.registry import register_scheduler

from .arguments import number


@register_scheduler
class WarmupCosineLR(LambdaLR):
    """A linear warm-up, then half a cosine down to a floor.

    In YAML, a step of it after each batch::

        scheduler:
          key: 'WarmupCosineLR'
          kwargs: {total_steps: 750600, min_lr: 5.0e-6}
          scheduling_step: 1

    At step k, with the group's own learning rate ``lr``: ``lr (k + 1) / (warmup_steps + 1)`` during the warm-up; after
    it ``min_lr + (lr - min_lr) (1 + cos(pi p)) / 2`` with p = (k - warmup_steps) / (total_steps - warmup_steps), from 0
    to 1, and ``min_lr`` beyond. Unlike ``CosineAnnealingLR`` it does not rise again.

    Args:
        optimizer: torchdistill passes it.
        total_steps: number of steps in all, those of the warm-up included.
        min_lr: the floor, for every group.
        warmup_steps: number of steps in which the learning rate rises.
        delay: so many steps the course lags behind. The reference's trainer updates its learning rate after a step,
            with the number of the step just done: the first two steps have the same (``delay: 1``).

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, min_lr: float = 0.0, warmup_steps: int = 0, delay: int = 0
    ) -> None:
        total, floor = int(number("total_steps", total_steps, at_least=1)), number("min_lr", min_lr)
        warmup, lag = int(number("warmup_steps", warmup_steps, below=total)), int(number("delay", delay))

        def factor(lr: float) -> Any:
            def at(step: int) -> float:
                done = max(step - lag, 0)
                if done < warmup:
                    return (done + 1) / (warmup + 1)
                part = min((done - warmup) / (total - warmup), 1.0)
                return (floor + (lr - floor) * (1 + math.cos(math.pi * part)) / 2) / lr if lr else 1.0

            return at

        super().__init__(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])
