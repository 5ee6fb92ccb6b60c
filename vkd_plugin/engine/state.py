"""What a checkpoint holds: everything that decides how training goes on, as tensors and plain values.

``model`` holds the student under its own names, so a checkpoint loads into the bare student by torchdistill's
``load_ckpt`` as well; the projectors stand apart under ``projectors``.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.high_level import AbstractLoss

from ..errors import UserError
from ..wrappers import ProjectedStudent
from .box import EngineBox
from .sharding import like, local, optimizer_state_like, parameters_of, state_like, whole


def training_state(box: EngineBox) -> dict[str, Any]:
    """Models, optimizer, scheduler and losses of a box; all processes have to ask, as tensors may be in shards."""
    scheduler = box.lr_scheduler
    return {
        "model": whole(box.bare_student.state_dict()),
        "projectors": whole(projectors_state(box.wrapper, box.bare_student)),
        "teacher": _teacher_state(box),
        "optimizer": whole(box.optimizer.state_dict()),
        "lr_scheduler": scheduler.state_dict() if scheduler is not None else None,
        "classes": {"optimizer": _class_name(box.optimizer), "lr_scheduler": _class_name(scheduler)},
        "stage_grad_count": box.stage_grad_count,
    }


def load_training_state(box: EngineBox, state: Mapping[str, Any], changed: tuple[str, ...] = ()) -> list[str]:
    """Loads what :func:`training_state` returned.

    Args:
        box: of the same stage.
        state: see above.
        changed: ``optimizer`` and ``scheduler``, where the configuration of these is not what it was. With either,
            the optimizer's options are those of the configuration, and the learning rate is what it would be had the
            present schedule been followed from the beginning.

    Returns:
        What could not be taken over, a sentence each.

    Raises:
        UserError, RuntimeError, ValueError, KeyError: it does not fit.
    """
    notes = []
    box.bare_student.load_state_dict(state_like(state["model"], box.bare_student))
    load_projectors(box.wrapper, state["projectors"])
    _load_teacher(box, state.get("teacher") or {})
    classes = state.get("classes") or {}
    if classes.get("optimizer", _class_name(box.optimizer)) == _class_name(box.optimizer):
        _load_optimizer(box.optimizer, state["optimizer"], keep_options=bool(changed))
    else:
        notes.append(f"{_class_name(box.optimizer)} starts anew: the checkpoint's optimizer is {classes['optimizer']}")
    notes += _load_scheduler(box, state["lr_scheduler"], classes.get("lr_scheduler"), bool(changed))
    box.stage_grad_count = state["stage_grad_count"]
    return notes


def rank_state(box: EngineBox) -> dict[str, Any]:
    """What each process has of its own: losses with a memory, and gradients that wait for more batches."""
    state: dict[str, Any] = {"criterion": {name: term.state_dict() for name, term in _criterion_parts(box)}}
    state |= {"gradients": None, "accumulation": None}
    if box.stage_grad_count % box.grad_accum_step:
        state["gradients"] = [None if p.grad is None else local(p.grad).clone() for p in parameters_of(box.optimizer)]
        state["accumulation"] = box.accumulation()
    return state


def load_rank_state(box: EngineBox, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
    """Loads what :func:`rank_state` returned in each process, by rank.

    With another number of processes one that is new takes over the first one's losses; waiting gradients are averaged,
    as they would have been at the optimizer's step.
    """
    own = states[rank] if rank < len(states) else states[0]
    for name, term in _criterion_parts(box):
        if name in own["criterion"]:
            term.load_state_dict(own["criterion"][name])
    if own["accumulation"] is not None:
        box.load_accumulation(own["accumulation"])
    waiting = [state["gradients"] for state in states if state["gradients"] is not None]
    trained = parameters_of(box.optimizer)
    if len(waiting) != len(states) or any(len(gradients) != len(trained) for gradients in waiting):
        return
    for index, parameter in enumerate(trained):
        mine = waiting[rank][index] if len(states) == world_size else None
        found = [gradients[index] for gradients in waiting if gradients[index] is not None]
        if not found or (mine is None and len(states) == world_size):
            continue
        if mine is not None:
            gradient = torch.zeros_like(parameter)
            local(gradient).copy_(mine)
        elif all(part.shape == parameter.shape for part in found):
            gradient = torch.zeros_like(parameter)
            gradient.copy_(like(torch.stack(found).sum(dim=0) / len(states), parameter))
        else:  # shards, of which the others are not at hand
            raise UserError(
                "within an accumulation, sharded gradients can only go on with the same number of processes"
            )
        parameter.grad = gradient


# Models.


def projectors_state(wrapper: nn.Module | None, student: nn.Module) -> dict[str, Tensor]:
    """What an auxiliary wrapper trains beside the student: projectors, or another wrapper's own layers."""
    if wrapper is None:
        return {}
    if isinstance(wrapper, ProjectedStudent):
        return wrapper.projector_state_dict()
    return {name: tensor.detach() for name, tensor in _beside(wrapper, student)}


