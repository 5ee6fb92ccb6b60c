"""What the training loop itself costs: run.py's engine against a bare PyTorch loop and torchdistill's own loop.

    OMP_NUM_THREADS=1 python -m benchmarks.engine [--experiments quickstart] [--rounds 10] [--json FILE]

Three loops train the same experiment from the same weights, an epoch each in turn, in one process on a CPU:

* **bare**: written by hand, the same mathematics and no more: torch's DataLoader, the teacher's forward pass, the
  student's forward and backward pass, AdamW, the schedule, ``loss.item()`` at every hundredth step.
* **torchdistill**: its box, driven as its example script does (without printing): the loss read back and averaged at
  every step.
* **engine**: run.py's, from the first batch's request to the proof that weights and projector are sound: addressed
  randomness, each loss term and the gradient's norm read back, the guard against bad numbers, TensorBoard.

Validation and checkpoints are left out, as the bare loop has none. Printed are medians over the rounds and ratios of
these, the part of its time in which the engine waited for data, and, from a few epochs more with timers in them, what a
step consists of. Students this small are the worst case: what a loop adds to a step does not grow with the student.
"""

import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchdistill.common import yaml_util
from torchdistill.core.distillation import get_distillation_box
from torchdistill.misc.log import MetricLogger, SmoothedValue

from benchmarks.measuring import in_turn, of_experiments, ratios, save, taken
from vkd_plugin.config import Experiment, load_experiment
from vkd_plugin.decay import no_matrices
from vkd_plugin.engine import train as engine_train
from vkd_plugin.engine.board import Board
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.loaders import set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer
from vkd_plugin.projectors import OrthogonalProjector

CONFIGS = {
    "quickstart": "configs/digits/vkd/vit_from_cnn.yaml",
    "fashion_mnist": "configs/fashion_mnist/vkd/vit_from_cnn.yaml",
}
CPU = torch.device("cpu")
EPOCHS = 10_000
"""More than a benchmark makes: the schedules end with the run."""
PARTS = ("data", "teacher", "student, losses", "backward", "optimizer", "figures")


class Parts:
    """The processor's seconds by what they were spent on: each call's own, without those of the calls within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted as ``part``."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                self.seconds[part] += whole - self._inner.pop()
                self._inner[-1] += whole

        return inner

    def iterated(self, part: str, iterable: Iterable[Any]) -> Iterator[Any]:
        """What ``iterable`` yields, the time that it takes to counted as ``part``."""
        take = self.timed(part, next)
        iterator = self.timed(part, iter)(iterable)
        end = object()
        while (item := take(iterator, end)) is not end:
            yield item

    def watch(self, part: str, owner: Any, *names: str) -> Any:
        """Counts calls of methods of one object; a context manager."""
        stack = ExitStack()
        for name in names:
            stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
        return stack


class Loop(Protocol):
    """One of the three.

    Attributes:
        name: in tables.
        steps: of an epoch.
    """

    name: str
    steps: int

    def epoch(self) -> None: ...

    def step(self, images: Tensor, labels: Tensor) -> float:
        """A training step on a batch, which need not be the loader's; its loss before the step."""
        ...

    def timers(self, parts: Parts) -> Any:
        """Watches what an epoch consists of, within a context."""
        ...


