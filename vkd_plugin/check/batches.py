"""A batch as a loader of the experiment would make it, without its workers."""

import copy
from collections.abc import Mapping
from typing import Any

from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchdistill.datasets.util import get_collate_func

from ..engine.loaders import wrapped_dataset
from .noting import Notes
from .standin import StandIn, length_of


def two_samples(
    datasets: Mapping[str, Dataset[Any]], loader: Mapping[str, Any], training: bool, notes: Notes, *path: str | int
) -> Any:
    """The first samples of a loader's data set, collated; None, and a note, where they cannot be.

    Args:
        datasets: by name.
        loader: its section.
        training: whether samples have a supplement unless it says otherwise, as in torchdistill's boxes.
        notes: what goes wrong.
        path: where the section stands.
    """
    name = str(loader["dataset_id"])
    dataset: Any = datasets[name]
    with notes.collecting(*path, "collate_fn" if loader.get("collate_fn") else "dataset_id"):
        config = {"requires_supp": True, **loader} if training else loader
        try:
            wrapped = wrapped_dataset(copy.copy(dataset), config)  # a wrapper may take its transform away
        except AttributeError:
            if not isinstance(dataset, StandIn):
                raise
            notes.warn("the step is not checked: its data set is not here", *path, "dataset_wrapper")
            return None
        collate = loader.get("collate_fn")
        collate = collate if callable(collate) else get_collate_func(collate)
        samples = [wrapped[0], wrapped[1 if length_of(dataset, "") != 1 else 0]]
        image, *rest = samples[0] if isinstance(samples[0], tuple | list) else samples[:1]
        if collate is None and rest and isinstance(rest[0], Mapping):
            message = "its targets are dictionaries, of boxes that differ in number: give collate_fn: 'coco_collate_fn'"
            notes.problem(message, *path, "dataset_id")
            return None
        if collate is None and isinstance(image, Image):
            message = "its samples are PIL images: end its transform with torchvision.transforms.ToTensor"
            notes.problem(message, "datasets", name)
            return None
        return (collate or default_collate)(samples)
    return None


def grown(batch: Any, size: int, lists: bool = False) -> Any:
    """A batch of two with ``size`` samples, all of them the first.

    Args:
        batch: collated.
        size: see above.
        lists: its parts are sequences of samples, not tensors.
    """
    if lists:
        return tuple((part[0],) * size for part in batch)
    if isinstance(batch, Tensor):
        return batch[:1].expand(size, *batch.shape[1:]).clone() if batch.ndim and len(batch) == 2 else batch
    if isinstance(batch, dict):
        return {key: grown(value, size) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(grown(value, size) for value in batch)
    return batch
