"""Looks up what an experiment names: dependencies, components and their arguments, data sets, checkpoints."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Any

import torchvision
import yaml
from torch.utils.data import DataLoader
from torchdistill import core as _core  # noqa: F401  registers forward, pre and post processes
from torchdistill import datasets as _datasets  # noqa: F401  registers wrappers
from torchdistill import losses as _losses  # noqa: F401  registers losses
from torchdistill import models as _models  # noqa: F401  registers models and their wrappers
from torchdistill.core.interfaces import registry as processes
from torchdistill.datasets import registry as datasets
from torchdistill.losses import registry as losses
from torchdistill.models import registry as models
from torchdistill.optim import registry as optim
from torchdistill.optim import scheduler as _scheduler  # noqa: F401  registers schedulers
from torchvision.models import get_model_weights

from vkd_plugin.config.construct import find, one_line, target_name
from vkd_plugin.config.nodes import OPAQUE, Entries, entries, is_active, is_null, is_private, plain_value
from vkd_plugin.config.problems import KeyPath, Problems
from vkd_plugin.config.signatures import keywords
from vkd_plugin.config.source import entry_place
from vkd_plugin.config.spec import Section, Text
from vkd_plugin.config.structure import Found, fits, mismatch
from vkd_plugin.config.tags import dependencies
from vkd_plugin.config.trust import Trust
from vkd_plugin.models.weights import is_url, split_source
from vkd_plugin.projectors import PROJECTORS
from vkd_plugin.suggest import closest, nearest

Registry = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How torchdistill makes a component of one kind from ``key`` and ``kwargs``.

    Args:
        registries: where it looks the key up, in its order. The dictionaries are torchdistill's own, so what
            a dependency registers is in them.
        positional: the number of leading arguments that torchdistill gives.
        supplied: the keyword arguments that torchdistill gives.
    """

    registries: tuple[Registry, ...]
    positional: int = 0
    supplied: frozenset[str] = frozenset()


CALL = Kind(())
"""A call to which nothing is added."""

_PLACEMENT = frozenset({"device", "device_ids", "distributed"})
_WRAPPERS = (models.AUXILIARY_MODEL_WRAPPER_DICT,)

COMPONENTS = {
    "optimizer": Kind((optim.OPTIM_DICT,), positional=1),
    "scheduler": Kind((optim.SCHEDULER_DICT,), positional=1),
    "criterion": Kind((losses.HIGH_LEVEL_LOSS_DICT,)),
    "loss": Kind((losses.MIDDLE_LEVEL_LOSS_DICT, losses.LOSS_DICT, losses.LOW_LEVEL_LOSS_DICT)),
    "loss wrapper": Kind((losses.LOSS_WRAPPER_DICT,), positional=1),
    "adaptation module": Kind((models.ADAPTATION_MODULE_DICT, models.MODULE_DICT)),
    "teacher wrapper": Kind(_WRAPPERS, supplied=_PLACEMENT | {"teacher_model"}),
    "student wrapper": Kind(_WRAPPERS, supplied=_PLACEMENT | {"student_model"}),
    "batch sampler": Kind((datasets.BATCH_SAMPLER_DICT,), positional=1),
    "dataset wrapper": Kind((datasets.DATASET_WRAPPER_DICT,), positional=1),
}

NAMES: dict[str, Registry] = {
    "forward process": processes.FORWARD_PROC_FUNC_DICT,
    "pre epoch process": processes.PRE_EPOCH_PROC_FUNC_DICT,
    "pre forward process": processes.PRE_FORWARD_PROC_FUNC_DICT,
    "post forward process": processes.POST_FORWARD_PROC_FUNC_DICT,
    "post epoch process": processes.POST_EPOCH_PROC_FUNC_DICT,
    "collate function": datasets.COLLATE_FUNC_DICT,
    "function to extract the model's loss": losses.FUNC2EXTRACT_MODEL_OUTPUT_DICT,
}


