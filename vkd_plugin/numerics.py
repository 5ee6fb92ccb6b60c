"""The precision that a loss is computed in, whatever precision the models run in."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast is off on the device of ``x``."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is narrower (float16, bfloat16), else unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
