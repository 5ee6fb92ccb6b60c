"""Mixed precision: autocast for the forward pass, a gradient scaler where float16 needs one."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..arguments import one_of

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """What ``train.amp`` and ``train.teacher_amp`` ask for.

    Args:
        amp: ``{dtype: 'bfloat16' | 'float16'}``, or None for full precision.
        device: where training runs.
        teacher: the same for the teacher alone; None leaves it to ``amp``.

    Raises:
        ValueError: another dtype.

    Attributes:
        dtype, teacher_dtype: the autocast dtypes, None in full precision and where nothing is said of the teacher.
        scaler: scales the loss so that small float16 gradients do not underflow; disabled (and free) otherwise.
    """

    def __init__(
        self, amp: Mapping[str, Any] | None, device: torch.device, teacher: Mapping[str, Any] | None = None
    ) -> None:
        self.device = device
        self.dtype = _dtype(amp)
        self.teacher_dtype = _dtype(teacher)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes (losses of the plugin leave it where they need float32)."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def autocast_teacher(self) -> AbstractContextManager[Any]:
        """Context for the teacher's forward pass, within the other."""
        if self.teacher_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.teacher_dtype)

    def from_teacher(self, value: Any) -> Any:
        """What the teacher put out, for losses that know nothing of its precision: in float32 where it is its own."""
        if self.teacher_dtype is None:
            return value
        if isinstance(value, Tensor):
            return value.float() if value.dtype is self.teacher_dtype else value
        if isinstance(value, dict):
            return {key: self.from_teacher(item) for key, item in value.items()}
        return type(value)(map(self.from_teacher, value)) if type(value) in (list, tuple) else value


def _dtype(amp: Mapping[str, Any] | None) -> torch.dtype | None:
    return _DTYPES[one_of("amp dtype", amp.get("dtype", "bfloat16"), _DTYPES)] if amp else None
