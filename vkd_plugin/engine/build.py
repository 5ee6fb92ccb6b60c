"""Models from the ``models`` section, with their weights."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from ..config import Experiment
from ..errors import ConfigError, UserError

# What libraries raise on arguments that do not fit. Anything else is our own mistake and shows its traceback.
_BLAMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OSError, ImportError)


@contextmanager
def blame(experiment: Experiment, *path: str | int) -> Iterator[None]:
    """Turns what a library raises into an error at the line of ``path``; the log file keeps the traceback."""
    try:
        yield
    except ConfigError as error:
        raise error if error.where else experiment.error(error.message, *path) from error
    except UserError:
        raise
    except _BLAMED as error:
        text = " ".join(str(error).split()) or "failed"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise experiment.error(kind + text, *path) from error


def model_sections(experiment: Experiment) -> tuple[str | None, str]:
    """Keys of the teacher (None without one) and of the student under ``models``."""
    models = experiment.data["models"]
    teacher = "teacher_model" if models.get("teacher_model") else None
    return teacher, "student_model" if "student_model" in models else "model"


def build_model(experiment: Experiment, section: str, device: torch.device, distributed: bool) -> nn.Module:
    """The model of ``models.<section>``: torchvision's by name, else from torchdistill's registry, else the hub.

    ``src_ckpt`` is loaded if it names a file (that a file named there exists is checked with the configuration).

    Raises:
        ConfigError: a model that cannot be built or weights that do not fit, at their line.
    """
    config: dict[str, Any] = experiment.data["models"][section]
    with blame(experiment, "models", section, "key"):
        model = get_image_classification_model({"kwargs": {}, **_filled(config)}, distributed)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **(config.get("kwargs") or {}))
    source = config.get("src_ckpt")
    if source and (_is_url(source) or Path(source).exists()):
        with blame(experiment, "models", section, "src_ckpt"):
            state = read_checkpoint(source)
            model.load_state_dict(state.get("model", state))
    return model.to(device)


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """A torchdistill checkpoint, a plain state dict, or a safetensors file; nothing in it is executed.

    torchdistill stores the parsed command line with the weights, an ``argparse.Namespace``; it is let through.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if _is_url(source):
            return torch.hub.load_state_dict_from_url(str(source), map_location="cpu", weights_only=True)
        if str(source).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(source)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source}: not a readable checkpoint: {text}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: not a checkpoint: holds {type(loaded).__name__}, not a dict")
    return loaded


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))
