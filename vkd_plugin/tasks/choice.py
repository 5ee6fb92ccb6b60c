"""Which task an experiment is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Subset

from ..config import Experiment
from .classification import Classification
from .detection import Detection
from .pictures import Pictures

METRICS = (Classification.metric, Detection.metric)
"""Figures that choose the best checkpoint, of all tasks."""

DEFAULT_SCORE = 0.5
"""Of the detections in pictures, the lowest."""


class Task(Protocol):
    """What the engine asks of a task; see :class:`~vkd_plugin.tasks.Classification`."""

    metric: str
    lists: bool

    def unpack(self, batch: Any, device: torch.device) -> tuple[Any, Any, Any]: ...

    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], device: torch.device, folder: Path | None = None
    ) -> dict[str, float]: ...


def task_for(experiment: Experiment) -> Task:
    """The task that ``train.task`` names, classification where it names none.

    Raises:
        ConfigError: pictures are asked for of a data set that has no files of images.
    """
    if experiment.data["train"].get("task") != "detection":
        return Classification()
    test = experiment.data["test"]
    name = test["test_data_loader"].get("dataset_id")
    dataset = experiment.data["datasets"].get(name)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return Detection(getattr(dataset, "category_ids", None), _pictures(experiment, name, dataset))


def _pictures(experiment: Experiment, name: str, dataset: Any) -> Pictures | None:
    asked = experiment.data["test"].get("pictures")
    if asked is None:
        return None
    if not hasattr(dataset, "picture"):
        why = f"data set '{name}' cannot be asked for the image of an id, as vkd_plugin.datasets.CocoDetection can"
        raise experiment.error(why, "test", "pictures")
    return Pictures(
        asked["count"], asked.get("score", DEFAULT_SCORE), dataset.picture, getattr(dataset, "classes", None) or ()
    )
