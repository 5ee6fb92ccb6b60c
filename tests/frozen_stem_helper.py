"""For an experiment's ``dependencies``: the recipe's student, the statistics of its BatchNorm fixed."""

from typing import Any

import timm
from torch import nn
from torchdistill.models.registry import register_model
from torchvision.ops import FrozenBatchNorm2d

import vkd_plugin  # noqa: F401 - makes timm know the student


@register_model
def deit_with_frozen_stem(**kwargs: Any) -> nn.Module:
    """``deit_tiny_distilled_conv_patch16_224`` in which no image's output depends on the others of its batch."""
    model = timm.create_model("deit_tiny_distilled_conv_patch16_224", **kwargs)
    stem = model.conv_embed.conv
    for place, layer in enumerate(stem):
        if isinstance(layer, nn.BatchNorm2d):
            stem[place] = FrozenBatchNorm2d(layer.num_features)
    return model
