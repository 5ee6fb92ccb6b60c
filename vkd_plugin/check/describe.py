"""What a stage comes to, told by its box."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.high_level import AbstractLoss

from ..engine.box import EngineBox
from ..engine.sharding import parameters_of
from .facts import FeatureFacts, GroupFacts, MemoryFacts, StageFacts, TermFacts
from .watched import Watched


def features(box: EngineBox, watched: Watched) -> list[FeatureFacts]:
    """What is hooked, with shapes, and with the projector of a projected feature."""
    wrapper = box.wrapper
    projected = dict(getattr(wrapper, "features", {}).items()) if wrapper is not None else {}
    found = []
    for side, hooked in watched.io.items():
        for path, io in sorted(hooked.items()):  # torchdistill hooks a set
            for kind, value in io.items():
                if path == "." and kind == "input":
                    continue
                shape: list[int] | str = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                feature = projected.get(path.removeprefix("features.")) if side == "student" else None
                projector = None if feature is None else _projector(feature.projector)
                found.append(FeatureFacts(side, path, kind, shape, projector))
    return found


def _projector(projector: nn.Module) -> str:
    """``OrthogonalProjector 192 -> 3024, matrix_exp``."""
    sizes = [getattr(projector, name, "?") for name in ("in_features", "out_features")]
    rule = getattr(projector, "orthogonal_map", None)
    return f"{type(projector).__name__} {sizes[0]} -> {sizes[1]}" + (f", {rule}" if rule else "")


def terms(watched: Watched, config: Mapping[str, Any]) -> list[TermFacts]:
    """The terms of the criterion that the section ``config`` describes."""
    if not isinstance(watched.inner, AbstractLoss):
        return []
    sections = (config.get("kwargs") or {}).get("sub_terms") or {}
    found = []
    for name, (_, weight) in watched.inner.term_dict.items():
        criterion = sections.get(name, {}).get("criterion")  # a tag may have made the loss itself
        key = str(criterion["key"]) if isinstance(criterion, dict) else type(criterion).__name__
        value = watched.values.get(name)
        found.append(TermFacts(name, key, float(weight), value is not None and value.requires_grad))
    return found


def groups(box: EngineBox) -> list[GroupFacts]:
    """The optimizer's parameter groups."""
    found = []
    for group in box.optimizer.param_groups:
        sizes = [p.numel() for p in group["params"]]
        decay = group.get("weight_decay")
        lr = float(group.get("max_lr", group.get("initial_lr", group.get("lr", 0))))  # OneCycleLR's first is low
        found.append(GroupFacts(lr, None if decay is None else float(decay), len(sizes), sum(sizes)))
    return found


def scheduler_steps(stage: StageFacts, config: Mapping[str, Any]) -> int | None:
    """How often the scheduler of the stage that ``config`` describes is asked for a new learning rate."""
    every = int(config["scheduler"].get("scheduling_step") or 0)
    if not every:
        return stage.epochs
    if stage.steps_per_epoch is None:
        return None
    accumulated = int(config["optimizer"].get("grad_accum_step") or 1)
    return stage.epochs * stage.steps_per_epoch // math.lcm(every, accumulated)


def memory(box: EngineBox, kept: float, activations: int, *models: nn.Module) -> MemoryFacts:
    """An estimate of what one process allocates.

    Args:
        box: the stage's.
        kept: numbers that the optimizer keeps for each that it trains.
        activations: bytes that wait for the backward pass.
        models: all of them.
    """
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    trained = [p for p in parameters_of(box.optimizer) if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    return MemoryFacts(weights, gradients, round(gradients * kept), activations)
