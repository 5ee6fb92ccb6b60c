"""timm's models by name in torchdistill's YAML, and weights from local files."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from ..errors import UserError
from ..suggest import nearest


@register_model
def timm_model(
    name: str, pretrained: bool = False, checkpoint: str | None = None, **kwargs: Any
) -> nn.Module:
    """A model of timm by name.

    In YAML::

        teacher_model:
          key: 'timm_model'
          kwargs: {name: 'regnety_160.deit_in1k', pretrained: True}

    Args:
        name: with the tag of its weights where there are several: the untagged ``regnety_160`` is not the
            teacher of DeiT, which is ``regnety_160.deit_in1k``.
        pretrained: download timm's weights, or take them from its cache.
        checkpoint: a local file instead, see :func:`load_weights`; all its names and shapes must fit.
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
            f"timm_model {name}: no pretrained weights: {_first_line(error)} (without a network, name a "
            "downloaded file as checkpoint)"
        ) from error
    if checkpoint is not None:
        fit_weights(model, load_weights(checkpoint), checkpoint)
    return model


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` file or a torch checkpoint, on the CPU; nothing in it is executed.

    Weights under ``model`` or ``state_dict``, as training scripts save them, are taken from there.

    Raises:
        UserError: no such file, or not one of weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: not a readable checkpoint: {_first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{path}: holds no weights (names and tensors, or these under 'model' or 'state_dict')"
        )
    return dict(loaded)


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads weights that fit a model in every name and shape.

    Args:
        model: what they are for.
        weights: by the model's names.
        source: where they are from, for the message.

    Raises:
        UserError: missing or unknown names, or other shapes; the first of each are listed.
    """
    own = model.state_dict()
    other_shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": other_shapes,
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{source}: does not fit {type(model).__name__}: {'; '.join(found)}")
    model.load_state_dict(weights)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    architecture, _, tag = name.partition(".")
    tags = {known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in tags:
        raise UserError(f"timm has no weights '{tag}' for {architecture}{nearest(tag, tags)}")


def _some(names: list[str], show: int = 3) -> str:
    return ", ".join(islice(names, show)) + (", ..." if len(names) > show else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
