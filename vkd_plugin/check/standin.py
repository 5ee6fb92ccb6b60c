"""Data sets that are not here: what their transforms make of a picture, in place of the files."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FakeData
from torchvision.datasets.vision import StandardTransform

PATHS = ("root", "annFile", "ann_file", "img_folder", "data_dir")
"""Arguments that name files or folders of a data set."""

# Published numbers of samples (train, test or validation) and sizes of images, for data sets of torchvision.
_SIZES: dict[str, tuple[tuple[int, int], tuple[int, int], str]] = {
    "CIFAR10": ((50_000, 10_000), (32, 32), "RGB"),
    "CIFAR100": ((50_000, 10_000), (32, 32), "RGB"),
    "MNIST": ((60_000, 10_000), (28, 28), "L"),
    "FashionMNIST": ((60_000, 10_000), (28, 28), "L"),
    "KMNIST": ((60_000, 10_000), (28, 28), "L"),
    "SVHN": ((73_257, 26_032), (32, 32), "RGB"),
    "STL10": ((5_000, 8_000), (96, 96), "RGB"),
    "ImageNet": ((1_281_167, 50_000), (500, 375), "RGB"),
}
PUBLISHED = {
    "ilsvrc2012/train": 1_281_167,
    "ilsvrc2012/val": 50_000,
    "coco2017/train": 118_287,
    "coco2017/val": 5_000,
}
"""Numbers of samples of data sets by the names that experiments give them."""


class StandIn(Dataset[Any]):
    """A data set in place of one whose files are not here.

    Args:
        target: its class.
        kwargs: the arguments that it would have got.

    Attributes:
        length: the published number of samples; None where none is known.
        transform, target_transform, transforms: as in torchvision's data sets.
    """

    def __init__(self, target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        self.kind = getattr(target, "__name__", str(target))
        lengths, self.size, self.mode = _SIZES.get(self.kind, ((None, None), (500, 375), "RGB"))
        is_train = kwargs.get("train", kwargs.get("split", "train") == "train")
        self.length: int | None = lengths[0] if is_train else lengths[1]
        if hasattr(target, "length_of_split"):  # this package's own
            self.length = target.length_of_split(**kwargs)
        self.transform = kwargs.get("transform")
        self.target_transform = kwargs.get("target_transform")
        self.transforms = kwargs.get("transforms")
        if hasattr(target, "picture"):  # that it has one is asked, and no more
            self.picture = target.picture
        self._item = getattr(target, "absent_item", None)  # this package's own, if its items are no classes
        self._kwargs = dict(kwargs)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, int):
            raise TypeError(f"samples have whole numbers, not {index!r}")
        width, height = self.size
        channels = () if self.mode == "L" else (3,)
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, *channels), dtype=np.uint8)
        image = Image.fromarray(pixels)
        if self._item is not None:
            return self._item(image, index, **self._kwargs)
        both = self.transforms or StandardTransform(self.transform, self.target_transform)
        return both(image, index % 2)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"the number of samples of {self.kind} is not known here")
        return self.length


class _Parts:
    """What a function makes of a data set that is not here: wherever one looks, the data set."""

    def __init__(self, dataset: StandIn) -> None:
        self.dataset = dataset

    def __getitem__(self, index: object) -> StandIn:
        return self.dataset


def build(target: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Calls ``target``, unless it is a data set that reads files: then a stand-in is made."""
    if needs_files(target):
        return StandIn(target, inspect.signature(target).bind_partial(*args, **kwargs).arguments)
    absent = [value for value in (*args, *kwargs.values()) if isinstance(value, StandIn)]
    try:
        return target(*args, **kwargs)
    except Exception:
        if not absent:
            raise
        return _Parts(absent[0])  # a split that needs the real number of samples


def needs_files(target: object) -> bool:
    """Whether ``target`` is the class of a data set that is made from files."""
    if not inspect.isclass(target) or not issubclass(target, Dataset) or issubclass(target, FakeData):
        return False
    return any(name in inspect.signature(target).parameters for name in PATHS)


def length_of(dataset: Any, name: str) -> int | None:
    """The number of samples; None where it is not known."""
    try:
        return len(dataset)
    except TypeError:
        return PUBLISHED.get(name)


def classes_of(dataset: Any) -> int | None:
    """The number of classes that a data set's labels tell; None where they do not."""
    for part in ("classes", "targets", "num_classes"):
        values = getattr(dataset, part, None)
        if part == "num_classes" and isinstance(values, int):  # FakeData
            return values
        if part == "classes" and isinstance(values, list | tuple):
            return len(values)
        if isinstance(values, torch.Tensor | np.ndarray) and values.ndim == 1 and len(values):
            return int(values.max()) + 1
        if isinstance(values, list) and values and all(isinstance(value, int) for value in values):
            return max(values) + 1
    return None