def load_projectors(wrapper: nn.Module | None, state: Mapping[str, Tensor]) -> None:
    """Loads what :func:`projectors_state` returned.

    Raises:
        UserError: names or shapes do not fit the wrapper.
    """
    if isinstance(wrapper, ProjectedStudent):
        wrapper.load_projector_state_dict(state_like(state, wrapper.features))
    elif wrapper is not None:
        _copy_into(dict(_tensors(wrapper)), state, type(wrapper).__name__)


def _teacher_state(box: EngineBox) -> dict[str, Tensor]:
    """What is trained on the teacher's side: layers around it, and the teacher itself where it is not frozen."""
    if not isinstance(box, DistillationBox):
        return {}
    teacher = box.teacher_model
    if any(p.requires_grad for p in box.org_teacher_model.parameters()):
        return {name: tensor.detach() for name, tensor in _tensors(teacher)}
    return {name: tensor.detach() for name, tensor in _beside(teacher, box.org_teacher_model)}


def _load_teacher(box: EngineBox, state: Mapping[str, Tensor]) -> None:
    if state and isinstance(box, DistillationBox):
        _copy_into(dict(_tensors(box.teacher_model)), state, "the teacher's side")


def _beside(around: nn.Module, inner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    of_inner = {id(tensor) for _, tensor in _tensors(inner)}
    return ((name, tensor) for name, tensor in _tensors(around) if id(tensor) not in of_inner)


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, named as if there were no DistributedDataParallel: one process may load them."""
    if isinstance(module, DistributedDataParallel):
        yield from _tensors(module.module, prefix)
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.")


def _copy_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor], owner: str) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in own:
                raise UserError(f"the checkpoint's '{name}' is not part of {owner}")
            own[name].copy_(like(tensor, own[name]))


def _criterion_parts(box: EngineBox) -> Iterator[tuple[str, nn.Module]]:
    """Losses that have a state of their own, such as a memory of features. torchdistill keeps them in plain dicts."""
    criterion = box.criterion
    parts = {".": criterion}
    if isinstance(criterion, AbstractLoss):
        parts |= {name: term for name, (term, _) in criterion.term_dict.items()}
    return ((name, part) for name, part in parts.items() if isinstance(part, nn.Module) and part.state_dict())


# Optimizer and schedule.


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], keep_options: bool) -> None:
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer_state_like(state, optimizer))
    if keep_options:
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)


def _load_scheduler(
    box: EngineBox, state: Mapping[str, Any] | None, saved_class: str | None, changed: bool
) -> list[str]:
    scheduler = box.lr_scheduler
    if scheduler is None or (not changed and state is None):
        return []
    same_class = saved_class in (None, _class_name(scheduler))
    if not changed and same_class:
        scheduler.load_state_dict(state)
        return []
    if isinstance(scheduler, ReduceLROnPlateau):
        return ["ReduceLROnPlateau starts anew: it cannot be followed from the beginning without the metrics"]
    steps = int((state or {}).get("last_epoch", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the optimizer made no steps in between
        for _ in range(steps):
            scheduler.step()
    return [f"the learning rate follows the changed schedule as of its step {steps}"]


def _class_name(thing: object) -> str | None:
    return None if thing is None else type(thing).__name__
