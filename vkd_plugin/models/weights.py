"""Weights from files, without executing anything that a file holds."""

import argparse
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..seal import broken


def read_checkpoint(source: str | Path, damage: Callable[[Path], str | None] = broken) -> dict[str, Any]:
    """What a ``.safetensors`` file, a torch checkpoint or a URL of one holds, on the CPU.

    torchdistill stores the parsed command line beside the weights, an ``argparse.Namespace``; it is let through.

    Args:
        source: see above.
        damage: what is wrong with a file's bytes, None if nothing is known to be.

    Raises:
        UserError: no such file, unreadable, or no mapping.
    """
    try:
        if is_url(source):
            loaded: Any = torch.hub.load_state_dict_from_url(str(source), map_location="cpu", weights_only=True)
        else:
            path = Path(source).expanduser()
            if not path.is_file():
                raise UserError(f"{path}: no such checkpoint")
            if found := damage(path):
                raise UserError(f"{path}: not a readable checkpoint: {found}")
            if path.suffix == ".safetensors":
                loaded = load_file(path)
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):
                    loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{source}: not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: not a checkpoint: holds a {type(loaded).__name__}, not names and values")
    return loaded


def load_weights(source: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint; those under ``model`` or ``state_dict``, as training scripts save them, if there.

    Raises:
        UserError: see :func:`read_checkpoint`, or no weights in it.
    """
    loaded = read_checkpoint(source)
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{source}: holds no weights (names and tensors, or these under 'model' or 'state_dict')")
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


def is_url(source: str | Path) -> bool:
    """Whether ``source`` is to be downloaded."""
    return str(source).startswith(("http://", "https://"))


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _some(names: list[str], show: int = 3) -> str:
    return ", ".join(islice(names, show)) + (", ..." if len(names) > show else "")
