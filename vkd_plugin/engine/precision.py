"""Mixed precision: autocast for the forward pass, a gradient scaler where float16 needs one."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from ..arguments import one_of

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """What ``train.amp`` asks for.

    Args:
        amp: ``{dtype: 'bfloat16' | 'float16'}``, or None for full precision.
        device: where training runs.

    Raises:
        ValueError: another dtype.

    Attributes:
        dtype: the autocast dtype, None in full precision.
        scaler: scales the loss so that small float16 gradients do not underflow; disabled (and free) otherwise.
    """

    def __init__(self, amp: dict[str, Any] | None, device: torch.device) -> None:
        self.device = device
        self.dtype: torch.dtype | None = None
        if amp:
            self.dtype = _DTYPES[one_of("amp dtype", amp.get("dtype", "bfloat16"), _DTYPES)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes (losses of the plugin leave it where they need float32)."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)
