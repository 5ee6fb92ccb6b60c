"""The augmentation of the DETR family as ViDT trains with it, as far as torchvision does not have it.

N. Carion et al., End-to-End Object Detection with Transformers, ECCV 2020.
H. Song et al., ViDT: An Efficient and Effective Fully Transformer-based Object Detector, ICLR 2022.

COCO in YAML, for training::

    _resize: &resize !import_call
      key: 'vkd_plugin.datasets.ResizeShortSide'
      init:
        kwargs:
          sizes: [480, 496, 512, 528, 544, 560, 576, 592, 608, 624, 640,
                  656, 672, 688, 704, 720, 736, 752, 768, 784, 800]
          max_size: 1333
    transforms: !import_call
      key: 'torchvision.transforms.v2.Compose'
      init:
        kwargs:
          transforms:
            - !import_call {key: 'torchvision.transforms.v2.RandomHorizontalFlip', init: {kwargs: {p: 0.5}}}
            - !import_call
              key: 'torchvision.transforms.v2.RandomChoice'            # one of two, each with probability 1/2
              init:
                kwargs:
                  transforms:
                    - *resize
                    - !import_call
                      key: 'torchvision.transforms.v2.Compose'
                      init:
                        kwargs:
                          transforms:
                            - !import_call
                              key: 'vkd_plugin.datasets.ResizeShortSide'
                              init: {kwargs: {sizes: [400, 500, 600]}}
                            - !import_call
                              key: 'vkd_plugin.datasets.RandomSizeCrop'
                              init: {kwargs: {min_size: 384, max_size: 600}}
                            - *resize
            - &to_image !import_call {key: 'torchvision.transforms.v2.ToImage', init: }
            - &to_float !import_call
              key: 'torchvision.transforms.v2.ToDtype'
              init: {kwargs: {dtype: !import_get {key: 'torch.float32'}, scale: True}}
            - &normalize !import_call
              key: 'torchvision.transforms.v2.Normalize'
              init: {kwargs: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}

For evaluation the first two are one ``ResizeShortSide`` with ``sizes: [800]`` and ``max_size: 1333``; detectors of
torchvision normalise by themselves. Boxes go along, as torchvision's v2 transforms take them along; what a crop leaves
nothing of, the data set leaves out. All of them draw from torch's global generator, which the engine addresses.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchdistill.datasets.registry import register_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2 import query_size

from ..arguments import number


@register_transform
class ResizeShortSide(v2.Transform):
    """Resizes to a short side that is drawn from a list, and each side down to a multiple of 16.

    With sides s <= l and the drawn size d, which becomes round(max_size s / l) where l d / s would exceed
    ``max_size``, the new sides are d and floor(d l / s), each then floored to a multiple. The proportions change a
    little, at most by what the floors take away. Bilinear, antialiased.

    Args:
        sizes: of the short side, pixels; each is as likely.
        max_size: of the long side; None for any.
        multiple_of: of both sides.

    Raises:
        ValueError: no sizes, or one that is not a whole number of at least ``multiple_of``.
    """

    def __init__(self, sizes: Sequence[int], max_size: int | None = None, multiple_of: int = 16) -> None:
        super().__init__()
        if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
            raise ValueError(f"sizes must be a list of sizes, got {sizes!r}")
        self.multiple_of = _whole("multiple_of", multiple_of, 1)
        self.sizes = [_whole("sizes", size, self.multiple_of) for size in sizes]
        self.max_size = None if max_size is None else _whole("max_size", max_size, self.multiple_of)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size to resize to, height and width."""
        drawn = self.sizes[int(torch.randint(len(self.sizes), ()))]
        height, width = query_size(flat_inputs)
        return {"size": self.resized(height, width, drawn)}

    def resized(self, height: int, width: int, size: int) -> tuple[int, int]:
        """Height and width of an image of ``height`` and ``width`` when ``size`` is drawn."""
        short, long = min(height, width), max(height, width)
        if self.max_size is not None and long / short * size > self.max_size:
            size = round(self.max_size * short / long)
        sides = size, int(size * long / short)
        floored = [max(side - side % self.multiple_of, self.multiple_of) for side in sides]
        return (floored[1], floored[0]) if height > width else (floored[0], floored[1])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One of image, boxes and masks."""
        return self._call_kernel(F.resize, inpt, list(params["size"]), antialias=True)


@register_transform
class RandomSizeCrop(v2.Transform):
    """Crops a rectangle whose sides are drawn one by one, anywhere in the image.

    Args:
        min_size, max_size: of each side, pixels, both included; an image that is smaller is not cropped that way.

    Raises:
        ValueError: sizes that are no whole numbers of at least 1, or the smaller above the larger.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size = _whole("min_size", min_size, 1)
        self.max_size = _whole("max_size", max_size, self.min_size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The rectangle."""
        height, width = query_size(flat_inputs)
        sides = [self._side(width), self._side(height)]
        corner = [int(torch.randint(whole - side + 1, ())) for whole, side in zip((width, height), sides, strict=True)]
        return {"top": corner[1], "left": corner[0], "height": sides[1], "width": sides[0]}

    def _side(self, whole: int) -> int:
        low, high = min(self.min_size, whole), min(self.max_size, whole)
        return int(torch.randint(low, high + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One of image, boxes and masks; boxes are clipped, to nothing where they lie outside."""
        return self._call_kernel(F.crop, inpt, **params)


def _whole(name: str, value: object, least: int) -> int:
    if number(name, value, at_least=least) % 1:
        raise ValueError(f"{name} must be whole numbers, got {value}")
    return int(value)  # type: ignore[call-overload]
