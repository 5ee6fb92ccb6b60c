"""Finds the components of each kind where torchdistill, torch, torchvision and this package keep them."""

import enum
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torchvision
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, Sampler
from torchdistill.datasets import registry as datasets
from torchdistill.losses import registry as losses
from torchdistill.models import registry as models
from torchvision.datasets import VisionDataset

import vkd_plugin.datasets
from vkd_plugin import normalization, stiefel
from vkd_plugin.config.references import COMPONENTS, NAMES, Kind
from vkd_plugin.config.signatures import keywords
from vkd_plugin.config.trust import Trust
from vkd_plugin.losses import DISTANCES
from vkd_plugin.projectors import PROJECTORS
from vkd_plugin.readouts import READOUTS

from .component import Component
from .docstring import Docstring, read_docstring, table_row
from .values import public_name, quoted

CALLED = Kind(())
"""What a tag calls: nothing is supplied."""

TIMM = "of timm"
"""The note of timm's models, which are an argument of timm_model."""

# Where classes come from that are in torchdistill's registries because a module of torch's imports them.
_COPIED = {"torch", "torchvision", "typing_extensions", *sys.stdlib_module_names}


def registered(kind: str, component: str, fits: Callable[[type], bool] = lambda cls: True) -> list[Component]:
    """What the registries of ``COMPONENTS[component]`` hold.

    Args:
        kind: the singular of the kind to list them as.
        component: see references.
        fits: which classes of torch and torchvision are meant. torchdistill copies whole modules of theirs, with
            what these import and with base classes.
    """
    takes = COMPONENTS[component]
    return [Component(name, kind, target, takes=takes) for name, target in _meant(takes.registries, fits)]


def named(kind: str) -> list[Component]:
    """Functions that the file names without giving them arguments."""
    return [Component(name, kind, target) for name, target in NAMES[kind].items() if isinstance(name, str)]


def _meant(registries: Iterable[Mapping[str, Any]], fits: Callable[[type], bool]) -> Iterator[tuple[str, Any]]:
    for registry in registries:
        for name, target in registry.items():
            cls = inspect.unwrap(target)  # vkd_plugin.host wraps optimizers
            copied = isinstance(cls, type) and _root(cls) in _COPIED
            if callable(target) and not (copied and (name.startswith("_") or not fits(cls))):
                yield name, target


def _root(target: Any) -> str:
    return str(getattr(target, "__module__", "")).partition(".")[0]


def _below(base: type, *others: type) -> Callable[[type], bool]:
    """Whether a class is a subclass of ``base``, not ``base`` itself, and none of ``others``."""
    return lambda cls: issubclass(cls, base) and cls is not base and not issubclass(cls, others)


# --- losses, models ---------------------------------------------------------------------------------------------


def find_losses() -> list[Component]:
    """The criterion itself, and what can be a term of it."""
    found = [replace(loss, note="high-level") for loss in registered("loss", "criterion")]
    takes = COMPONENTS["loss"]
    for registry in takes.registries:
        note = "mid-level" if registry is losses.MIDDLE_LEVEL_LOSS_DICT else "low-level"
        for name, target in _meant([registry], _below(_Loss)):
            found.append(Component(name, "loss", target, note, takes))
    return found


def find_models() -> list[Component]:
    """Registered models, and torchvision's as torchdistill finds them. For timm's see :func:`timm_architecture`."""
    found = [Component(name, "model", target, takes=CALLED) for name, target in models.MODEL_DICT.items()]
    parts = {"": torchvision.models, "detection": torchvision.models.detection}
    for note, module in (parts | {"segmentation": torchvision.models.segmentation}).items():
        for name in torchvision.models.list_models(module=module):
            found.append(Component(name, "model", torchvision.models.get_model_builder(name), note, CALLED))
    return found


def timm_architecture(name: str) -> Component | None:
    """timm's architecture, with or without the tag of its weights, through ``timm_model``; None if it has none such."""
    if not timm.is_model(name):
        return None
    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        return None
    target = models.MODEL_DICT["timm_model"]
    about = read_docstring(target)
    text = read_docstring(timm.model_entrypoint(architecture)).paragraph or architecture
    if known:
        text = f"{text.rstrip('.')}. Pretrained weights: {', '.join(known)}."
    given = {"name": quoted(name)}
    if (weights := timm.get_pretrained_cfg(name)) is not None and weights.num_classes:
        given["num_classes"] = str(weights.num_classes)
    return Component(name, "model", target, TIMM, CALLED, given, text=Docstring(text, about.arguments))


def find_model_wrappers() -> list[Component]:
    """For one side they are, where their signature says so, else for both."""
    sides = [COMPONENTS["teacher wrapper"], COMPONENTS["student wrapper"]]
    takes = Kind(sides[0].registries, supplied=sides[0].supplied | sides[1].supplied)
    found = []
    for component in registered("model wrapper", "student wrapper"):
        names = keywords(component.target).names
        sides_taken = [side for side in ("student", "teacher") if f"{side}_model" in names]
        note = f"of the {sides_taken[0]}" if len(sides_taken) == 1 else ""
        found.append(replace(component, note=note, takes=takes))
    return found


