"""Which task an experiment is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..config import Experiment
from .classification import Classification
from .detection import Detection

METRICS = (Classification.metric, Detection.metric)
"""Figures that choose the best checkpoint, of all tasks."""


class Task(Protocol):
    """What the engine asks of a task; see :class:`~vkd_plugin.tasks.Classification`."""

    metric: str
    lists: bool

    def unpack(self, batch: Any, device: torch.device) -> tuple[Any, Any, Any]: ...

    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], device: torch.device, folder: Path | None = None
    ) -> dict[str, float]: ...


def task_for(experiment: Experiment) -> Task:
    """The task that ``train.task`` names, classification where it names none."""
    if experiment.data["train"].get("task") != "detection":
        return Classification()
    name = experiment.data["test"]["test_data_loader"].get("dataset_id")
    return Detection(getattr(experiment.data["datasets"].get(name), "category_ids", None))
