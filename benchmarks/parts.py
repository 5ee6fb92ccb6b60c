"""Where a training step's time goes, by part: ranges of torch's profiler around the engine's own code.

Nothing of the engine knows of it. For one step, methods, modules and hooks of a trainer are replaced by themselves in a
named range. Time in the forward pass belongs to the innermost range. The backward pass has no such ranges, but the
profiler gives each of its nodes the sequence number of the operator that it is the derivative of; so a node belongs to
the range in which that operator ran. Accumulating gradients, and the autograd engine itself, go to the student.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from vkd_plugin.engine.train import Trainer
from vkd_plugin.losses import FeaturePair, VkDLoss
from vkd_plugin.wrappers import ProjectedFeature

TEACHER, FORWARD, BACKWARD = "teacher", "student forward", "student backward"
PROJECTOR, VKD, LOSSES = "projector", "normalisation and distance", "other losses"
HOOKS, OPTIMIZER, FIGURES, REST = "hooks and readouts", "optimizer", "figures", "rest"
PARTS = (TEACHER, FORWARD, BACKWARD, PROJECTOR, VKD, LOSSES, HOOKS, OPTIMIZER, FIGURES, REST)
NEEDED = (TEACHER, FORWARD, BACKWARD, OPTIMIZER)
"""What any distillation has."""
_RANGE = "part: "
_NODE = "autograd::engine::evaluate_function"


def parts(trainer: Trainer, step: Callable[[], object], device: torch.device, steps: int = 1) -> dict[str, float]:
    """Part of a step -> its share of the time: the host's on a CPU, the kernels' on a GPU.

    A projector inside a compiled student is part of the student.

    Args:
        trainer: of an experiment with a teacher.
        step: lets it take one.
        device: where.
        steps: over which the shares are taken.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with ExitStack() as stack:
        for undo in _name_everything(trainer):
            stack.callback(undo)
        stack.enter_context(_named_backward())
        whole = _ranged(REST, step)
        whole()  # what is compiled sees that it has been replaced
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                whole()
                if device.type == "cuda":
                    torch.cuda.synchronize()
    took = _attributed(list(recorded.events()), _self_time(device))
    total = sum(took.values())
    return {name: took[name] / total for name in PARTS}


def _self_time(device: torch.device) -> Callable[[FunctionEvent], float]:
    return _time_of_kernels if device.type == "cuda" else lambda event: event.self_cpu_time_total


def _time_of_kernels(event: FunctionEvent) -> float:
    """Of those that an operator launched itself; a range is drawn on the device, too, over all that it spans."""
    return 0.0 if event.name.startswith(_RANGE) else sum(kernel.duration for kernel in event.kernels)


def _attributed(events: list[FunctionEvent], time: Callable[[FunctionEvent], float]) -> dict[str, float]:
    """The time of each part, in the profiler's microseconds."""
    took: dict[str, float] = defaultdict(float)
    nodes: list[FunctionEvent] = []  # of the backward pass
    operators: dict[int, tuple[float, str]] = {}  # sequence number -> start of the last operator that has it, its part

    def walk(event: FunctionEvent, part: str) -> None:
        if event.name.startswith(_NODE):
            nodes.append(event)
            return
        part = event.name.removeprefix(_RANGE) if event.name.startswith(_RANGE) else part
        took[part] += time(event)
        if event.sequence_nr >= 0:  # operators that make no node have the number of the next one that does
            operators[event.sequence_nr] = max(operators.get(event.sequence_nr, (-1.0, "")), (_start(event), part))
        for child in event.cpu_children:
            walk(child, part)

    def walk_node(event: FunctionEvent, part: str) -> None:
        took[part] += time(event)
        for child in event.cpu_children:
            walk_node(child, part)

    for event in events:
        on_the_host = event.device_type == DeviceType.CPU
        if on_the_host and event.cpu_parent is None and event.name.startswith((_RANGE, _NODE)):
            walk(event, REST)
    for node in nodes:
        _, part = operators.get(node.sequence_nr, (0.0, BACKWARD))
        walk_node(node, BACKWARD if part in (FORWARD, REST) else part)
    return took


def _start(event: FunctionEvent) -> float:
    return event.time_range.start


def _ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + part):
            return function(*args, **kwargs)

    return run


def _name_everything(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Puts ranges around the parts of a step; gives what takes each away again."""
    box = trainer.box
    yield _replace(box, "get_teacher_output", TEACHER)
    yield _replace(box, "post_forward_process", OPTIMIZER)
    for owner, name in ((trainer.watch, "see"), (trainer.terms, "take"), (trainer, "_between_steps")):
        yield _replace(owner, name, FIGURES)
    yield from _name_hooks(box.teacher_model, HOOKS)
    yield from _name_student(box.student)
    yield _replace(box.criterion, "forward", LOSSES)
    for term, _ in box.criterion.term_dict.values():
        yield from _name_hooks(term, FIGURES)
        if isinstance(term, FeaturePair):
            yield _replace(term, "forward", HOOKS)
            yield _replace(term.criterion, "forward", VKD if isinstance(term.criterion, VkDLoss) else LOSSES)


def _name_student(student: nn.Module) -> Iterator[Callable[[], None]]:
    if student._compiled_call_impl is not None:
        yield _replace(student, "_compiled_call_impl", FORWARD)
        return
    yield _replace(student, "forward", FORWARD)
    yield from _name_hooks(student, HOOKS)
    for module in student.modules():
        if isinstance(module, ProjectedFeature):
            yield _replace(module, "forward", HOOKS)
            yield _replace(module.projector, "forward", PROJECTOR)


def _replace(owner: Any, name: str, part: str) -> Callable[[], None]:
    """An attribute of this object, not of its class, until what is returned is called."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = _ranged(part, getattr(owner, name))

    def undo() -> None:
        del owner.__dict__[name]
        if own is not None:
            owner.__dict__[name] = own

    return undo


def _name_hooks(model: nn.Module, part: str) -> Iterator[Callable[[], None]]:
    if model._compiled_call_impl is not None:
        return
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                hooks[key] = _ranged(part, hook)
                yield lambda hooks=hooks, key=key, hook=hook: hooks.__setitem__(key, hook)  # type: ignore[misc]


@contextmanager
def _named_backward() -> Iterator[None]:
    backward = torch.autograd.backward
    torch.autograd.backward = _ranged(BACKWARD, backward)
    try:
        yield
    finally:
        torch.autograd.backward = backward