def import_dependencies(root: yaml.MappingNode, problems: Problems) -> None:
    """Imports the modules under ``dependencies``, which register what the rest of the file names."""
    for name, package, where in dependencies(root):
        try:
            import_module(name, package)
        except Exception as error:  # a module may raise anything while it is imported
            problems.add(f"cannot import '{name}': {one_line(error)}", where, ("dependencies",))


def check_references(root: yaml.MappingNode, found: list[Found], problems: Problems) -> None:
    """Adds to ``problems`` every name in ``found`` that means nothing."""
    dataset_ids = _dataset_ids(root)
    written = _destinations(root)
    for reference in found:
        spec = reference.spec
        if isinstance(spec, Section):
            _check_component(reference, str(spec.component), problems)
        elif isinstance(spec, Text):
            name = plain_value(reference.node)
            if name is OPAQUE:
                continue
            if spec.role == "checkpoint":
                _check_checkpoint(name, reference, written, problems)
            elif spec.role == "dataset":
                if dataset_ids is not None and name not in dataset_ids:
                    message = f"no dataset '{name}' under datasets{nearest(name, dataset_ids)}"
                    problems.add(message, reference.where, reference.path)
            elif name not in NAMES[str(spec.role)]:
                known = [key for key in NAMES[str(spec.role)] if isinstance(key, str)]  # objects may be keys too
                message = f"no {spec.role} '{name}'{nearest(name, known)}"
                problems.add(message, reference.where, reference.path)
    _warn_of_missing_dependency(root, found, problems)


def _warn_of_missing_dependency(root: yaml.MappingNode, found: list[Found], problems: Problems) -> None:
    """run.py has this package imported; torchdistill's own scripts import what the file asks for."""
    plugin = __name__.partition(".")[0]
    if any(name.partition(".")[0] == plugin for name, _, _ in dependencies(root)):
        return
    for reference in found:
        kind = COMPONENTS.get(str(getattr(reference.spec, "component", None)))
        if kind is None or not isinstance(reference.node, yaml.MappingNode):
            continue
        present = entries(reference.node)
        key = plain_value(present["key"][1]) if "key" in present else None
        target = next((registry[key] for registry in kind.registries if isinstance(key, str) and key in registry), None)
        if target is not None and str(inspect.unwrap(target).__module__).startswith(f"{plugin}."):
            message = f"'{key}' is this plugin's: torchdistill's own scripts need dependencies: ['{plugin}']"
            problems.warn(message, entry_place(*present["key"]), (*reference.path, "key"))
            return


# --- components ---------------------------------------------------------------------------------------------


def _check_component(found: Found, component: str, problems: Problems) -> None:
    """``key`` is registered, and ``kwargs`` are what it takes."""
    assert isinstance(found.node, yaml.MappingNode)
    present = entries(found.node)
    if component == "data loader":
        _check_loader(found, present, problems)
    elif component == "sampler":
        _check_sampler(found, present, problems)
    elif component == "projector":
        _check_projector(found, present, problems)
    elif component == "term":
        _check_term(found, present, problems)
    else:
        kind = _model_kind(present) if component == "model" else COMPONENTS[component]
        key = plain_value(present["key"][1]) if "key" in present else None
        if kind is None or not isinstance(key, str):
            return
        for registry in kind.registries:
            if key in registry:
                _check_kind(found, registry[key], key, kind, problems)
                if component == "model":
                    _check_weights(found, registry[key], key, problems)
                return
        message = f"no {component} '{key}'{nearest(key, chain(*kind.registries))}"
        problems.add(message, entry_place(*present["key"]), (*found.path, "key"))


def _check_loader(found: Found, present: Entries, problems: Problems) -> None:
    supplied = {"dataset", "sampler", "batch_sampler", "collate_fn"}
    if "batch_sampler" in present and not is_null(present["batch_sampler"][1]):
        supplied |= {"batch_size", "drop_last"}
    _check_kind(found, DataLoader, "DataLoader", Kind((), supplied=frozenset(supplied)), problems)
    kwargs = present["kwargs"][1]
    given = entries(kwargs) if isinstance(kwargs, yaml.MappingNode) else {}
    if "num_workers" in given and plain_value(given["num_workers"][1]) != 0:
        return
    for name in ("persistent_workers", "prefetch_factor", "timeout"):
        if name in given and plain_value(given[name][1]):
            problems.add(f"{name} needs num_workers of at least 1", entry_place(*given[name]), (*found.path, "kwargs"))