def find_adaptation_modules() -> list[Component]:
    """torch's layers and what is registered; losses are layers to torch only."""
    return registered("adaptation module", "adaptation module", _below(nn.Module, _Loss))


# --- the method -------------------------------------------------------------------------------------------------


def find_projectors() -> list[Component]:
    """Sizes are inferred by ProjectedStudent where they are left out."""
    sizes = frozenset({"in_features", "out_features"})
    return [Component(name, "projector", cls, takes=CALLED, inferred=sizes) for name, cls in PROJECTORS.items()]


def find_orthogonal_maps() -> list[Component]:
    """Described in the table of ``orthogonalize``."""
    return [
        Component(name, "orthogonal map", target, text=_row(stiefel.orthogonalize, name))
        for name, target in stiefel.ORTHOGONAL_MAPS.items()
    ]


def find_normalizations() -> list[Component]:
    """Described in the table of ``normalize``, or by the function that it refers to."""
    found = []
    for name, eps in normalization.DEFAULT_EPS.items():
        own = getattr(normalization, name, None)
        text = read_docstring(own) if own else _row(normalization.normalize, name)
        text = Docstring(text.paragraph, {"eps": text.arguments["eps"]} if "eps" in text.arguments else {})
        note = f"eps {eps:g} by default" if eps else ""
        found.append(Component(name, "normalization", own or normalization.normalize, note, text=text))
    return found


def find_distances() -> list[Component]:
    """What shapes them is an argument of VkDLoss."""
    return [Component(name, "distance", f, takes=Kind((), positional=2)) for name, f in DISTANCES.items()]


def find_readouts() -> list[Component]:
    """How rows are made of what a layer puts out."""
    return [Component(name, "readout", f) for name, f in READOUTS.items()]


def _row(function: Callable[..., Any], name: str) -> Docstring:
    return Docstring(table_row(function.__doc__ or "", name))


# --- data -------------------------------------------------------------------------------------------------------


def find_datasets() -> list[Component]:
    """What a tag can build: torchvision's, and what is registered."""
    trust = Trust()

    def allowed(cls: type) -> bool:
        return _below(VisionDataset)(cls) and trust.of_value(cls, cls.__name__) is None

    return _callable("dataset", _meant([datasets.DATASET_DICT], allowed))


def find_transforms() -> list[Component]:
    """Registered ones, torchvision's, and those of its second version as ``v2.<name>``."""
    from torchvision.transforms import v2  # here: it takes a moment, and only this kind needs it

    found = _callable("transform", datasets.TRANSFORM_DICT.items())
    first = vars(torchvision.transforms).items()
    found += _callable("transform", ((n, t) for n, t in first if isinstance(t, type) and not issubclass(t, enum.Enum)))
    second = (t for t in vars(v2).values() if isinstance(t, type) and issubclass(t, v2.Transform))
    found += _callable("transform", ((f"v2.{t.__name__}", t) for t in second if t is not v2.Transform))
    return found


def find_samplers(packages: Sequence[str]) -> list[Component]:
    """Classes of samplers that are imported and that an experiment may name; they are called with the data set.

    Args:
        packages: whose samplers may be named besides those of the packages that are always trusted.
    """
    trust = Trust(packages)
    found = []
    for cls in _subclasses(Sampler):
        name = public_name(cls)
        if name is None or trust.of_name(name) or issubclass(cls, BatchSampler):
            continue
        takes = Kind((), positional=1)
        # SubsetRandomSampler and WeightedRandomSampler of torch take indices or weights where the data set is given.
        if _root(cls) not in ("torch", "timm") or keywords(cls).positional[:1] in (["dataset"], ["data_source"]):
            found.append(Component(cls.__name__, "sampler", cls, takes=takes))
    return found


def find_batch_samplers() -> list[Component]:
    """They are called with the sampler."""
    return registered("batch sampler", "batch sampler", lambda cls: issubclass(cls, BatchSampler))


def find_collate_functions() -> list[Component]:
    """Registered ones, and this package's classes of them, which are built in the file."""
    members = vars(vkd_plugin.datasets).items()
    built = ((name, value) for name, value in members if isinstance(value, type) and name.endswith("Collator"))
    return named("collate function") + _callable("collate function", built)


def _callable(kind: str, found: Iterable[tuple[str, Any]]) -> list[Component]:
    """Those that a tag can import and call."""
    return [Component(name, kind, target, takes=CALLED) for name, target in found if public_name(target)]


def _subclasses(base: Any) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


# --- optimization -----------------------------------------------------------------------------------------------


def find_optimizers() -> list[Component]:
    """torch's and registered ones."""
    return registered("optimizer", "optimizer", _below(Optimizer))


def find_schedulers() -> list[Component]:
    """torch's and registered ones; not those of several schedulers, which would need the optimizer in the file."""
    found = registered("scheduler", "scheduler", _below(LRScheduler))
    return [scheduler for scheduler in found if "schedulers" not in keywords(scheduler.target).names]
