"""An exponential moving average of the student's weights, evaluated beside the student."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class StudentEMA:
    """Average of the student after each optimizer step: w_ema = decay * w_ema + (1 - decay) * w.

    Floating point buffers (BatchNorm statistics) are averaged like weights.

    Args:
        student: the bare student; it is copied, on its own device.
        decay: 0 <= decay < 1; 1 would never take anything in.

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay:g}")
        self.averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.averaged.eval()

    @property
    def model(self) -> nn.Module:
        """The averaged student."""
        return self.averaged.module

    def update(self, student: nn.Module, left_out: Tensor | None = None) -> None:
        """Takes in the student as it is after a step.

        Args:
            student: the bare student.
            left_out: a truth value on the device: the step was not made, and the average stays what it was.
        """
        tensors = [*self.averaged.parameters(), *self.averaged.buffers()] if left_out is not None else []
        before = [tensor.clone() for tensor in tensors]
        self.averaged.update_parameters(student)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.data.copy_(torch.where(left_out, old, tensor))  # type: ignore[arg-type]
