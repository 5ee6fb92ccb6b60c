"""Parameters that weight decay leaves alone.

Decay shrinks a weight towards zero; the raw weight of an orthogonal projector only encodes a point on the
Stiefel manifold, so there is nothing to shrink. A parameter says so by carrying ``_no_weight_decay = True``
(what :class:`vkd_plugin.OrthogonalProjector` sets on its raw weight), because an optimizer is given tensors,
not modules or names.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

NO_DECAY_MARK = "_no_weight_decay"


def without_decay(params: Iterable[Any]) -> list[Any]:
    """Optimizer parameter groups in which marked parameters have ``weight_decay=0``.

    Args:
        params: what an optimizer takes: tensors, ``(name, tensor)`` pairs, or groups (dicts with ``params``).
            A group that names its own ``weight_decay`` is the user's explicit wish and stays as it is.

    Returns:
        ``params`` as a list, unchanged where no parameter is marked; otherwise groups, each split in two.
    """
    items = list(params)
    grouped = bool(items) and isinstance(items[0], dict)
    groups = items if grouped else [{"params": items}]
    split: list[dict[str, Any]] = []
    found = False
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        marked = [m for m in members if getattr(_tensor(m), NO_DECAY_MARK, False)]
        if not marked or "weight_decay" in group:
            split.append({**group, "params": members})
            continue
        found = True
        marked_ids = {id(_tensor(m)) for m in marked}
        others = [m for m in members if id(_tensor(m)) not in marked_ids]
        if others:
            split.append({**group, "params": others})
        split.append({**group, "params": marked, "weight_decay": 0.0})
    return split if found or grouped else items


def honouring_no_decay(optimizer: type[Optimizer]) -> Callable[..., Optimizer]:
    """A factory with the signature of ``optimizer`` that keeps marked parameters out of weight decay."""

    @functools.wraps(optimizer, updated=())
    def build(params: Iterable[Any], *args: Any, **kwargs: Any) -> Optimizer:
        return optimizer(without_decay(params), *args, **kwargs)

    return build


def has_weight_decay(optimizer: object) -> bool:
    """Whether ``optimizer`` is an optimizer class with a ``weight_decay`` argument."""
    return (
        inspect.isclass(optimizer)
        and issubclass(optimizer, Optimizer)
        and "weight_decay" in inspect.signature(optimizer).parameters
    )


def _tensor(member: Any) -> torch.Tensor:
    return member[1] if isinstance(member, tuple) else member
