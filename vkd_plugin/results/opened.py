"""A run's trained models with data to look at them: what figures of features and losses are computed from.

Built as ``run.py`` builds them, in evaluation mode, weights from the run's best checkpoint; nothing is written.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.high_level import AbstractLoss

from ..config import load_experiment
from ..engine.box import EngineBox, build_box
from ..engine.build import blame, build_model, model_sections, stage_sections
from ..engine.checkpoint import BEST, LAST
from ..engine.loaders import loader_factory
from ..engine.meter import TermMeter
from ..engine.precision import Precision
from ..engine.processes import Processes, process_group
from ..engine.state import load_projectors
from ..engine.train import seed_everything
from ..errors import UserError
from ..losses.feature_pair import FeaturePair
from ..losses.vkd import VkDLoss
from ..models.weights import fit_weights, read_checkpoint
from ..normalization import Normalization
from ..projectors import OrthogonalProjector
from ..random_state import generators_restored
from ..wrappers import ProjectedStudent
from .runs import Run
from .samples import SAMPLES, ChosenSamples


@dataclass(frozen=True)
class Distilled:
    """A feature that a loss term compares with the teacher's.

    Attributes:
        term: name of the loss term.
        feature: name of the student's projected feature.
        projector: as trained.
        criterion: the term's loss of two sets of rows, ``criterion(projected, teacher)``.
        source, projected, teacher: rows of the student before and after its projector and of the teacher before any
            normalisation, (N, C_s), (N, C_t) and (N, C_t).
        labels: class of each row, (N,) on the CPU.
    """

    term: str
    feature: str
    projector: nn.Module
    criterion: nn.Module
    source: Tensor
    projected: Tensor
    teacher: Tensor
    labels: Tensor


def projector_name(projector: nn.Module) -> str:
    """``OrthogonalProjector (matrix_exp)``, ``LinearProjector``, ..."""
    own = type(projector).__name__
    return f"{own} ({projector.orthogonal_map})" if isinstance(projector, OrthogonalProjector) else own


class OpenedRun:
    """See the module's docstring; made by :func:`opened`.

    Attributes:
        experiment: the run's configuration.
        checkpoint: where the weights are from.
        samples: test samples on the device.
    """

    def __init__(self, run: Run, processes: Processes, trusted: list[str]) -> None:
        self.experiment = load_experiment(run.path / "config.yaml", (), trusted)
        self.checkpoint = _checkpoint(run)
        recorded = run.summary.get("seed")
        seed = recorded if isinstance(recorded, int) else 0
        seed_everything(seed)
        self._terms = TermMeter()
        self._box = self._build(processes, seed)
        try:
            self._load()
            self._pairs = dict(self._feature_pairs())
            self.samples = ChosenSamples(self.experiment, seed, processes.device)
        except BaseException:
            self._box.clean_modules()
            raise

    def close(self) -> None:
        """Takes the hooks off."""
        self._box.clean_modules()

    def distilled(self) -> list[Distilled]:
        """Features of the samples, one entry for each loss term that compares a projected feature.

        Raises:
            UserError: there is none, it is not finite, or its rows before the projection are not those after it.
        """
        if not self._pairs:
            raise UserError("it distils no projected feature (no FeaturePair reads 'features.<name>' of its student)")
        with ExitStack() as stack:
            compared = {name: stack.enter_context(_inputs(pair.criterion)) for name, pair in self._pairs.items()}
            given = {name: stack.enter_context(_inputs(module)) for name, module in self._projectors.items()}
            for samples, targets in self.samples.batches:
                self._losses(samples, targets)
        return [
            self._distilled(name, pair, compared[name], given[_feature(pair)]) for name, pair in self._pairs.items()
        ]

    def _distilled(self, term: str, pair: FeaturePair, compared: list[Any], given: list[Any]) -> Distilled:
        feature, labels = _feature(pair), self.samples.labels()
        source = torch.cat([rows.flatten(0, -2) for (rows,) in given])
        projected, teacher = (torch.cat(side) for side in zip(*compared, strict=True))
        if len(source) != len(teacher) or len(teacher) % len(labels):
            raise UserError(f"'features.{feature}': the loss does not compare the rows that the projector is given")
        rows = torch.linspace(0, len(teacher) - 1, min(len(teacher), SAMPLES)).long()
        sides = [side.float()[rows.to(side.device)] for side in (source, projected, teacher)]
        if not all(side.isfinite().all() for side in sides):
            raise UserError(f"'features.{feature}' of the trained model is not finite")
        return Distilled(
            term=term,
            feature=feature,
            projector=self._projectors[feature],
            criterion=pair.criterion,
            source=sides[0],
            projected=sides[1],
            teacher=sides[2],
            labels=labels.repeat_interleave(len(teacher) // len(labels))[rows],
        )

    def losses_at(self, samples: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss and terms of a batch, ``loss`` and ``loss/<term>`` as in ``metrics.jsonl``.

        Besides, for each feature term with a normalisation, ``loss/<term>, normalization none``.
        """
        with ExitStack() as stack:
            compared = {name: stack.enter_context(_inputs(pair.criterion)) for name, pair in self._pairs.items()}
            values = self._losses(samples, targets)
        for name, pair in self._pairs.items():
            if isinstance(pair.criterion, VkDLoss) and pair.criterion.normalization.method != "none":
                without = copy.deepcopy(pair.criterion)
                without.normalization = Normalization("none")
                values[f"loss/{name}, normalization none"] = without(*compared[name][-1])
        return {name: float(value) for name, value in values.items()}

    @torch.no_grad()
    def _losses(self, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with blame(self.experiment, "train"):
            return self._terms.take(self._box.forward_process(samples, targets, {}))

    @property
    def _projectors(self) -> dict[str, nn.Module]:
        """By the name of their feature."""
        wrapper = self._box.wrapper
        features = wrapper.features.items() if isinstance(wrapper, ProjectedStudent) else ()
        return {name: feature.get_submodule("projector") for name, feature in features}

    def _build(self, processes: Processes, seed: int) -> EngineBox:
        experiment, device = self.experiment, processes.device
        teacher_section, student_section = model_sections(experiment)
        teacher = build_model(experiment, teacher_section, device, False) if teacher_section else None
        student = build_model(experiment, student_section, device, False)
        with blame(experiment, "train"):
            return build_box(
                loader_factory(seed),
                Precision(None, device),
                self._terms,
                {},
                False,
                teacher,
                student,
                experiment.data["datasets"],
                _last_stage(experiment.data["train"]),
                device,
                processes.device_ids,
                False,
                1,
            )

    def _load(self) -> None:
        box, state = self._box, read_checkpoint(self.checkpoint)
        if isinstance(box, DistillationBox) and any(p.requires_grad for p in box.teacher_model.parameters()):
            raise UserError(f"it trains on the teacher's side too, which {BEST} does not hold")
        with blame(self.experiment, "train"):
            fit_weights(box.bare_student, state["model"], self.checkpoint)
            load_projectors(box.wrapper, state["projectors"])
        box.student.eval()
        box.criterion.eval()
        if isinstance(box.criterion, AbstractLoss):
            for term, _ in box.criterion.term_dict.values():
                term.eval()

    def _feature_pairs(self) -> Iterator[tuple[str, FeaturePair]]:
        terms = self._box.criterion.term_dict if isinstance(self._box.criterion, AbstractLoss) else {}
        pairs = {name: term for name, (term, _) in terms.items() if isinstance(term, FeaturePair)}
        return ((name, pair) for name, pair in pairs.items() if _feature(pair) in self._projectors)


@contextmanager
def opened(run: Run, device: str, trusted: list[str]) -> Iterator[OpenedRun]:
    """The run's models and data; the global generators are afterwards what they were.

    Args:
        run: see above.
        device: where to compute.
        trusted: packages whose code its configuration may run.

    Raises:
        UserError: why they cannot be built.
    """
    if run.config is None:
        raise UserError(run.problem or "it has no configuration")
    with process_group(device) as processes, generators_restored():
        found = OpenedRun(run, processes, trusted)
        try:
            yield found
        finally:
            found.close()


def _checkpoint(run: Run) -> Path:
    for name in (BEST, LAST):
        if (file := run.path / "checkpoints" / name).is_file():
            return file
    raise UserError("it has no checkpoint yet")


def _last_stage(train: dict[str, Any]) -> Mapping[str, Any]:
    """The section of the last stage, with the data of those before, as a single one.

    torchdistill's own way there, stage by stage, writes the files of ``dst_ckpt``.
    """
    sections = stage_sections(train)
    loaders = {key: value for section in sections for key, value in section.items() if key.endswith("_data_loader")}
    return {**loaders, **sections[-1]} if len(sections) > 1 else sections[0]


def _feature(pair: FeaturePair) -> str:
    """The student's projected feature that a pair reads; empty if it reads another module."""
    prefix, _, name = pair.student.module.partition(".")
    return name if prefix == "features" else ""


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Fills the list with the arguments of each call of ``module`` in the block."""
    seen: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        yield seen
    finally:
        handle.remove()
