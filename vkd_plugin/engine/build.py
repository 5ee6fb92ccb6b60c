"""Models from the ``models`` section, with their weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchdistill.models.official import get_image_classification_model, get_object_detection_model
from torchdistill.models.registry import get_model

from ..config import Experiment
from ..errors import BadValue, ConfigError, UserError
from ..models.weights import load_if_there
from .processes import is_lost_peer

logger = logging.getLogger(__name__)

# What libraries raise on arguments that do not fit. Anything else is our own mistake and shows its traceback.
_BLAMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ImportError, ArithmeticError)


@contextmanager
def blame(experiment: Experiment, *path: str | int) -> Iterator[None]:
    """Turns what a library raises into an error at the line of ``path``; the log file keeps the traceback."""
    try:
        yield
    except ConfigError as error:
        raise error if error.where else experiment.error(error.message, *path) from error
    except UserError:
        raise
    except BadValue as error:
        raise experiment.error(str(error), *_place_of(error.value, experiment.data, path)) from error
    except _BLAMED as error:
        if is_lost_peer(error):
            raise
        logger.debug("", exc_info=True)
        text = " ".join(str(error).split()) or "failed"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        if type(error) is KeyError:
            kind = "no key "
        raise experiment.error(kind + text, *path) from error


def _place_of(value: object, data: Any, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path below ``path`` at which ``value`` stands; ``path`` itself if nowhere."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return path

    def search(node: Any, at: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
        if isinstance(node, (dict, list)):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            found = (search(item, (*at, key)) for key, item in items)
            return next((place for place in found if place is not None), None)
        return at if type(node) is type(value) and node == value else None

    return search(data, path) or path


def model_sections(experiment: Experiment) -> tuple[str | None, str]:
    """Keys of the teacher (None without one) and of the student under ``models``."""
    models = experiment.data["models"]
    teacher = "teacher_model" if models.get("teacher_model") else None
    return teacher, "student_model" if "student_model" in models else "model"


def is_staged(train_config: Mapping[str, Any]) -> bool:
    """Whether ``train`` has stages (``stage1``, ``stage2``, ...), as torchdistill tells it."""
    return "stage1" in train_config


def stage_sections(train_config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The section of each stage; ``train`` itself where it has none."""
    if not is_staged(train_config):
        return [train_config]
    return [section for name, section in train_config.items() if name.startswith("stage") and name[5:].isdigit()]


def check_validation(experiment: Experiment) -> None:
    """That each epoch is validated where a schedule follows the validation.

    Raises:
        ConfigError: it is not, because of ``validate_every``.
    """
    train: dict[str, Any] = experiment.data["train"]
    keys = [(section.get("scheduler") or {}).get("key") for section in stage_sections(train)]
    if (train.get("validate_every") or 1) > 1 and ReduceLROnPlateau.__name__ in keys:
        why = "ReduceLROnPlateau needs each epoch's validation, and validate_every leaves some out"
        raise experiment.error(why, "train", "validate_every")


def for_processes(experiment: Experiment, world_size: int) -> dict[str, Any]:
    """The ``train`` section, its batch sizes divided among the processes if ``global_batch``.

    Raises:
        ConfigError: a batch size that cannot be divided evenly, at its line.
    """
    train: dict[str, Any] = experiment.data["train"]
    if not train.get("global_batch") or world_size == 1:
        return train

    def divided(options: Mapping[str, Any], *place: str) -> dict[str, Any]:
        size = options.get("batch_size") or 1
        if size % world_size:
            message = f"batches of {size} cannot be divided among {world_size} processes (global_batch)"
            raise experiment.error(message, *place, "batch_size")
        return {**options, "batch_size": size // world_size}

    def shared(section: Mapping[str, Any], *path: str) -> dict[str, Any]:
        loader = {**(section.get("train_data_loader") or {})}
        place = (*path, "train_data_loader")
        if sampler := loader.get("batch_sampler"):
            loader["batch_sampler"] = {
                **sampler,
                "kwargs": divided(sampler["kwargs"], *place, "batch_sampler", "kwargs"),
            }
        elif loader:
            loader["kwargs"] = divided(loader["kwargs"], *place, "kwargs")
        return {**section, "train_data_loader": loader}

    if not is_staged(train):
        return shared(train, "train")
    return {
        name: shared(section, "train", name) if name.startswith("stage") and isinstance(section, dict) else section
        for name, section in train.items()
    }


def build_model(experiment: Experiment, section: str, device: torch.device, distributed: bool) -> nn.Module:
    """The model of ``models.<section>``: torchvision's by name, else from torchdistill's registry, else the hub.

    ``src_ckpt`` is loaded if it names a file (that a file named there exists is checked with the configuration).

    Raises:
        ConfigError: a model that cannot be built or weights that do not fit, at their line.
    """
    config: dict[str, Any] = experiment.data["models"][section]
    with blame(experiment, "models", section, "key"):
        filled = {"kwargs": {}, **_filled(config)}
        model = get_image_classification_model(filled, False)  # sync_bn: see below
        if model is None:
            model = get_object_detection_model(filled)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **(config.get("kwargs") or {}))
    if config.get("sync_bn") and distributed:
        model = _with_synchronised_statistics(model, section, device)
    with blame(experiment, "models", section, "src_ckpt"):
        load_if_there(model, config.get("src_ckpt"))
    return model.to(device)


def _with_synchronised_statistics(model: nn.Module, section: str, device: torch.device) -> nn.Module:
    """The model with SyncBatchNorm for BatchNorm; torchdistill does it for torchvision's models alone."""
    if device.type == "cpu":
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            logger.warning("%s: SyncBatchNorm works on GPUs only: each process takes its own statistics", section)
        return model
    return convert_sync_batchnorm(model)


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}
