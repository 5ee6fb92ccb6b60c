"""Parameters that weight decay leaves alone.

Decay shrinks a weight towards zero; the raw weight of an orthogonal projector only encodes a point on the
Stiefel manifold, so there is nothing to shrink. A parameter says so by carrying ``_no_weight_decay = True``
(what :class:`vkd_plugin.OrthogonalProjector` sets on its raw weight), because an optimizer is given tensors,
not modules or names.

Vision transformers are usually trained without decay of biases, normalisation and position tables as well. An optimizer
of torchdistill's registry does so with ``weight_decay_of: 'matrices'`` among its arguments:

.. code-block:: YAML

    optimizer:
      key: 'AdamW'
      kwargs: {lr: 5.0e-4, weight_decay: 0.05, weight_decay_of: 'matrices'}

or in single modules of the student alone, while of all others everything decays: ``{backbone: 'matrices'}``.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from .arguments import one_of
from .errors import BadValue
from .suggest import nearest

NO_DECAY_MARK = "_no_weight_decay"
Rule: TypeAlias = str | Mapping[str, str]
DECAYED = ("all", "matrices")
"""Choices of ``weight_decay_of``: everything but marked parameters; or also without what :func:`no_matrices` names."""


def no_matrices(*models: nn.Module) -> set[int]:
    """``id`` of each parameter with fewer than two dimensions, and of those in the models' ``no_weight_decay()``.

    The latter is timm's convention for position tables and tokens; a module's names count from itself.
    """
    found = {id(p) for model in models for p in model.parameters() if p.ndim < 2}
    for model in models:
        for module in model.modules():
            if callable(getattr(module, "no_weight_decay", None)):
                own = dict(module.named_parameters())
                names: set[str] = module.no_weight_decay()  # type: ignore[operator]
                found |= {id(own[name]) for name in names if name in own}
    return found


def exempt_in_modules(rules: Mapping[str, str], models: Sequence[nn.Module]) -> set[int]:
    """``id`` of each parameter that is left alone where rules are given for modules.

    Args:
        rules: path -> one of DECAYED, for what lies below it; of a module within a module, the inner one's counts.
        models: in the first that has the path it is looked up.

    Raises:
        BadValue: no model has such a module; the nearest is named.
        ValueError: an unknown rule.
    """
    exempt: set[int] = set()
    named = no_matrices(*models)
    for path in sorted(rules, key=len):
        rule = one_of(f"weight_decay_of '{path}'", rules[path], DECAYED)
        found = next((m for model in models for name, m in model.named_modules() if name == path), None)
        if found is None:
            paths = [name for name, _ in models[0].named_modules() if name] if models else []
            raise BadValue(f"weight_decay_of: the student has no module '{path}'{nearest(path, paths)}", path)
        own = {id(p) for p in found.parameters()}
        exempt = exempt - own if rule == "all" else exempt | (own & named)
    return exempt


def without_decay(params: Iterable[Any], exempt: Callable[[torch.Tensor], bool] | None = None) -> list[Any]:
    """Optimizer parameter groups in which some parameters have ``weight_decay=0``.

    Args:
        params: what an optimizer takes: tensors, ``(name, tensor)`` pairs, or groups (dicts with ``params``).
            A group that names its own ``weight_decay`` is the user's explicit wish and stays as it is.
        exempt: which parameters; by default those that are marked.

    Returns:
        ``params`` as a list, unchanged where no parameter is exempt; otherwise groups, each split in two.
    """
    exempt = exempt or is_marked
    items = list(params)
    grouped = bool(items) and isinstance(items[0], dict)
    groups = items if grouped else [{"params": items}]
    split: list[dict[str, Any]] = []
    found = False
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        marked = [m for m in members if exempt(_tensor(m))]
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


def is_marked(parameter: torch.Tensor) -> bool:
    """Whether a parameter carries the mark."""
    return bool(getattr(parameter, NO_DECAY_MARK, False))


def honouring_no_decay(
    optimizer: type[Optimizer], models: Callable[[], Iterable[nn.Module]] = tuple
) -> Callable[..., Optimizer]:
    """A factory like ``optimizer`` that keeps parameters out of weight decay; see the module's docstring.

    Args:
        optimizer: the class.
        models: gives those whose parameters are trained, the bare student first, for the names in their
            ``no_weight_decay()`` and for paths.

    Returns:
        A function with the signature of ``optimizer`` and ``weight_decay_of``, one of DECAYED, or a mapping to these
        from paths of modules of the student (:func:`exempt_in_modules`).
    """

    @functools.wraps(optimizer, updated=())
    def build(params: Iterable[Any], *args: Any, weight_decay_of: Rule = "all", **kwargs: Any) -> Optimizer:
        exempt = is_marked
        if isinstance(weight_decay_of, Mapping):
            named = exempt_in_modules(weight_decay_of, list(models()))

            def exempt(parameter: torch.Tensor) -> bool:
                return is_marked(parameter) or id(parameter) in named

        elif one_of("weight_decay_of", weight_decay_of, DECAYED) == "matrices":
            named = no_matrices(*models())

            def exempt(parameter: torch.Tensor) -> bool:
                return is_marked(parameter) or parameter.ndim < 2 or id(parameter) in named

        return optimizer(without_decay(params, exempt), *args, **kwargs)

    signature = inspect.signature(optimizer)
    rule = inspect.Parameter("weight_decay_of", inspect.Parameter.KEYWORD_ONLY, default="all", annotation=Rule)
    parameters = sorted([*signature.parameters.values(), rule], key=lambda parameter: parameter.kind)
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
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
