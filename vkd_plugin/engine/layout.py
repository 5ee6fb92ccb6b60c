"""Orders in memory: of models and images, and of what an optimizer keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import local


def channels_last(train: Mapping[str, Any]) -> dict[str, bool]:
    """Of ``student`` and ``teacher``, whether the YAML's ``train`` wants their channels innermost.

    A convolution puts out that order if its weight or what it is given has it. So images are given it where both sides
    want it; where one does, its weights see to it.
    """
    given = train.get("channels_last") or False
    sides = ("student", "teacher")
    return {side: bool(given.get(side)) if isinstance(given, Mapping) else bool(given) for side in sides}


@torch.no_grad()
def lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Puts what was loaded into an optimizer, such as moments, in memory as the weights that it belongs to.

    A checkpoint keeps the order of the run that wrote it. Fused kernels go through memory in whatever order, and would
    take one weight's moments for another's. The orders differ after a change of ``channels_last``; with it, also
    where a sharded run goes on in a single process.

    Args:
        optimizer: with its state, which may be in shards.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if local(value).stride() != local(parameter).stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype)
                local(state[name]).copy_(local(value))
