"""A first step of an experiment, taken on tensors without contents: all that a first batch would tell, and more."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import Experiment
from ..config.schema import ENGINE
from ..config.structure import is_left_open
from ..engine.build import build_model, is_staged, model_sections, stage_sections
from ..errors import ConfigError
from ..models.weights import first_line
from ..random_state import generators_restored
from ..tasks import task_for
from .alone import alone
from .batches import two_samples
from .facts import DataFacts, Facts, ModelFacts
from .fake import Contents
from .made import misfits
from .noting import NeedsContents, NeedsGPU, Notes
from .offline import offline
from .places import leaves
from .stage import CPU, Stage
from .standin import StandIn, length_of
from .statistics import other_statistics
from .transforms import place_of_transform


def dry_run(experiment: Experiment, facts: Facts) -> None:
    """Adds to ``facts`` what a first step would show: sizes, gradients, and what is wrong.

    Tensors have no contents first. Where that does not do, and to be sure of what went wrong, a small batch with
    contents is taken.
    """
    for real in (False, True):
        attempt = Attempt(experiment, copy.deepcopy(facts), real)
        try:
            attempt.run()
        except NeedsContents:
            continue
        except NeedsGPU as error:
            message = f"the rest of the step is not checked, it needs a GPU: {first_line(error)}"
            attempt.notes.warn(message, "train")
            break
        if real or not attempt.notes.is_doubtful:
            break
    vars(facts).update(vars(attempt.facts))


class Attempt:
    """One way through an experiment's models, data sets and stages.

    Args:
        experiment: which.
        facts: what is found out; changed.
        real: with tensors that have contents.
    """

    def __init__(self, experiment: Experiment, facts: Facts, real: bool) -> None:
        self.experiment = experiment
        self.facts = facts
        self.contents = Contents(real)
        self.notes = Notes(experiment, facts, real)

    def run(self) -> None:
        """Models, data, then each stage, up to the first in which something is wrong."""
        train: dict[str, Any] = self.experiment.data["train"]
        self.facts.extras = [f"{name}: {_said(train[name])}" for name in ENGINE if train.get(name)]
        with offline(), alone(), generators_restored(), ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            # What they say of a step is said once it is taken; torch's prints a stack for shapes that do not fit.
            for name in ("torchdistill", "torch._subclasses.fake_tensor"):
                logger = logging.getLogger(name)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL)
            self._look_at_values()
            if self.facts.problems:
                return
            with self.notes.collecting("train", "task"):
                task_for(self.experiment)
            teacher, student = self._models()
            self._datasets()
            self._compare_statistics(teacher, student)
            if student is None or self.facts.problems:
                return
            config: dict[str, Any] = {}
            for number, section in enumerate(stage_sections(train), 1):
                config = {**config, **_copied(section)}  # a later stage keeps what it does not name
                path = ("train", f"stage{number}") if is_staged(train) else ("train",)
                Stage(self.notes, self.contents, config, path, teacher, student).run()
                if self.facts.problems:
                    return
            tested = self.experiment.data["test"]["test_data_loader"]
            two_samples(self.experiment.data["datasets"], tested, False, self.notes, "test", "test_data_loader")

    def _look_at_values(self) -> None:
        """What ``run.py list`` prints has places to fill in; what tags have made may not be what it was to be."""
        for path, value in leaves(self.experiment.data):
            if is_left_open(value):
                self.notes.problem(f"'{value}' is to be replaced by a value", *path)
        if not self.facts.problems:
            for message, path in misfits(self.experiment):
                self.notes.problem(message, *path)

    def _models(self) -> tuple[nn.Module | None, nn.Module | None]:
        built: list[nn.Module | None] = []
        for section in model_sections(self.experiment):
            model: nn.Module | None = None
            if section is not None:
                with self.notes.collecting("models", section):
                    try:
                        model = self._model(section)
                    except AssertionError:  # so libraries check their arguments
                        with self.notes.blaming("models", section, "kwargs"):
                            raise
            built.append(model)
        return built[0], built[1]

    def _model(self, section: str) -> nn.Module:
        config: dict[str, Any] = self.experiment.data["models"][section]
        model = build_model(self.experiment, section, CPU, False)
        name = config["kwargs"].get("name", "timm_model") if config["key"] == "timm_model" else config["key"]
        parameters = list(model.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.facts.models.append(ModelFacts(section, str(name), sum(p.numel() for p in parameters), trainable))
        self.contents.empty(model)
        return model

    def _datasets(self) -> None:
        """Length and first sample of every data set."""
        for name, dataset in self.experiment.data["datasets"].items():
            if str(name).startswith("_") or not isinstance(dataset, Dataset):
                continue
            kind = getattr(dataset, "kind", type(dataset).__name__)
            facts = DataFacts(str(name), kind, length_of(dataset, str(name)), not isinstance(dataset, StandIn))
            with self.notes.collecting("datasets", name):
                if facts.length == 0:
                    raise ConfigError("the data set is empty")
                with self._placing_transforms(str(name)):
                    sample = dataset[0]
                image = sample[0] if isinstance(sample, tuple | list) and sample else sample
                facts.sample = list(image.shape) if isinstance(image, Tensor) else None
            self.facts.datasets.append(facts)

    def _compare_statistics(self, *models: nn.Module | None) -> None:
        for section, model in zip(model_sections(self.experiment), models, strict=True):
            if section is None or model is None:
                continue
            config = self.experiment.data["models"][section]
            if config["key"] == "timm_model":
                message = other_statistics(model, config["kwargs"], self.experiment.data["datasets"].values())
                if message is not None:
                    self.notes.warn(message, "models", section, "kwargs")

    @contextmanager
    def _placing_transforms(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with self.notes.blaming(*place_of_transform(error, self.experiment, name)):
                raise


def _copied(section: Any) -> Any:
    """The mappings and lists of a configuration anew, which torchdistill changes; objects as they are."""
    if isinstance(section, dict):
        return {key: _copied(value) for key, value in section.items()}
    return [_copied(item) for item in section] if isinstance(section, list) else section


def _said(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
