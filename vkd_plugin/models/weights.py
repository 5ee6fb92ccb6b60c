"""Weights from files, without executing anything that a file holds; which of what a file holds they are.

Releases wrap a model's weights in different ways. These rules are all there are; whatever fits none is refused.

* **Nested.** Weights lie at the top of a file or under one of :data:`NESTED`, at any depth. Where two of these stand
  side by side, ``FILE#key`` says which is meant.
* **Averages.** What lies under one of :data:`AVERAGES` is read if there is nothing else, or as ``FILE#key``.
* **Wrapped.** ``module.`` (DistributedDataParallel, AveragedModel) and ``_orig_mod.`` (torch.compile) before *every*
  name are taken off, unless the model's own names begin so.
* **Projectors.** What distillation trained beside the student, in a module called ``projector``,
  ``patch_projector_1`` and the like that the model does not have, is left out with a warning that says so;
  :func:`vkd_plugin.models.reference.import_projector` reads it.
"""

import argparse
import logging
import pickle
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..seal import broken
from ..suggest import nearest

logger = logging.getLogger("vkd_plugin")

NESTED = ("model", "state_dict", "model_state_dict", "student", "student_state_dict", "net", "module")
"""Keys under which weights are looked for."""
AVERAGES = ("ema", "model_ema", "student_ema", "state_dict_ema", "ema_state_dict")
"""Keys of averaged weights, which are read if there are no others."""
_WRAPPERS = ("module.", "_orig_mod.")
_COUNTER = "n_averaged"  # of torch's AveragedModel, beside what it wraps


class NotDownloaded(dict[str, Any]):
    """In place of a checkpoint from a URL, where nothing is to be downloaded; fits every model."""


def read_checkpoint(source: str | Path, damage: Callable[[Path], str | None] = broken) -> dict[str, Any]:
    """What a ``.safetensors`` file, a torch checkpoint or a URL of one holds, on the CPU.

    torchdistill and DeiT store the parsed command line beside the weights, an ``argparse.Namespace``; it is let
    through.

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
        raise UserError(f"{source}: not a readable checkpoint: {_why_unreadable(source, error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: not a checkpoint: holds a {type(loaded).__name__}, not names and values")
    return loaded


def load_weights(source: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by the rules of this module.

    Args:
        source: a file or URL; ``FILE#key`` reads what lies under ``key``, at the top of the file.

    Raises:
        UserError: see :func:`read_checkpoint` and :func:`weights_of`.
    """
    file, key = split_source(source)
    loaded = read_checkpoint(file)
    if isinstance(loaded, NotDownloaded):
        return loaded
    if key:
        if not isinstance(loaded.get(key), Mapping):
            held = [name for name, value in loaded.items() if isinstance(value, Mapping)]
            raise UserError(f"{file}: holds no weights under '{key}'{nearest(key, held)}")
        loaded = loaded[key]
    return weights_of(loaded, source)


def weights_of(loaded: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The weights in what a checkpoint holds, by the rules of this module.

    Args:
        loaded: see :func:`read_checkpoint`.
        source: where it is from, for messages.

    Returns:
        Tensors by their names, wrappers taken off.

    Raises:
        UserError: no weights, or several.
    """
    while not _is_weights(loaded):
        own, averages = ([key for key in keys if isinstance(loaded.get(key), Mapping)] for keys in (NESTED, AVERAGES))
        found = own or averages
        if not found:
            places = ", ".join(f"'{key}'" for key in NESTED[:4])
            raise UserError(f"{source}: holds no weights (names and tensors, or these under {places}, ...)")
        if len(found) > 1:
            choices = " or ".join(f"{source}#{key}" for key in found)
            raise UserError(f"{source}: holds weights under {' and '.join(map(repr, found))}; name {choices}")
        if own and averages and "projectors" not in loaded:  # run.py's own best.pt holds the better of the two
            logger.info("%s: weights are those under '%s'; averages under '%s' are not read", source, *found, *averages)
        loaded = loaded[found[0]]
    return _unwrapped(loaded)[0]


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads weights that fit a model in every name and shape, by the rules of this module.

    Args:
        model: what they are for.
        weights: by the model's names.
        source: where they are from, for the message.

    Raises:
        UserError: missing or unknown names, or other shapes; the first of each are listed.
    """
    if isinstance(weights, NotDownloaded):
        return
    own = model.state_dict()
    wrapper = _unwrapped(own)[1]
    weights = {wrapper + name: tensor for name, tensor in _unwrapped(weights)[0].items()}
    aside = [name for name in weights if name not in own and _is_projectors(name, own)]
    weights = {name: tensor for name, tensor in weights.items() if name not in aside}
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
    if aside:
        logger.warning(
            "%s: left out %d tensors of a projector, which %s does not have: %s",
            source,
            len(aside),
            type(model).__name__,
            _some(aside),
        )


M = TypeVar("M", bound=nn.Module)


def with_weights(model: M, checkpoint: str | None) -> M:
    """The model, with the weights of a file where one is named.

    Raises:
        UserError: see :func:`load_weights` and :func:`fit_weights`.
    """
    if checkpoint is not None:
        fit_weights(model, load_weights(checkpoint), checkpoint)
    return model


def load_if_there(model: nn.Module, source: str | None) -> None:
    """Fits the weights of ``src_ckpt`` into a model. That a file should exist is checked with the configuration.

    Raises:
        UserError: see :func:`load_weights` and :func:`fit_weights`.
    """
    if source and (is_url(source) or Path(split_source(source)[0]).exists()):
        fit_weights(model, load_weights(source), source)


def split_source(source: str | Path) -> tuple[str | Path, str]:
    """File and key of ``FILE#key``; the key is empty where there is none."""
    file, mark, key = str(source).rpartition("#")
    if not mark or (not is_url(source) and Path(source).expanduser().exists()):
        return source, ""
    return file, key


def is_url(source: str | Path) -> bool:
    """Whether ``source`` is to be downloaded."""
    return str(source).startswith(("http://", "https://"))


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _is_weights(loaded: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items())


def _unwrapped(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights by their names without what wrappers put before all of them, and what that was."""
    inner = {name: tensor for name, tensor in weights.items() if name != _COUNTER}
    before = ""
    while wrapper := next((w for w in _WRAPPERS if inner and all(name.startswith(w) for name in inner)), None):
        inner = {name[len(wrapper) :]: tensor for name, tensor in inner.items()}
        before += wrapper
    return (inner, before) if before else (dict(weights), "")


def _is_projectors(name: str, own: Mapping[str, Tensor]) -> bool:
    top = name.partition(".")[0]
    return "projector" in top and not any(other.partition(".")[0] == top for other in own)


def _why_unreadable(source: str | Path, error: Exception) -> str:
    """torch's own message, of many lines, advises to execute what the file holds."""
    if isinstance(error, pickle.UnpicklingError) and not is_url(source):
        try:
            held = torch.serialization.get_unsafe_globals_in_checkpoint(Path(source).expanduser())
        except Exception:  # not one of torch's archives
            held = []
        if held := [name for name in held if name != "argparse.Namespace"]:
            return f"it holds {_some(held)}, and only tensors and plain values are read; save the weights alone"
        return "not tensors and plain values"
    return first_line(error)


def _some(names: list[str], show: int = 3) -> str:
    return ", ".join(islice(names, show)) + (", ..." if len(names) > show else "")
