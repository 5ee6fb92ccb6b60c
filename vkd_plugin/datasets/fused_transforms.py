"""torchvision's transforms for less: the same tensors to the last bit, the same random numbers drawn.

``ToTensor`` and ``Normalize`` make of each grey level of a channel one number, so 256 of them are all there is to
compute: torchvision's own two transforms, applied to an image that holds every level, give the table. ``RandomCrop``
with a margin of zeros is a crop beyond the image's edge, which Pillow fills with zeros; where it lies, torchvision's
own ``get_params`` draws.

Only what is known exactly is replaced: these classes themselves, with plain options, on Pillow images of the modes
``L`` and ``RGB``. Subclasses, modules with hooks, and other images get the transforms that stand in the YAML, and so
their error messages.

:func:`fused` replaces transforms while a batch is fetched, and never within a ``Compose`` that someone else may hold:
the data set, what is printed of it and what is saved of it stay what they were.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch.utils.data import Dataset
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

Transform = Callable[[Any], Any]

MODES = ("L", "RGB")


@contextmanager
def fused(dataset: Any) -> Iterator[None]:
    """Within the block, ``transform`` and ``transforms`` of a data set, and of those that it wraps, are cheaper.

    The objects themselves stay as they are: a data set's attribute is another one for the while. What is looked at is
    what stands there at the time, so that a transform exchanged between two blocks counts.
    """
    exchanged: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for holder in _with_wrapped(dataset):
            for name in ("transform", "transforms"):
                given = holder.get(name)
                cheaper = fuse(given)
                if cheaper is not given:
                    exchanged.append((holder, name, given))
                    holder[name] = cheaper
        yield
    finally:
        for holder, name, given in exchanged:
            holder[name] = given


def fuse(transform: Any) -> Any:
    """A transform that gives what ``transform`` gives, for less; ``transform`` itself where none is known.

    Args:
        transform: anything. A ``Compose``, also within another, and torchvision's pair of a transform for the image
            and one for the target are looked into.
    """
    if type(transform) is Compose:
        steps = cheaper_steps(transform.transforms)
        same = all(step is part for step, part in zip(steps, transform.transforms, strict=False))
        return transform if same and len(steps) == len(transform.transforms) else FusedCompose(transform, steps)
    if type(transform) is StandardTransform:
        of_image = fuse(transform.transform)
        return transform if of_image is transform.transform else StandardTransform(of_image, transform.target_transform)
    return transform


class FusedCompose(Compose):
    """A ``Compose`` that takes fewer steps than its ``transforms`` are, and prints as the original does."""

    def __init__(self, original: Compose, steps: list[Transform]) -> None:
        super().__init__(original.transforms)
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, Compose.__name__, 1)


class TensorFromTable:
    """``ToTensor`` and what normalises after it, in one step.

    Args:
        transforms: a ``ToTensor`` and any number of ``Normalize``.
    """

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms
        self.statistics = tuple((tuple(part.mean), tuple(part.std)) for part in transforms[1:])

    def __call__(self, image: Any) -> Any:
        table = self.table(image.mode) if _is_plain(image) else None
        if table is None:
            return _all(self.transforms, image)
        width, height = image.size
        levels = np.frombuffer(image.tobytes(), np.uint8).reshape(height * width, len(table))
        values = np.empty((len(table), height * width), table.dtype)
        for channel, of_channel in enumerate(table):
            # No level lies outside the table; "clip" spares the copy that finding out would take.
            of_channel.take(levels[:, channel], out=values[channel], mode="clip")
        return torch.from_numpy(values).view(-1, height, width)

    def table(self, mode: str) -> np.ndarray | None:
        """(channels, 256): what each level of each channel of an image becomes; None where there is no saying."""
        return _table(mode, torch.get_default_dtype(), self.statistics)


class PaddedCrop:
    """``RandomCrop`` with a margin of zeros.

    Args:
        transform: the original.
        margin: of zeros, in pixels: left, top, right, bottom.
    """

    def __init__(self, transform: RandomCrop, margin: tuple[int, int, int, int]) -> None:
        self.transform = transform
        self.margin = margin
        self._padded = Image.new("1", (1, 1))

    def __call__(self, image: Any) -> Any:
        if not _is_plain(image):
            return self.transform(image)
        left, top, right, bottom = self.margin
        size = (left + image.width + right, top + image.height + bottom)
        if self._padded.size != size:
            self._padded = Image.new("1", size)  # get_params asks for the size of what it is given, and no more
        y, x, height, width = self.transform.get_params(self._padded, self.transform.size)
        cropped = image.crop((x - left, y - top, x - left + width, y - top + height))
        cropped.info = {}  # the padded image has none to hand on
        return cropped


def cheaper_steps(transforms: list[Any]) -> list[Transform]:
    """What to do in place of ``transforms``; a step for which nothing cheaper is known is the transform itself."""
    steps: list[Transform] = []
    place = 0
    while place < len(transforms):
        part = transforms[place]
        end = place + 1
        if type(part) is ToTensor and not vars(part):
            while end < len(transforms) and _is_plain_normalize(transforms[end]):
                end += 1
            steps.append(TensorFromTable(transforms[place:end]))
        elif (margin := _margin(part)) is not None:
            steps.append(PaddedCrop(part, margin))
        else:
            steps.append(fuse(part))
        place = end
    return steps


@lru_cache(maxsize=64)
def _table(mode: str, dtype: torch.dtype, statistics: tuple[tuple[Any, Any], ...]) -> np.ndarray | None:
    """(channels, 256): what each level of each channel becomes; None where that raises, or numpy lacks the dtype.

    Args:
        mode: of the image.
        dtype: torch's default, in which ``ToTensor`` puts out; named here to tell tables apart.
        statistics: mean and standard deviation of each ``Normalize``.
    """
    if dtype not in (torch.float32, torch.float64):
        return None
    levels = Image.frombytes("L", (256, 1), bytes(range(256)))
    every_level = Image.merge(mode, [levels] * len(Image.new(mode, (1, 1)).getbands()))
    normalizations = [Normalize(list(mean), list(std)) for mean, std in statistics]
    try:
        tensor = _all([ToTensor(), *normalizations], every_level)
    except (ValueError, RuntimeError):  # statistics that do not fit the mode: the image itself shall say so
        return None
    return tensor.view(-1, 256).numpy()


def _all(transforms: list[Any], image: Any) -> Any:
    for transform in transforms:
        image = transform(image)
    return image


def _is_plain(image: Any) -> bool:
    known = type(image) is Image.Image or isinstance(image, ImageFile)  # as it is, or as it comes of a file
    return known and image.mode in MODES and 0 not in image.size


def _is_plain_normalize(part: Any) -> bool:
    if type(part) is not Normalize or part.inplace or not is_plain_module(part):
        return False
    return all(type(values) in (list, tuple) and all(map(_is_number, values)) for values in (part.mean, part.std))


def _margin(part: Any) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of a crop that a :class:`PaddedCrop` stands for."""
    if type(part) is not RandomCrop or not is_plain_module(part):
        return None
    if part.pad_if_needed or part.padding_mode != "constant" or type(part.fill) is not int or part.fill != 0:
        return None
    widths = [part.padding] if type(part.padding) is int else part.padding
    if type(widths) not in (list, tuple) or not all(type(width) is int and width >= 0 for width in widths):
        return None
    if len(widths) not in (1, 2, 4):
        return None
    left, top, right, bottom = widths * (4 // len(widths))
    return left, top, right, bottom


def is_plain_module(part: torch.nn.Module) -> bool:
    """Whether calling it is calling its class's ``forward``."""
    own = vars(part)
    return "forward" not in own and not (part._forward_hooks or part._forward_pre_hooks)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _with_wrapped(dataset: Any) -> Iterator[dict[str, Any]]:
    """The attributes of a data set and of those within: torchdistill's wrappers, subsets, concatenations."""
    seen: set[int] = set()
    left = [dataset]
    while left:
        holder = left.pop()
        attributes = getattr(holder, "__dict__", None)
        if attributes is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        yield attributes
        several = attributes.get("datasets")
        inner = [attributes.get("org_dataset"), attributes.get("dataset")]
        inner += several if isinstance(several, list | tuple) else []
        left.extend(part for part in inner if isinstance(part, Dataset))