class Bare:
    """The loop that one would write for this one experiment.

    Args:
        experiment: a classifier with the terms ``ce``, ``kl`` and ``vkd`` and one projected feature.
        like: where the first weights come from.
    """

    name = "bare"

    def __init__(self, experiment: Experiment, like: "Engine") -> None:
        train: dict[str, Any] = experiment.data["train"]
        student_section = model_sections(experiment)[1]
        self.teacher: Any = build_model(experiment, "teacher_model", CPU, False).eval().requires_grad_(False)
        self.student: Any = build_model(experiment, student_section, CPU, False)
        self.student.load_state_dict(like.trainer.box.bare_student.state_dict())
        theirs: Any = like.trainer.box.wrapper.features["tokens"].projector
        self.projector = OrthogonalProjector(theirs.in_features, theirs.out_features, theirs.orthogonal_map)
        self.projector.load_state_dict(theirs.state_dict())
        self.rows: dict[str, Tensor] = {}
        self.teacher.get_submodule("final_conv").register_forward_hook(
            lambda module, inputs, output: self.rows.update(teacher=output.mean((2, 3)))
        )
        self.student.norm.register_forward_hook(
            lambda module, inputs, output: self.rows.update(student=output[:, self.student.num_prefix_tokens :].mean(1))
        )
        terms = train["criterion"]["kwargs"]["sub_terms"]
        self.weights = {name: terms[name]["weight"] for name in ("ce", "kl", "vkd")}

        options = {**train["optimizer"]["kwargs"]}
        exempt = no_matrices(self.student) if options.pop("weight_decay_of", "all") == "matrices" else set()
        decayed = [p for p in self.student.parameters() if id(p) not in exempt]
        others = [p for p in self.student.parameters() if id(p) in exempt] + list(self.projector.parameters())
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, **options)
        schedule = train["scheduler"]
        self.schedule = like.schedule(self.optimizer)
        self.each_step = bool(schedule.get("scheduling_step"))

        section = train["train_data_loader"]
        dataset = experiment.data["datasets"][section["dataset_id"]]
        self.loader: Any = DataLoader(dataset, shuffle=True, **section["kwargs"])
        self.steps = len(self.loader)

    def epoch(self) -> None:
        self.student.train()
        for index, (images, labels) in enumerate(self.loader):
            loss = self._step(images, labels)
            if index % 100 == 0:
                loss.item()
        if not self.each_step:
            self.schedule.step()

    def step(self, images: Tensor, labels: Tensor) -> float:
        return self._step(images, labels).item()

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        taught = self._teach(images)
        loss = self._loss(images, labels, taught)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.each_step:
            self.schedule.step()
        return loss

    def _teach(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(images)

    def _loss(self, images: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        logits = self.student(images)
        ce = F.cross_entropy(logits, labels)
        kl = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)
        target = self.rows["teacher"]
        feature = F.smooth_l1_loss(self.projector(self.rows["student"]), F.layer_norm(target, target.shape[1:]))
        return self.weights["ce"] * ce + self.weights["kl"] * kl + self.weights["vkd"] * feature

    def timers(self, parts: Parts) -> Any:
        stack = _common_timers(parts, self.optimizer, self.schedule)
        stack.enter_context(parts.watch("teacher", self, "_teach"))
        stack.enter_context(parts.watch("student, losses", self, "_loss"))
        stack.enter_context(mock.patch.object(self, "loader", _Timed(parts, self.loader)))
        return stack


class Torchdistill:
    """torchdistill's box in the loop of its example script for image classification.

    Args:
        config: the experiment's file, which torchdistill reads by itself.
        like: where the first weights come from.
    """

    name = "torchdistill"

    def __init__(self, config: str, like: "Engine") -> None:
        data = yaml_util.load_yaml_file(config)
        train: dict[str, Any] = data["train"]
        train["num_epochs"] = EPOCHS
        train["scheduler"]["kwargs"]["total_steps"] = like.total_steps
        self.log_every: int = train["log_freq"]
        teacher = build_model(like.experiment, "teacher_model", CPU, False)
        student = copy.deepcopy(like.bare_student)
        self.box: Any = get_distillation_box(teacher, student, data["datasets"], train, CPU, None, False, 1)
        self.box.student_model.load_state_dict(like.trainer.box.student.state_dict())  # the student's alone
        self.box.student_model.features.load_state_dict(like.trainer.box.wrapper.features.state_dict())
        self.steps = len(self.box.train_data_loader)
        self.done = 0

    def epoch(self) -> None:
        box = self.box
        box.pre_epoch_process(epoch=self.done)
        figures = MetricLogger(delimiter="  ")
        figures.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        figures.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
        for images, labels, supplement in figures.log_every(box.train_data_loader, self.log_every, "epoch"):
            start = time.time()
            images, labels = images.to(CPU), labels.to(CPU)
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss=loss)
            figures.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            figures.meters["img/s"].update(len(images) / (time.time() - start))
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss}")
        box.post_epoch_process()
        self.done += 1

    def step(self, images: Tensor, labels: Tensor) -> float:
        loss = self.box.forward_process(images, labels, {})
        self.box.post_forward_process(loss=loss)
        return loss.item()

    def timers(self, parts: Parts) -> Any:
        stack = _common_timers(parts, self.box.optimizer, self.box.lr_scheduler)
        _box_timers(stack, parts, self.box)
        stack.enter_context(parts.watch("figures", MetricLogger, "update"))
        loader = _Timed(parts, self.box.train_data_loader)
        stack.enter_context(mock.patch.object(self.box, "train_data_loader", loader))
        return stack