def _check_term(found: Found, present: Entries, problems: Problems) -> None:
    """A loss of two tensors has a wrapper that gives them to it; without, it is called with all that is hooked."""
    criterion = present["criterion"][1]
    key = plain_value(entries(criterion)["key"][1]) if isinstance(criterion, yaml.MappingNode) else None
    wrapped = "criterion_wrapper" in present and not is_null(present["criterion_wrapper"][1])
    if wrapped or is_active(criterion) or not isinstance(key, str) or key in losses.MIDDLE_LEVEL_LOSS_DICT:
        return
    loss = losses.LOSS_DICT.get(key) or losses.LOW_LEVEL_LOSS_DICT.get(key)
    if loss is not None and len(keywords(getattr(loss, "forward", loss)).positional) == 3:  # self and two tensors
        message = f"{key} reads tensors: give the term a criterion_wrapper (SimpleLossWrapper, FeaturePair)"
        problems.add(message, found.where, found.path)


def _check_projector(found: Found, present: Entries, problems: Problems) -> None:
    """Its arguments stand beside ``key``; sizes that are left out are inferred."""
    key = plain_value(present["key"][1]) if "key" in present else next(iter(PROJECTORS))
    if key not in PROJECTORS:
        return  # a tag's, which is known only after construction
    takes = keywords(PROJECTORS[key])
    for name, (key_node, value) in present.items():
        if name != "key" and not is_private(name) and name not in takes.names:
            message = f"{key} takes no argument '{name}'{nearest(name, takes.names)}"
            problems.add(message, entry_place(key_node, value), found.path)


def _check_sampler(found: Found, present: Entries, problems: Problems) -> None:
    name = target_name(present["class_or_func"][1])
    try:
        target = find(str(name), False, Trust())
    except Exception:  # the check of tags says so, with the line of the tag
        return
    if callable(target):
        _check_kind(found, target, str(name), Kind((), positional=1), problems)


def _model_kind(present: Entries) -> Kind | None:
    """Where torchdistill looks for a model; None for one from torch.hub, which only the hub can name."""
    if "repo_or_dir" in present and not is_null(present["repo_or_dir"][1]):
        return None
    quantized = "quantized" in present and plain_value(present["quantized"][1]) is True
    official = torchvision.models.quantization if quantized else torchvision.models
    tasks = (official, torchvision.models.detection, torchvision.models.segmentation)
    return Kind((*(_callables(module) for module in tasks), models.MODEL_DICT))


def _check_weights(found: Found, model: Callable[..., Any], key: str, problems: Problems) -> None:
    """Published weights of torchvision's models are named right."""
    assert isinstance(found.node, yaml.MappingNode)
    kwargs = entries(found.node)["kwargs"][1]
    given = entries(kwargs).get("weights") if isinstance(kwargs, yaml.MappingNode) else None
    name = plain_value(given[1]) if given is not None else None
    if given is None or not isinstance(name, str) or not model.__module__.startswith("torchvision."):
        return
    try:
        published = get_model_weights(model)
    except ValueError:  # none
        return
    if name.removeprefix(f"{published.__name__}.") not in published.__members__:
        message = f"{key} has no weights '{name}'{nearest(name, published.__members__)}"
        problems.add(message, entry_place(*given), (*found.path, "kwargs", "weights"))


