"""One stage of training, tried in a box of the engine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchdistill.losses.high_level import AbstractLoss

from ..engine.box import EngineBox, build_box
from ..engine.build import model_sections
from ..engine.meter import TermMeter
from ..engine.precision import Precision
from ..engine.sharding import parameters_of
from ..errors import BadValue, ConfigError
from ..models.detector_labels import labels_of
from ..tasks import task_for
from ..tasks.classification import logits
from ..tasks.detection import detections
from ..wrappers import ProjectedStudent
from . import describe
from .batches import grown, two_samples
from .facts import StageFacts
from .fake import Contents, SavedBytes
from .modules import named
from .noting import Notes
from .places import leaves, place_in_stage
from .schedule import learning_rates, optimizer_state_factor, schedule_problem
from .standin import classes_of, length_of
from .watched import Watched, naming_the_module

CPU = torch.device("cpu")
_FEW = 4
"""Samples of a batch with contents."""


class Stage:
    """See the module's docstring.

    Args:
        notes: what goes wrong.
        contents: whether tensors have them.
        config: the stage's section, complete; it is changed.
        path: where it stands.
        teacher, student: bare models; the teacher may be None.
    """

    def __init__(
        self,
        notes: Notes,
        contents: Contents,
        config: dict[str, Any],
        path: tuple[str, ...],
        teacher: nn.Module | None,
        student: nn.Module,
    ) -> None:
        self.notes = notes
        self.contents = contents
        self.config = config
        self.path = path
        self.teacher = teacher
        self.student = student
        self.sides = ("teacher", "student") if teacher is not None else ("model",)
        self.datasets: dict[str, Any] = notes.experiment.data["datasets"]
        self._kept = 0.0  # numbers that the optimizer keeps for each that it trains
        self.task = task_for(notes.experiment)
        self.facts = StageFacts(path[1] if len(path) > 1 else None, int(config["num_epochs"]))

    def run(self) -> None:
        """Sets the stage up, takes a step, and notes what it comes to."""
        facts = self.notes.facts
        facts.stages.append(self.facts)
        self._count_steps(self.config["train_data_loader"])
        batch, validated = self._batch("train_data_loader"), self._batch("val_data_loader")
        if batch is None or validated is None or facts.problems:
            return
        with self.notes.collecting(*self.path, "optimizer"):  # by a step with contents, on a few numbers
            self._kept = optimizer_state_factor(self.config["optimizer"])
        with self.contents():
            self._evaluate(batch, validated)
            box = None if facts.problems else self._box(batch[0][0])
            if box is None or facts.problems:
                return
            try:
                self._describe_optimizer(box)
                self._step(box, grown(batch, self._batch_size, self.task.lists))
            finally:
                box.clean_modules()

    def _batch(self, loader: str) -> Any:
        training = loader == "train_data_loader"
        batch = two_samples(self.datasets, self.config[loader], training, self.notes, *self.path, loader)
        if batch is not None:
            with self.notes.collecting(*self.path, loader):
                self.task.unpack(batch, CPU)
        return batch

    @property
    def _batch_size(self) -> int:
        size = self.facts.batch_size or 2
        return min(size, _FEW) if self.contents.real else size

    def _count_steps(self, loader: Mapping[str, Any]) -> None:
        options = loader.get("kwargs") or {}
        size = options.get("batch_size", 1)
        if (loader.get("batch_sampler") or {}).get("kwargs"):
            size = loader["batch_sampler"]["kwargs"].get("batch_size", size)
        self.facts.batch_size = size if isinstance(size, int) else None
        self.facts.batch_is_global = bool(self.notes.experiment.data["train"].get("global_batch"))
        name = str(loader["dataset_id"])
        length = length_of(self.datasets[name], name)
        if length is not None and self.facts.batch_size:
            whole, rest = divmod(length, self.facts.batch_size)
            self.facts.steps_per_epoch = whole + bool(rest and not options.get("drop_last"))
            if not self.facts.steps_per_epoch:
                message = f"an epoch has no batch: {length} samples, batch_size {self.facts.batch_size}, drop_last"
                self.notes.problem(message, *self.path, "train_data_loader", "kwargs", "batch_size")

    # The box.

    def _box(self, sample: Any) -> EngineBox | None:
        """The box, without what of its hooks leads nowhere; None where something is wrong."""
        while True:
            try:
                with named():
                    return self._built(sample)
            except Exception as error:
                if "empty parameter list" in str(error):
                    self._say_frozen()
                    return None
                place = place_in_stage(error, self.teacher is not None)
                names: list[Any] | None = None
                if isinstance(error, BadValue):
                    # A wrapper reads what its projectors lead to as well.
                    places = (at for at in (place, ("criterion",)) if _holds(self._section(at), error.value))
                    place = next(places, place)
                    names = _list_with(self._section(place), error.value)
                with self.notes.collecting(*self.path, *place):
                    raise
                if names is None:
                    return None
                names.remove(error.value)  # so that the next is found as well

    def _section(self, place: Sequence[str | int]) -> Any:
        """What stands at ``place`` in the stage; None where nothing does."""
        section: Any = self.config
        for part in place:
            section = section.get(part) if isinstance(section, dict) else None
        return section

    def _say_frozen(self) -> None:
        side = self.sides[-1]
        key = next((key for key in ("requires_grad", "frozen_modules") if key in self.config[side]), None)
        message = "all that the optimizer was to train is frozen"
        self.notes.problem(message, *self.path, side, *([key] if key else []))

    def _built(self, sample: Any) -> EngineBox:
        loaders = [_Loader([(sample,)]), None]
        return build_box(
            lambda *_: loaders,
            Precision(self.notes.experiment.data["train"].get("amp"), CPU),
            TermMeter(),
            {},
            False,
            self.teacher,
            self.student,
            self.datasets,
            self.config,
            CPU,
            None,
            False,
            1,
        )

    def _describe_optimizer(self, box: EngineBox) -> None:
        self.facts.optimizer = str(self.config["optimizer"]["key"])
        self.facts.groups = describe.groups(box)
        if not self.config.get("scheduler"):
            return
        self.facts.scheduler = str(self.config["scheduler"]["key"])
        steps = describe.scheduler_steps(self.facts, self.config)
        if steps is not None:
            total = "total_steps" in (self.config["scheduler"].get("kwargs") or {})
            with self.notes.collecting(*self.path, "scheduler", *(("kwargs", "total_steps") if total else ())):
                if problem := schedule_problem(box.lr_scheduler, steps):
                    raise ConfigError(problem)
                self.facts.schedule = learning_rates(box.lr_scheduler, steps)

    # The step.

    def _step(self, box: EngineBox, batch: Any) -> None:
        samples, targets, supplement = self.task.unpack(batch, CPU)
        watched = Watched.in_box(box, self.notes, self.path, self.sides)
        self._check_terms(watched)
        if not any(p.requires_grad for p in parameters_of(box.optimizer)):
            self._say_frozen()
        if self.notes.facts.problems:
            return
        models = [box.student] + ([box.teacher_model] if self.teacher is not None else [])
        saved = SavedBytes(*models)
        box.student.train()
        loss: Any = None
        with self.notes.collecting(*self.path, "criterion"), saved.counting():
            loss = box.forward_process(samples, targets, supplement)
        self.facts.features = describe.features(box, watched)
        self.facts.terms = describe.terms(watched, self.config["criterion"])
        if self.notes.facts.problems:
            return
        self._check_gradients(box, watched, loss)
        self._check_hooks(box, watched)
        activations = round(saved.total * (self.facts.batch_size or len(samples)) / self._batch_size)
        self.facts.memory = describe.memory(box, self._kept, activations, *models)

    def _check_terms(self, watched: Watched) -> None:
        """That the criterion sums something up."""
        kwargs = self.config["criterion"].get("kwargs") or {}
        if not isinstance(watched.inner, AbstractLoss) or kwargs.get("model_term"):
            return
        weights = [float(weight) for _, weight in watched.inner.term_dict.values()]
        if not any(weights):
            message = "the weights of all terms are 0" if weights else "the criterion has no terms"
            self.notes.problem(message, *self.path, "criterion", *(["kwargs", "sub_terms"] if weights else []))

    def _check_gradients(self, box: EngineBox, watched: Watched, loss: Any) -> None:
        """That each term trains something, and that all that the optimizer trains is trained by something."""
        path = (*self.path, "criterion")
        for name, value in watched.values.items():
            if not value.requires_grad and watched.weight(name) != 0:
                message = "the term sends no gradient to anything that trains"
                self.notes.problem(message, *path, "kwargs", "sub_terms", name)
        if self.notes.facts.problems:
            return
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            self.notes.problem("the loss sends no gradient to anything", *path)
            return
        names = {id(p): name for name, p in box.student.named_parameters()}
        if self.teacher is not None:
            names |= {id(p): f"teacher.{name}" for name, p in box.teacher_model.named_parameters()}
        trained = [p for p in parameters_of(box.optimizer) if p.requires_grad]
        with self.notes.collecting(*path):
            gradients = torch.autograd.grad(loss.mean(), trained, allow_unused=True)
            idle = [names.get(id(p), "?") for p, g in zip(trained, gradients, strict=True) if g is None]
            self._say_idle(idle, set(names.values()))
        self._look_for_untrained(box)

    def _say_idle(self, idle: list[str], everything: set[str]) -> None:
        modules = _common_modules(idle, everything)
        taught = self.teacher is not None and [module for module in modules if module.split(".")[0] == "teacher"]
        if taught:
            whom = "it" if taught == ["teacher"] else _listed(taught)
            message = f"the teacher is not frozen, and the loss sends no gradient to {whom}"
            given = ["requires_grad"] if "requires_grad" in self.config["teacher"] else []
            self.notes.problem(f"{message}: set requires_grad to False", *self.path, "teacher", *given)
        elif modules:
            message = f"the loss sends no gradient to {_listed(modules)}"
            use = "use it in a term, or name it under frozen_modules"
            self.notes.problem(f"{message}: {use}", *self.path, self.sides[-1])

    def _look_for_untrained(self, box: EngineBox) -> None:
        """Modules that want training and stand in none of the optimizer's groups, which is rarely meant."""
        key = "module_wise_configs" if self.teacher is not None else "module_wise_kwargs"
        if not self.config["optimizer"].get(key):
            return
        trained = {id(p) for p in parameters_of(box.optimizer)}
        names = {name: p for name, p in box.student.named_parameters() if p.requires_grad}
        left = [name for name, p in names.items() if id(p) not in trained]
        if left:
            message = f"{_listed(_common_modules(left, set(names)))} of the student are not trained: they are not here"
            self.notes.warn(message, *self.path, "optimizer", key)

    def _check_hooks(self, box: EngineBox, watched: Watched) -> None:
        """That what is hooked is read; a wrapper of torchdistill's may read it too, where that cannot be seen."""
        if not isinstance(box.wrapper, ProjectedStudent | None):
            return
        for side in self.sides:
            if side == "teacher" and (self.config[side].get("auxiliary_model_wrapper") or {}):
                continue
            for path in watched.unread("student" if side == "model" else side):
                for io, hooks in (self.config[side].get("forward_hook") or {}).items():
                    if path in hooks:
                        message = f"'{path}' is hooked and no term of the loss reads it"
                        self.notes.warn(message, *self.path, side, "forward_hook", io, hooks.index(path))

    def _evaluate(self, trained: Any, validated: Any) -> None:
        """That the bare models take the data, what a sample costs, and that there is an output for each class."""
        teacher, student = model_sections(self.notes.experiment)
        models = {student: self.student} | ({teacher: self.teacher} if teacher and self.teacher else {})
        for section, model in models.items():
            facts = next(facts for facts in self.notes.facts.models if facts.role == section)
            with self.notes.collecting("models", section), _evaluating(model), naming_the_module(model):
                # In plain products, as not every torch counts the CPU's fused attention.
                with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
                    outputs = model(validated[0])
                facts.flops = flops.get_total_flops() // len(validated[0])
                if self.task.lists:
                    detections(outputs, len(validated[0]))
                    if section == student:
                        self._check_labels(model, section)
                elif section == student:
                    self._check_classes(logits(outputs).shape[1], section)
                if _size(trained[0]) != _size(validated[0]):
                    model(trained[0])

    def _check_classes(self, outputs: int, section: str) -> None:
        name = str(self.config["train_data_loader"]["dataset_id"])
        classes = classes_of(self.datasets[name])
        if classes is not None and classes > outputs:
            message = f"{outputs} outputs for the {classes} classes of data set '{name}'"
            self.notes.problem(message, "models", section, "kwargs")

    def _check_labels(self, model: nn.Module, section: str) -> None:
        """Where a detector counts its classes and the data set knows its labels: that these are among those."""
        name = str(self.config["train_data_loader"]["dataset_id"])
        known, ids = labels_of(model), getattr(self.datasets[name], "category_ids", None)
        if known is None or not ids:
            return
        path = ("models", section, "kwargs")
        if max(ids) >= known.stop:
            message = f"labels of data set '{name}' reach {max(ids)}, the detector's {known.stop - 1}"
            self.notes.problem(f"{message}: num_classes should be {max(ids) + 1}", *path, "num_classes")
        elif min(ids) < known.start:
            message = f"label {min(ids)} of data set '{name}' is the detector's background: labels should begin at 1"
            self.notes.problem(message, *path)


class _Loader:
    """What a wrapper asks a data loader for: a data set with a first sample."""

    def __init__(self, dataset: Sequence[Any]) -> None:
        self.dataset = dataset


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:  # torch's counter of operations fails where a module is handed one that is to be trained
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def _size(samples: Any) -> object:
    return samples.shape[1:] if isinstance(samples, Tensor) else None


def _holds(section: Any, value: object) -> bool:
    return any(leaf == value for _, leaf in leaves(section))


def _list_with(section: Any, value: object) -> list[Any] | None:
    """The first list in ``section`` in which ``value`` stands."""
    if isinstance(section, list) and value in section:
        return section
    children = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
    return next((found for child in children if (found := _list_with(child, value)) is not None), None)


def _listed(modules: Sequence[str]) -> str:
    return ", ".join(f"'{module}'" for module in modules[:5]) + (", ..." if len(modules) > 5 else "")


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
