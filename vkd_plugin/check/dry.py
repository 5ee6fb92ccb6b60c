"""One step of an experiment on tensors without contents: everything that a first batch would tell, and more."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchdistill.datasets.util import get_collate_func
from torchdistill.losses.high_level import AbstractLoss

from ..config import Experiment
from ..config.schema import ENGINE
from ..engine.box import EngineBox, build_box
from ..engine.build import blame, build_model, is_staged, model_sections, stage_sections
from ..engine.loaders import wrapped_dataset
from ..engine.meter import TermMeter
from ..engine.precision import Precision
from ..engine.sharding import parameters_of
from ..errors import BadValue, ConfigError, UserError
from ..models.weights import first_line, is_url
from ..random_state import generators_restored
from ..tasks.classification import logits
from .facts import DataFacts, Facts, FeatureFacts, GroupFacts, MemoryFacts, ModelFacts, StageFacts, TermFacts
from .fake import NEEDS_CONTENTS, Contents, SavedBytes
from .offline import offline
from .places import place_in_stage
from .schedule import learning_rates, optimizer_state_factor, schedule_problem
from .standin import StandIn, classes_of, length_of

CPU = torch.device("cpu")


class _NeedsContents(Exception):
    """The result of an operation depends on what is in a tensor."""


class _NeedsGPU(Exception):
    """An operation is not there for the CPU, on which a check runs."""


def dry_run(experiment: Experiment, facts: Facts) -> None:
    """Adds to ``facts`` what a first step would show: sizes, gradients, and what is wrong.

    Tensors have no contents first. Where that does not do, and to be sure of what went wrong, a small batch with
    contents is taken.
    """
    for real in (False, True):
        attempt = _Attempt(experiment, Contents(real), copy.deepcopy(facts))
        try:
            attempt.run()
        except _NeedsContents:
            continue
        except _NeedsGPU as error:
            attempt.warn(f"the rest of the step is not checked, it needs a GPU: {first_line(error)}", "train")
            break
        if real or not attempt.is_doubtful:
            break
    vars(facts).update(vars(attempt.facts))


class _Attempt:
    def __init__(self, experiment: Experiment, contents: Contents, facts: Facts) -> None:
        self.experiment = experiment
        self.contents = contents
        self.facts = facts
        self.is_doubtful = False  # whether something failed that might not with contents
        self.train: dict[str, Any] = experiment.data["train"]
        self.precision = Precision(self.train.get("amp"), CPU)
        self.staged = is_staged(self.train)
        self.facts.extras = [f"{name}: {_said(self.train[name])}" for name in ENGINE if self.train.get(name)]

    def run(self) -> None:
        """Models, data, then each stage."""
        level = logging.getLogger("torchdistill").level
        with offline(), generators_restored(), ExitStack() as stack:
            logging.getLogger("torchdistill").setLevel(logging.ERROR)
            stack.callback(logging.getLogger("torchdistill").setLevel, level)
            teacher, student = self._models()
            self._datasets()
            if student is None or self.facts.problems:
                return
            config: dict[str, Any] = {}
            for number, section in enumerate(stage_sections(self.train), 1):
                config = {**config, **_copied(section)}
                path = ("train", f"stage{number}") if self.staged else ("train",)
                _Stage(self, config, path, teacher, student).run()
                if self.facts.problems:
                    return
            self.batch(self.experiment.data["test"]["test_data_loader"], False, ("test", "test_data_loader"))

    @contextmanager
    def noting(self, *path: str | int) -> Iterator[None]:
        """Notes what goes wrong as a problem at ``path``, and goes on."""
        try:
            with blame(self.experiment, *path):
                try:
                    yield
                except NEEDS_CONTENTS as error:
                    if self.contents.real:
                        raise
                    raise _NeedsContents from error
                except (UserError, BadValue):
                    raise
                except Exception as error:
                    _let_gpu_through(error)
                    self.is_doubtful = True
                    raise
        except ConfigError as error:
            self.facts.problems.append(error)
        except UserError as error:
            self.facts.problems.append(self.experiment.error(str(error), *path))

    def problem(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path``."""
        self.facts.problems.append(self.experiment.error(message, *path))

    def warn(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path`` as a warning."""
        self.facts.warnings.append(str(self.experiment.error(message, *path)))

    def _models(self) -> tuple[nn.Module | None, nn.Module | None]:
        built: list[nn.Module | None] = []
        for section in model_sections(self.experiment):
            if section is None:
                built.append(None)
                continue
            model: nn.Module | None = None
            with self.noting("models", section):
                config = self.experiment.data["models"][section]
                local = {**config, "src_ckpt": None} if is_url(config.get("src_ckpt") or "") else config
                data = {**self.experiment.data, "models": {**self.experiment.data["models"], section: local}}
                model = build_model(self.experiment.with_data(data), section, CPU, False)
                name = config["kwargs"].get("name", "timm_model") if config["key"] == "timm_model" else config["key"]
                self.facts.models.append(_model_facts(section, str(name), model))
                self.contents.empty(model)
            built.append(model)
        return built[0], built[1]

    def _datasets(self) -> None:
        """Length and first sample of every data set."""
        for name, dataset in self.experiment.data["datasets"].items():
            if str(name).startswith("_") or not isinstance(dataset, Dataset):
                continue
            facts = DataFacts(
                str(name),
                getattr(dataset, "kind", type(dataset).__name__),
                length_of(dataset, str(name)),
                not isinstance(dataset, StandIn),
            )
            with self.noting("datasets", name):
                if facts.length == 0:
                    raise ConfigError("the data set is empty")
                sample = dataset[0]
                image = sample[0] if isinstance(sample, tuple | list) and sample else sample
                facts.sample = list(image.shape) if isinstance(image, Tensor) else None
            self.facts.datasets.append(facts)

    def batch(self, loader: Mapping[str, Any], training: bool, path: tuple[str | int, ...]) -> Any:
        """A batch as a loader of ``loader`` would make it; None where it cannot be made."""
        dataset = self.experiment.data["datasets"].get(loader.get("dataset_id"))
        batch: Any = None
        with self.noting(*path, "collate_fn" if loader.get("collate_fn") else "dataset_id"):
            config = {"requires_supp": True, **loader} if training else loader
            try:
                wrapped = wrapped_dataset(copy.copy(dataset), config)  # a wrapper may take its transform away
            except AttributeError:
                if not isinstance(dataset, StandIn):
                    raise
                self.warn("the step is not checked: its data set is not here", *path, "dataset_wrapper")
                return None
            collate = loader.get("collate_fn")
            collate = collate if callable(collate) else get_collate_func(collate)
            image = wrapped[0][0] if isinstance(wrapped[0], tuple | list) else wrapped[0]
            if collate is None and isinstance(image, Image):
                message = "its samples are PIL images: end its transform with torchvision.transforms.ToTensor"
                self.problem(message, "datasets", loader["dataset_id"])
                return None
            batch = (collate or default_collate)([wrapped[0], wrapped[1 if length_of(dataset, "") != 1 else 0]])
        return batch

    def grown(self, batch: Any, size: int) -> Any:
        """``batch``, which is of two samples, with as many as training has (with contents: with a few)."""
        if self.contents.real:
            size = min(size, 4)
        return _grown(batch, size)


class _Stage:
    """One stage of training, in a box of the engine."""

    def __init__(
        self,
        attempt: _Attempt,
        config: dict[str, Any],
        path: tuple[str, ...],
        teacher: nn.Module | None,
        student: nn.Module,
    ) -> None:
        self.attempt = attempt
        self.config = config
        self.path = path
        self.teacher = teacher
        self.student = student
        self.side = "student" if teacher is not None else "model"
        self.facts = StageFacts(path[1] if len(path) > 1 else None, int(config["num_epochs"]))
        self.seen: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        self.validated: Any = None  # a batch

    def run(self) -> None:
        """Sets the stage up, takes a step, and notes what it comes to."""
        attempt = self.attempt
        attempt.facts.stages.append(self.facts)
        loader = self.config["train_data_loader"]
        self._count_steps(loader)
        batch = attempt.batch(loader, True, (*self.path, "train_data_loader"))
        self.validated = attempt.batch(self.config["val_data_loader"], False, (*self.path, "val_data_loader"))
        if batch is None or attempt.facts.problems:
            return
        with attempt.contents():
            box = self._box(batch[0][0])
            if box is None or attempt.facts.problems:
                return
            try:
                self._describe_optimizer(box)
                self._step(box, attempt.grown(batch, self.facts.batch_size or 2))
            finally:
                box.clean_modules()

    def _count_steps(self, loader: Mapping[str, Any]) -> None:
        options = loader.get("kwargs") or {}
        size = options.get("batch_size", 1)
        if (loader.get("batch_sampler") or {}).get("kwargs"):
            size = loader["batch_sampler"]["kwargs"].get("batch_size", size)
        self.facts.batch_size = size if isinstance(size, int) else None
        name = loader.get("dataset_id")
        length = length_of(self.attempt.experiment.data["datasets"].get(name), str(name))
        if length is not None and self.facts.batch_size:
            whole, rest = divmod(length, self.facts.batch_size)
            self.facts.steps_per_epoch = whole + bool(rest and not options.get("drop_last"))
            if not self.facts.steps_per_epoch:
                message = f"an epoch has no batch: {length} samples, batch_size {self.facts.batch_size}, drop_last"
                self.attempt.problem(message, *self.path, "train_data_loader", "kwargs", "batch_size")

    def _box(self, sample: Any) -> EngineBox | None:
        """The box, without what of its hooks leads nowhere; None where something is wrong."""
        attempt = self.attempt
        while True:
            try:
                return self._built(sample)
            except BadValue as error:
                hooks = _hook_of(self.config, error.value)
                with attempt.noting(*self.path, *place_in_stage(error, self.teacher is not None)):
                    raise error
                if hooks is None:
                    return None
                hooks.remove(error.value)
            except _NeedsContents:
                raise
            except ConfigError as error:
                attempt.facts.problems.append(error)
                return None

    def _built(self, sample: Any) -> EngineBox | None:
        attempt = self.attempt
        found = len(attempt.facts.problems)
        loaders = [_Loader([(sample,)]), None]
        try:
            box = build_box(
                lambda *_: loaders,
                attempt.precision,
                TermMeter(),
                {},
                False,
                self.teacher,
                self.student,
                attempt.experiment.data["datasets"],
                self.config,
                CPU,
                None,
                False,
                1,
            )
        except BadValue:
            raise
        except Exception as error:
            with attempt.noting(*self.path, *place_in_stage(error, self.teacher is not None)):
                raise error
            return None
        return box if len(attempt.facts.problems) == found else None

    # The step.

    def _step(self, box: EngineBox, batch: Any) -> None:
        attempt = self.attempt
        samples, targets, *rest = batch
        self._guard(box)
        models = [box.student] + ([box.teacher_model] if self.teacher is not None else [])
        saved = SavedBytes(*models)
        box.student.train()
        loss: Tensor | None = None
        with attempt.noting(*self.path, "criterion"), saved.counting():
            loss = box.forward_process(samples, targets, rest[0] if rest else None)
        self._describe_features(box)
        self._describe_terms(box)
        if attempt.facts.problems:
            return
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            attempt.problem("the loss sends no gradient to anything", *self.path, "criterion")
            return
        with attempt.noting(*self.path, "criterion"):
            self._check_gradients(box, loss)
        self._check_outputs(box)
        self._estimate_memory(box, saved, len(samples))
        self._check_classes(box)

    def _guard(self, box: EngineBox) -> None:
        """Has what fails in a model or in a term of the loss blamed on its place, each by itself."""
        attempt, path = self.attempt, self.path
        for side in ("teacher", "student") if self.teacher is not None else ("model",):
            name = f"{side}_forward_proc" if self.teacher is not None else "model_forward_proc"
            forward = getattr(box, name)

            def guarded(*args: Any, _forward: Any = forward, _side: str = side, **kwargs: Any) -> Any:
                with blame(attempt.experiment, *path, _side):
                    return self._with_contents(_forward, *args, **kwargs)

            setattr(box, name, guarded)
        box.criterion = _Watched(self, box.criterion)

    def _with_contents(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except NEEDS_CONTENTS as error:
            if self.attempt.contents.real:
                raise
            raise _NeedsContents from error
        except (UserError, BadValue):
            raise
        except Exception as error:
            _let_gpu_through(error)
            self.attempt.is_doubtful = True
            raise

    def term(self, name: str, term: nn.Module, *args: Any) -> Any:
        """The value of a term; zero, and a problem, where it has none."""
        value: Any = None
        with self.attempt.noting(*self.path, "criterion", "kwargs", "sub_terms", name):
            value = term(*args)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"the term should be one number, got {shape}")
            self.values[name] = value
        return value if isinstance(value, Tensor) else torch.zeros(())

    def _check_gradients(self, box: EngineBox, loss: Tensor) -> None:
        """That all that the optimizer trains gets a gradient."""
        names = {id(p): name for name, p in box.student.named_parameters()}
        if self.teacher is not None:
            names |= {id(p): f"{name} (teacher)" for name, p in box.teacher_model.named_parameters()}
        trained = [p for p in parameters_of(box.optimizer) if p.requires_grad]
        for name, value in self.values.items():
            weight = _weight(box.criterion.inner, name)
            if not value.requires_grad and weight != 0:
                message = "the term sends no gradient to anything that trains"
                self.attempt.problem(message, *self.path, "criterion", "kwargs", "sub_terms", name)
        if not trained:
            self.attempt.problem("it trains nothing: all its parameters are frozen", *self.path, "optimizer")
            return
        gradients = torch.autograd.grad(loss.mean(), trained, allow_unused=True)
        idle = [names.get(id(p), "?") for p, g in zip(trained, gradients, strict=True) if g is None]
        if idle:
            modules = _common_modules(idle, set(names.values()))
            shown = ", ".join(f"'{module}'" for module in modules[:5]) + (", ..." if len(modules) > 5 else "")
            message = f"the loss sends no gradient to {shown}: use it in a term, or name it under frozen_modules"
            self.attempt.problem(message, *self.path, self.side)

    def _check_outputs(self, box: EngineBox) -> None:
        """That the bare models can be evaluated, and what a sample costs."""
        teacher, student = model_sections(self.attempt.experiment)
        models = {student: box.bare_student} | ({teacher: self.teacher} if teacher and self.teacher else {})
        for section, model in models.items():
            modes = {module: module.training for module in model.modules()}
            model.eval()
            samples = self.validated[0]
            try:
                with self.attempt.noting("models", section), torch.no_grad(), FlopCounterMode(display=False) as flops:
                    outputs = model(samples)
                    if section == student:
                        self.seen["classes"] = logits(outputs).shape[1]
                    facts = next(facts for facts in self.attempt.facts.models if facts.role == section)
                    facts.flops = flops.get_total_flops() // len(samples)
            finally:
                for module, training in modes.items():
                    module.training = training

    def _check_classes(self, box: EngineBox) -> None:
        outputs = self.seen.get("classes")
        name = self.config["train_data_loader"].get("dataset_id")
        classes = classes_of(self.attempt.experiment.data["datasets"].get(name))
        if outputs is not None and classes is not None and classes > outputs:
            section = model_sections(self.attempt.experiment)[1]
            message = f"{outputs} outputs for the {classes} classes of data set '{name}'"
            self.attempt.problem(message, "models", section, "kwargs")

    # What it comes to.

    def _describe_features(self, box: EngineBox) -> None:
        wrapper = box.wrapper
        projected = dict(getattr(wrapper, "features", {}).items()) if wrapper is not None else {}
        for side, io_dict in self.seen.get("io", {}).items():
            for path, io in io_dict.items():
                for kind, value in io.items():
                    if path == "." and kind == "input":
                        continue
                    shape: list[int] | str = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    feature = projected.get(path.removeprefix("features.")) if side == "student" else None
                    projector = _said_of(feature.projector) if feature is not None else None
                    self.facts.features.append(FeatureFacts(side, path, kind, shape, projector))

    def _describe_terms(self, box: EngineBox) -> None:
        criterion = box.criterion.inner
        sections = (self.config["criterion"].get("kwargs") or {}).get("sub_terms") or {}
        if not isinstance(criterion, AbstractLoss):
            return
        for name, (_, weight) in criterion.term_dict.items():
            key = str(sections.get(name, {}).get("criterion", {}).get("key", type(criterion).__name__))
            value = self.values.get(name)
            has_gradient = isinstance(value, Tensor) and value.requires_grad
            self.facts.terms.append(TermFacts(name, key, float(weight), has_gradient))

    def _describe_optimizer(self, box: EngineBox) -> None:
        config = self.config["optimizer"]
        self.facts.optimizer = str(config["key"])
        for group in box.optimizer.param_groups:
            sizes = [p.numel() for p in group["params"]]
            decay = group.get("weight_decay")
            lr = float(group.get("max_lr", group.get("initial_lr", group.get("lr", 0))))  # OneCycleLR's first is low
            self.facts.groups.append(GroupFacts(lr, None if decay is None else float(decay), len(sizes), sum(sizes)))
        scheduler = self.config.get("scheduler") or {}
        if not scheduler:
            return
        self.facts.scheduler = str(scheduler["key"])
        steps = self._scheduler_steps(scheduler)
        if steps is not None:
            with self.attempt.noting(*self.path, "scheduler"):
                if problem := schedule_problem(box.lr_scheduler, steps):
                    raise ConfigError(problem)
                self.facts.schedule = learning_rates(box.lr_scheduler, steps)

    def _scheduler_steps(self, scheduler: Mapping[str, Any]) -> int | None:
        """How often the scheduler is asked for a new learning rate."""
        every = int(scheduler.get("scheduling_step") or 0)
        if not every:
            return self.facts.epochs
        if self.facts.steps_per_epoch is None:
            return None
        accumulated = int(self.config["optimizer"].get("grad_accum_step") or 1)
        return self.facts.epochs * self.facts.steps_per_epoch // math.lcm(every, accumulated)

    def _estimate_memory(self, box: EngineBox, saved: SavedBytes, size: int) -> None:
        models = [box.student] + ([box.teacher_model] if self.teacher is not None else [])
        tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
        trained = [p for p in parameters_of(box.optimizer) if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        scale = (self.facts.batch_size or size) / size
        self.facts.memory = MemoryFacts(
            sum(t.numel() * t.element_size() for t in tensors.values()),
            gradients,
            round(gradients * optimizer_state_factor(self.config["optimizer"])),
            round(saved.total * scale),
        )


class _Watched(nn.Module):
    """A criterion whose terms are watched one by one."""

    def __init__(self, stage: _Stage, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._stage = stage
        if isinstance(inner, AbstractLoss):
            watched = {name: (_WatchedTerm(stage, name, term), w) for name, (term, w) in inner.term_dict.items()}
            inner.term_dict = watched

    def forward(self, io_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """The criterion's value."""
        self._stage.seen["io"] = io_dict
        return self.inner(io_dict, *args, **kwargs)


class _WatchedTerm(nn.Module):
    def __init__(self, stage: _Stage, name: str, term: nn.Module) -> None:
        super().__init__()
        self.term = term
        self._stage = stage
        self._name = name

    def forward(self, *args: Any) -> Any:
        """The term's value, or zero."""
        return self._stage.term(self._name, self.term, *args)


class _Loader:
    """What a wrapper asks a data loader for: a data set with a first sample."""

    def __init__(self, dataset: Sequence[Any]) -> None:
        self.dataset = dataset


def _model_facts(section: str, key: str, model: nn.Module) -> ModelFacts:
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ModelFacts(section, key, sum(p.numel() for p in parameters), trainable)


def _copied(section: Any) -> Any:
    """The mappings and lists of a configuration anew, which torchdistill changes; objects as they are."""
    if isinstance(section, dict):
        return {key: _copied(value) for key, value in section.items()}
    return [_copied(item) for item in section] if isinstance(section, list) else section


def _grown(batch: Any, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:1].expand(size, *batch.shape[1:]).clone() if batch.ndim and len(batch) == 2 else batch
    if isinstance(batch, dict):
        return {key: _grown(value, size) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_grown(value, size) for value in batch)
    return batch


def _hook_of(config: Mapping[str, Any], path: object) -> list[Any] | None:
    """The list of hooks that ``path`` stands in."""
    for side in ("teacher", "student", "model"):
        for hooks in ((config.get(side) or {}).get("forward_hook") or {}).values():
            if isinstance(hooks, list) and path in hooks:
                return hooks
    return None


def _let_gpu_through(error: Exception) -> None:
    if isinstance(error, RuntimeError | AssertionError) and "cuda" in str(error).lower():
        raise _NeedsGPU(str(error)) from error


def _said(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _said_of(projector: nn.Module) -> str:
    """``OrthogonalProjector 192 -> 3024, matrix_exp``."""
    sizes = [getattr(projector, name, "?") for name in ("in_features", "out_features")]
    rule = getattr(projector, "orthogonal_map", None)
    return f"{type(projector).__name__} {sizes[0]} -> {sizes[1]}" + (f", {rule}" if rule else "")


def _weight(criterion: nn.Module, name: str) -> float:
    return float(criterion.term_dict[name][1]) if isinstance(criterion, AbstractLoss) else 1.0


def _common_modules(idle: list[str], everything: set[str]) -> list[str]:
    """The fewest modules that hold all of ``idle`` and nothing else of ``everything``."""
    rest = everything - set(idle)
    found: dict[str, None] = {}
    for name in idle:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if not any(other == module or other.startswith(f"{module}.") for other in rest):
                found.setdefault(module)
                break
    return list(found)