class Engine:
    """run.py's loop; see :meth:`~vkd_plugin.engine.train.Trainer.train`.

    Args:
        config: the experiment's file; a cache of the teacher's outputs in it is left out.
        folder: for TensorBoard's events.
        changes: to the experiment, as ``--set`` has them.
    """

    name = "engine"

    def __init__(self, config: str, folder: Path, changes: Iterable[str] = ()) -> None:
        plain: Any = yaml_util.load_yaml_file(config)["train"]["scheduler"]["kwargs"]
        self.total_steps = EPOCHS * max(1, plain["total_steps"] // 10)  # of epochs or of steps: enough in any case
        changes = [
            f"train.num_epochs={EPOCHS}",
            f"train.scheduler.kwargs.total_steps={self.total_steps}",
            "train.teacher_cache=null",
            *changes,
        ]
        self.experiment = load_experiment(config, changes)
        torch.manual_seed(0)
        teacher, student = (
            build_model(self.experiment, key, CPU, False) for key in model_sections(self.experiment) if key
        )
        self.bare_student = copy.deepcopy(student)  # before it is hooked
        self.trainer = Trainer(self.experiment, teacher, student, Processes(0, 1, CPU), None, seed=0)
        self.trainer.watch.board = Board(folder)
        self.steps = len(self.trainer._train_loader())
        self.waits: list[float] = []  # the part of each epoch's time

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Another of the experiment's schedule, for ``optimizer``."""
        kwargs = self.experiment.data["train"]["scheduler"]["kwargs"]
        return type(self.trainer.box.lr_scheduler)(optimizer, **kwargs)

    def epoch(self) -> None:
        trainer = self.trainer
        loader = trainer._train_loader()
        trainer.box.pre_epoch_process(epoch=trainer.epoch)
        set_position(loader, trainer.epoch, trainer.position)
        trainer._train_batches(loader, trainer.box.num_epochs)
        trainer.watch.prove()
        trainer.watch.means_of_all()
        self.waits.append(trainer.pace.data_wait_share)
        trainer._count_epoch()
        trainer.box.post_epoch_process(metrics=0.0)

    def step(self, images: Tensor, labels: Tensor) -> float:
        trainer, loader = self.trainer, self.trainer._train_loader()
        set_position(loader, trainer.epoch, trainer.position)
        trainer._step((images, labels, {}), loader, False)
        return trainer.watch.newest["loss"]

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        if self.trainer.watch.board is not None:
            self.trainer.watch.board.close()

    def timers(self, parts: Parts) -> Any:
        box, watch = self.trainer.box, self.trainer.watch
        stack = _common_timers(parts, box.optimizer, box.lr_scheduler)
        _box_timers(stack, parts, box)
        stack.enter_context(parts.watch("figures", box, "_measure_gradients"))
        stack.enter_context(parts.watch("figures", watch, "see", "prove", "means_of_all"))
        stack.enter_context(parts.watch("figures", box.terms, "take"))
        batches_of = engine_train.batches_of
        stack.enter_context(
            mock.patch.object(engine_train, "batches_of", lambda loader: parts.iterated("data", batches_of(loader)))
        )
        return stack


class _Timed:
    """A loader whose time is counted, with the length that torchdistill asks for."""

    def __init__(self, parts: Parts, loader: DataLoader[Any]) -> None:
        self.parts, self.loader = parts, loader

    def __iter__(self) -> Iterator[Any]:
        return self.parts.iterated("data", self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def _common_timers(parts: Parts, optimizer: torch.optim.Optimizer, schedule: Any) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(parts.watch("backward", Tensor, "backward"))
    stack.enter_context(parts.watch("optimizer", optimizer, "step", "zero_grad"))
    stack.enter_context(parts.watch("optimizer", schedule, "step"))
    return stack


def _box_timers(stack: ExitStack, parts: Parts, box: Any) -> None:
    stack.enter_context(parts.watch("teacher", box, "get_teacher_output"))
    stack.enter_context(parts.watch("student, losses", box, "forward_process"))


def loops(config: str, folder: Path, changes: Iterable[str] = ()) -> tuple["Engine", Bare, Torchdistill]:
    """The three, with the same weights; ``changes`` reach the engine's experiment and the bare loop's."""
    engine = Engine(config, folder, changes)
    return engine, Bare(engine.experiment, engine), Torchdistill(config, engine)


def consists_of(loop: Loop, epochs: int) -> dict[str, float]:
    """Milliseconds of the processor in a step, by part; ``rest`` is what is left."""
    parts, steps = Parts(), loop.steps * epochs
    with loop.timers(parts):
        whole = sum(taken(loop.epoch).cpu for _ in range(epochs))
    found = {name: 1e3 * parts.seconds[name] / steps for name in PARTS}
    return found | {"rest": 1e3 * whole / steps - sum(found.values())}


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Figures of one experiment."""
    with tempfile.TemporaryDirectory() as folder:
        engine, bare, torchdistill = loops(config, Path(folder))
        turns: list[Loop] = [bare, torchdistill, engine]
        for loop in turns:
            loop.epoch()  # warm
        engine.waits.clear()
        times = in_turn({loop.name: loop.epoch for loop in turns}, rounds)
        result = {
            "steps": engine.steps,
            "milliseconds": {name: [1e3 * t / engine.steps for t in found] for name, found in times.items()},
            "ratio": ratios(times, Bare.name),
            "data_wait_share": statistics.median(engine.waits),
            "parts": {loop.name: consists_of(loop, max(1, rounds // 4)) for loop in turns},
        }
        engine.close()
    return result


def report(name: str, result: dict[str, Any]) -> None:
    loops = list(result["ratio"])
    print(f"\n{name}, {result['steps']} steps an epoch")

    def line(title: str, values: Iterable[float], digits: int) -> None:
        print(f"{title:26}" + "".join(f"{value:14.{digits}f}" for value in values))

    print(f"{'':26}" + "".join(f"{loop:>14}" for loop in loops))
    for index, kind in enumerate(("", ", processor")):
        line(f"ms a step{kind}", (result["milliseconds"][loop][index] for loop in loops), 2)
        line(f"/ bare{kind}", (result["ratio"][loop][index] for loop in loops), 3)
    print("  of the processor's ms:")
    for part in (*PARTS, "rest"):
        line(f"  {part}", (result["parts"][loop][part] for loop in loops), 3)
    print(f"the engine waited for data {100 * result['data_wait_share']:.1f} % of its time", flush=True)


def main(argv: list[str] | None = None) -> None:
    file, about, results = of_experiments(
        "engine", __doc__, CONFIGS, "epochs of each loop that are counted", measure, report, argv
    )
    save(file, about, results)


if __name__ == "__main__":
    main()
