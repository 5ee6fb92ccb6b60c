"""An exponential moving average of the student's weights, evaluated beside the student."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class StudentEMA:
    """Average of the student after each optimizer step: w_ema = decay * w_ema + (1 - decay) * w.

    It begins with the student's own weights. Floating point buffers (BatchNorm statistics) are averaged like weights;
    whole numbers (counters, indices) are the student's.

    Args:
        student: the bare student; it is copied, on its own device.
        decay: 0 <= decay < 1; 1 would never take anything in.

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay:g}")
        self.decay = decay
        self.averaged = AveragedModel(student, device=next(student.parameters()).device)  # its counter too
        self.averaged.eval()

    @property
    def model(self) -> nn.Module:
        """The averaged student."""
        return self.averaged.module

    @torch.no_grad()
    def update(self, student: nn.Module, left_out: Tensor | None = None) -> None:
        """Takes in the student as it is after a step; nothing is waited for.

        Args:
            student: the bare student.
            left_out: a truth value on the device: the step was not made, and the average stays what it was.
        """
        # Not AveragedModel's own update. It averages whole numbers too, and rounds down: an index of 29 becomes 28.
        # And it reads or copies its counter at each step, for which a GPU has to be waited for.
        averages, values = ([*model.parameters(), *model.buffers()] for model in (self.model, student))
        if left_out is not None:
            values = [torch.where(left_out, old, new) for old, new in zip(averages, values, strict=True)]
        broken: tuple[list[Tensor], list[Tensor]] = [], []
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point() or average.is_complex():
                broken[0].append(average)
                broken[1].append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(*broken, 1 - self.decay)
        self.averaged.n_averaged += 1 if left_out is None else ~left_out
