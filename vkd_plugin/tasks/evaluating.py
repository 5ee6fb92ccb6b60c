"""A model while it is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients; afterwards it is as it was.

    Past DistributedDataParallel, which would exchange buffers at each forward and wait for a process that has fewer
    batches.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training