def _callables(module: Any) -> Registry:
    """The functions that build models; the classes beside them are not for users."""
    return {name: value for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"}


def _check_kind(found: Found, target: Callable[..., Any], key: str, kind: Kind, problems: Problems) -> None:
    assert isinstance(found.node, yaml.MappingNode)
    check_arguments(problems, target, key, found.node, found.where, found.path, kind)


def check_arguments(
    problems: Problems,
    target: Callable[..., Any],
    key: str,
    node: yaml.MappingNode,
    where: str,
    path: KeyPath,
    kind: Kind = CALL,
) -> None:
    """Adds to ``problems`` keywords that ``target`` does not read, and the missing ones that it needs.

    Args:
        problems: where to.
        target: what is called.
        key: its name.
        node: the mapping that holds ``kwargs`` and perhaps ``args``.
        where: its place.
        path: the way to it.
        kind: what torchdistill adds to the arguments.
    """
    present = entries(node)
    given: Entries = {}
    if "kwargs" in present and not is_null(present["kwargs"][1]):
        kwargs = present["kwargs"][1]
        if not isinstance(kwargs, yaml.MappingNode) or is_active(kwargs):
            return
        given = entries(kwargs)
        where, path = entry_place(*present["kwargs"]), (*path, "kwargs")
    args = present["args"][1] if "args" in present else None
    if args is not None and args.tag.startswith("!"):
        return
    count = kind.positional + (len(args.value) if isinstance(args, yaml.SequenceNode) else 0)
    takes = keywords(target).without(count, kind.supplied)
    unknown = []
    for name, (key_node, value) in given.items():
        if is_private(name) or isinstance(name, yaml.Node):
            continue
        spec = takes.specs.get(str(name))
        if spec is not None and isinstance(value, yaml.ScalarNode) and not is_null(value) and not fits(spec, value):
            problems.add(mismatch(spec, value), entry_place(key_node, value), (*path, name))
        if name in kind.supplied:
            problems.add(f"'{name}' may not stand here: {key} is given it already", entry_place(key_node, value), path)
        elif name not in takes.names and not takes.open:
            if takes.drops and closest(name, takes.names) is None:  # torchdistill's own sample configs do it
                message = f"'{name}' is not read by {key}"
                problems.warn(message, entry_place(key_node, value), path)
                continue
            message = f"{key} takes no argument '{name}'{nearest(name, takes.names)}"
            problems.add(message, entry_place(key_node, value), path)
            unknown.append(name)
    for name in takes.names:
        # A misspelt argument has been reported, with the name that is now missing.
        if name in takes.required and name not in given and not any(closest(wrong, [name]) for wrong in unknown):
            problems.add(f"{key} needs the argument '{name}'", where, path)


# --- data sets and checkpoints ------------------------------------------------------------------------------


def _dataset_ids(root: yaml.MappingNode) -> set[object] | None:
    """The names under ``datasets``; None where a tag makes them."""
    node = entries(root)["datasets"][1]
    if not isinstance(node, yaml.MappingNode) or is_active(node):
        return None
    names = set(entries(node))
    return None if any(isinstance(name, yaml.Node) for name in names) else names


def _destinations(root: yaml.MappingNode) -> set[str]:
    """Every ``dst_ckpt`` in the file."""
    found: set[str] = set()

    def visit(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode) and not is_active(node):
            for name, (_, value) in entries(node).items():
                if name == "dst_ckpt" and isinstance(target := plain_value(value), str):
                    found.add(target)
                visit(value)

    for section in ("models", "train"):
        visit(entries(root)[section][1])
    return found


def _check_checkpoint(name: str, found: Found, written: set[str], problems: Problems) -> None:
    """A checkpoint to start from is there; torchdistill would go on with random weights."""
    if is_url(name) or os.path.isfile(split_source(name)[0]):
        return
    if os.path.isdir(name):
        problems.add(f"'{name}' is a folder, not a checkpoint", found.where, found.path)
        return
    # A run that starts from its own output starts from scratch the first time, and resumes later; a later
    # stage starts from what an earlier one writes. A teacher to begin with comes from nowhere else.
    teacher = "teacher" in found.path or "teacher_model" in found.path
    first = not any(isinstance(part, str) and part.startswith("stage") and part != "stage1" for part in found.path)
    if name in written and not (teacher and first):
        return
    problems.add(f"no checkpoint at '{name}'", found.where, found.path)
