"""timm's models by name in torchdistill's YAML."""

from typing import Any

import timm
from torch import nn
from torchdistill.models.registry import register_model

from ..errors import UserError
from ..suggest import nearest
from .weights import first_line, fit_weights, load_weights


@register_model
def timm_model(name: str, pretrained: bool = False, checkpoint: str | None = None, **kwargs: Any) -> nn.Module:
    """A model of timm by name.

    In YAML::

        teacher_model:
          key: 'timm_model'
          kwargs: {name: 'regnety_160.deit_in1k', pretrained: True}

    Args:
        name: with the tag of its weights where there are several: the untagged ``regnety_160`` is not the
            teacher of DeiT, which is ``regnety_160.deit_in1k``.
        pretrained: download timm's weights, or take them from its cache.
        checkpoint: a local file instead, see :func:`vkd_plugin.models.weights.load_weights`; all its names and
            shapes must fit.
        kwargs: for the model (``num_classes``, ``img_size``, ``drop_path_rate``, ...).

    Raises:
        UserError: an unknown model or tag, weights that cannot be had, or a checkpoint that does not fit.
    """
    if pretrained and checkpoint is not None:
        raise UserError(f"timm_model {name}: give either pretrained or checkpoint")
    if ":" not in name:  # with a colon timm finds the model elsewhere: hf-hub:..., local-dir:...
        _check_name(name)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"timm_model {name}: no pretrained weights: {first_line(error)} (without a network, name a "
            "downloaded file as checkpoint)"
        ) from error
    if checkpoint is not None:
        fit_weights(model, load_weights(checkpoint), checkpoint)
    return model


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    architecture, _, tag = name.partition(".")
    tags = {known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in tags:
        raise UserError(f"timm has no weights '{tag}' for {architecture}{nearest(tag, tags)}")
