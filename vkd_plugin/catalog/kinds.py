"""The kinds of components, and what lists and writes each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vkd_plugin.config.references import NAMES

from . import collect, snippet
from .component import Component


@dataclass(frozen=True)
class CatalogKind:
    """One kind of component.

    Args:
        plural, singular: its names.
        purpose: what it is for, in a line.
        find: gives its components; called with the packages that the user imports.
        snippet: YAML for one of them.
    """

    plural: str
    singular: str
    purpose: str
    find: Callable[[Sequence[str]], list[Component]]
    snippet: Callable[[Component], str]


def _kind(
    plural: str,
    purpose: str,
    find: Callable[[], list[Component]],
    write: Callable[[Component], str],
    singular: str | None = None,
) -> CatalogKind:
    return CatalogKind(plural, singular or plural[:-1], purpose, lambda packages: find(), write)


def _named(kind: str, purpose: str) -> CatalogKind:
    """A kind of functions that are named without arguments."""
    plural = f"{kind}es" if kind.endswith("process") else kind.replace("function", "functions")
    return _kind(plural, purpose, partial(collect.named, kind), snippet.named, singular=kind)


_PURPOSES = {
    "forward process": "what a model is called with",
    "pre epoch process": "what happens before an epoch",
    "pre forward process": "what happens before a batch",
    "post forward process": "what happens after a loss: backward, the optimizer's step",
    "post epoch process": "what happens after an epoch: the scheduler's step",
    "function to extract the model's loss": "losses that a model computes itself",
}

KINDS: tuple[CatalogKind, ...] = (
    _kind("losses", "the criterion and its terms", collect.find_losses, snippet.loss, "loss"),
    _kind(
        "loss wrappers",
        "what a low-level loss compares",
        partial(collect.registered, "loss wrapper", "loss wrapper"),
        snippet.loss_wrapper,
    ),
    _kind("models", "teachers and students", collect.find_models, snippet.model),
    _kind(
        "model wrappers",
        "modules that train beside a teacher or a student",
        collect.find_model_wrappers,
        snippet.model_wrapper,
    ),
    _kind("projectors", "from the student's to the teacher's channels", collect.find_projectors, snippet.projector),
    _kind(
        "orthogonal maps",
        "how OrthogonalProjector stays orthogonal",
        collect.find_orthogonal_maps,
        snippet.orthogonal_map,
    ),
    _kind("normalizations", "of the teacher's features", collect.find_normalizations, snippet.normalization),
    _kind("distances", "between normalized features", collect.find_distances, snippet.distance),
    _kind("readouts", "rows of what a layer puts out", collect.find_readouts, snippet.readout),
    _kind("adaptation modules", "layers to add to a model", collect.find_adaptation_modules, snippet.adaptation),
    _kind("datasets", "images and labels", collect.find_datasets, snippet.dataset),
    _kind(
        "dataset wrappers",
        "what a method needs besides image and label",
        partial(collect.registered, "dataset wrapper", "dataset wrapper"),
        snippet.dataset_wrapper,
    ),
    _kind("transforms", "augmentation and conversion of images", collect.find_transforms, snippet.transform),
    CatalogKind("samplers", "sampler", "the order of samples", collect.find_samplers, snippet.sampler),
    _kind("batch samplers", "which samples make a batch", collect.find_batch_samplers, snippet.batch_sampler),
    _kind(
        "collate functions",
        "from samples to a batch; mixing",
        collect.find_collate_functions,
        snippet.collate_function,
    ),
    _kind("optimizers", "from gradients to steps", collect.find_optimizers, snippet.optimizer),
    _kind("schedulers", "the learning rate over time", collect.find_schedulers, snippet.scheduler),
    *(_named(kind, _PURPOSES.get(kind, "")) for kind in NAMES if kind != "collate function"),
)
