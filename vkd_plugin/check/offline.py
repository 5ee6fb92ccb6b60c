"""Building models without the network: pretrained weights that would be downloaded are left out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import timm.models._builder
import torch
import torchvision.models._api
from torch import nn

from ..models.weights import NotDownloaded


@contextmanager
def offline() -> Iterator[None]:
    """Within it, torchvision's, timm's and the hub's pretrained weights leave a model as it was initialised."""
    load = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
        return None if isinstance(state, NotDownloaded) else load(self, state, *args, **kwargs)

    def nothing(*args: Any, **kwargs: Any) -> NotDownloaded:
        return NotDownloaded()

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "load_state_dict", load_state_dict))
        stack.enter_context(patch.object(torch.hub, "load_state_dict_from_url", nothing))
        stack.enter_context(patch.object(torchvision.models._api.WeightsEnum, "get_state_dict", nothing))
        stack.enter_context(patch.object(timm.models._builder, "load_pretrained", nothing))
        yield
