"""The trained student of a run: which checkpoint, and the model with its weights. No data, no teacher, no network."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor, nn

from ..check import standin
from ..check.offline import offline
from ..config import Experiment, load_experiment
from ..config.nodes import entries, is_null, is_private, plain_value
from ..config.problems import dotted
from ..config.source import read
from ..engine.build import build_model, model_sections
from ..errors import UserError
from ..models.weights import fit_weights, read_checkpoint, weights_of
from ..results.runs import Run, read_runs
from ..seal import broken, damage
from ..suggest import nearest

_FILES = ("checkpoint", "backbone_checkpoint")
_FIRST_WEIGHTS = (*_FILES, "pretrained", "weights", "weights_backbone", "new_classifier")
"""Arguments of models that say what weights training begins with."""


@dataclass(frozen=True)
class Trained:
    """A student as a checkpoint holds it.

    Attributes:
        run: where it is from.
        experiment: the run's configuration; data sets that are made from files are stand-ins.
        checkpoint: the file.
        epoch, step: how far training had come, None where the file is not the run's.
        is_average: whether the weights are the EMA's.
        began_with: checkpoints that training began with, by their keys in the configuration.
        kwargs: the model's arguments, without those that only say where its first weights were from.
        model: the student in evaluation mode, on the CPU.
    """

    run: Run
    experiment: Experiment
    checkpoint: Path
    epoch: int | None
    step: int | None
    is_average: bool
    began_with: dict[str, str]
    kwargs: dict[str, Any]
    model: nn.Module

    @property
    def record(self) -> dict[str, Any]:
        """What ``metrics.jsonl`` says of exactly these weights; empty if it says nothing."""
        return next((r for r in self.run.records if (r["epoch"], r.get("step")) == (self.epoch, self.step)), {})

    def rebuilt(self) -> nn.Module:
        """The student's architecture anew, in evaluation mode, with other weights."""
        return _built(self.experiment, self.kwargs)


def trained_student(folder: str, checkpoint: str, average: bool, trust: Sequence[str]) -> Trained:
    """Reads a run's student.

    Args:
        folder: of the run.
        checkpoint: the name of one of its checkpoints (``best``, ``last``, ``epoch50``), or a file.
        average: take the EMA's weights.
        trust: packages whose code the run's configuration may run.

    Raises:
        UserError: no run, no such checkpoint, a damaged one, or one that does not fit.
    """
    (run,) = read_runs([folder])
    file = _find(run, checkpoint)
    is_own = file.resolve().parent == (run.path / "checkpoints").resolve()
    state = read_checkpoint(file, damage if is_own else broken)
    weights, is_average = _weights(state, file, average)
    experiment, began_with = _experiment(run, trust)
    config = model_config(experiment)
    kwargs = config.get("kwargs") or {}
    # Some models of torchvision are others with pretrained weights (Inception changes its input), and stay so here.
    model = _built(experiment, _without(kwargs, _FIRST_WEIGHTS if config["key"] == "timm_model" else _FILES))
    fit_weights(model, weights, file)
    epoch, step = (state.get(name) if is_own else None for name in ("epoch", "step"))
    bare = _without(kwargs, _FIRST_WEIGHTS)
    if config["key"] in vars(torchvision.models.detection):  # which begin with ImageNet's unless they are told not to
        bare = {**bare, "weights_backbone": None}
        bare.pop("trainable_backbone_layers", None)  # of those
    return Trained(run, experiment, file, epoch, step, is_average, began_with, bare, model)


def _weights(state: Mapping[str, Any], file: Path, average: bool) -> tuple[dict[str, Tensor], bool]:
    """Weights, and whether they are the EMA's; ``best.pt`` has these as the model's where validation chose by them."""
    ema = state.get("ema")
    if not isinstance(ema, Mapping):
        if average:
            raise UserError(f"{file}: holds no EMA (the run's configuration has no train.ema)")
        return weights_of(state, file), False
    averages = weights_of(ema, file)
    weights = averages if average else weights_of(state, file)
    are_equal = weights.keys() == averages.keys() and all(torch.equal(weights[k], averages[k]) for k in weights)
    return weights, are_equal


def _experiment(run: Run, trust: Sequence[str]) -> tuple[Experiment, dict[str, str]]:
    """The run's configuration without the checkpoints that it began with, which may be gone; and these."""
    if run.problem:
        raise UserError(run.problem)
    file = run.path / "config.yaml"
    began_with = dict(_sources(read(file)))
    return load_experiment(file, [f"{key}=null" for key in began_with], trust, standin.build), began_with


def _find(run: Run, name: str) -> Path:
    folder = run.path / "checkpoints"
    own = sorted(path.stem for path in folder.glob("*.pt"))
    if name in own:
        return folder / f"{name}.pt"
    if name in ("best", "last"):
        instead = f"; --checkpoint takes {', '.join(own)}" if own else ""
        raise UserError(f"{folder / name}.pt: no such checkpoint ({run.status}){instead}")
    file = Path(os.path.expanduser(name))
    if file.is_file():
        return file
    raise UserError(f"--checkpoint {name}: no file, and no checkpoint of {run.path}{nearest(name, own)}")


def _sources(node: yaml.Node, at: tuple[Any, ...] = ()) -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, (_, value) in entries(node).items():
        if key == "src_ckpt" and not is_null(value):
            yield dotted((*at, key)), str(plain_value(value))
        elif not is_private(key):
            yield from _sources(value, (*at, key))


def model_config(experiment: Experiment) -> Mapping[str, Any]:
    """The student's section under ``models``."""
    _, section = model_sections(experiment)
    return experiment.data["models"][section]


def _without(kwargs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Arguments without those of ``names`` that name weights or switch them on."""
    return {k: v for k, v in kwargs.items() if not (k in names and isinstance(v, str | bool | Enum | None))}


def _built(experiment: Experiment, kwargs: dict[str, Any]) -> nn.Module:
    _, section = model_sections(experiment)
    models = experiment.data["models"]
    changed = {**models, section: {**models[section], "src_ckpt": None, "kwargs": kwargs}}
    data = {**experiment.data, "models": changed}
    with offline():
        return build_model(experiment.with_data(data), section, torch.device("cpu"), False).eval()
