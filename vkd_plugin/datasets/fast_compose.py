"""A ``Compose`` that augments photographs in less time: the same augmentation, not the same bits.

In place of torchvision's, with the very list of transforms that it has::

    transform: !import_call
      key: 'vkd_plugin.datasets.FastCompose'
      init:
        kwargs:
          transforms:
            - !import_call
              key: 'torchvision.transforms.RandomResizedCrop'
              init: {kwargs: {size: 224, scale: [0.08, 1.0], ratio: [0.75, 1.3333333333333333], interpolation: 3}}
            - !import_call {key: 'torchvision.transforms.RandomHorizontalFlip', init: {kwargs: {p: 0.5}}}
            - !import_call
              key: 'torchvision.transforms.ColorJitter'
              init: {kwargs: {brightness: 0.3, contrast: 0.3, saturation: 0.3}}
            - !import_call {key: 'torchvision.transforms.ToTensor', init: }
            - !import_call
              key: 'torchvision.transforms.Normalize'
              init: {kwargs: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}

The same random numbers are drawn in the same order, so each image has the crop, the flip, the colours and the blur that
it has under torchvision's ``Compose``. Two results differ by rounding: torch resizes, in fixed point and rounding
between the two directions as Pillow does, but not always in Pillow's order; and the blur rounds once, where Pillow
rounds after each of six box filters. The rest is Pillow's and torchvision's arithmetic to the last bit. Neither threads
nor workers make a difference.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchdistill.datasets.registry import register_transform
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Grayscale,
    InterpolationMode,
    RandomChoice,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
)

from .augmentation import RandomGaussianBlur
from .fused_transforms import TensorFromTable, cheaper_steps, is_plain_module

LUMA = np.array([19595, 38470, 7471], np.float32)
"""How Pillow weighs red, green and blue: 2^16 times the weights of ITU-R 601-2."""

_FILTERS = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}


@register_transform
class FastCompose(Compose):
    """Applies transforms one after the other, those of photographs' training for less.

    ``RandomResizedCrop`` (bilinear or bicubic) begins the cheaper way; ``RandomHorizontalFlip``, ``Grayscale``,
    ``RandomGrayscale``, ``RandomSolarize``, ``RandomGaussianBlur``, ``ColorJitter`` without hue, and ``RandomChoice``
    among them go on with it; ``ToTensor`` with the ``Normalize`` after it ends it. Before, between and after them any
    other transform gets what it gets from torchvision's ``Compose``, a Pillow image or a tensor. Images of other modes
    than RGB, and subclasses of these transforms, go the usual way.

    Args:
        transforms: as torchvision's.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        super().__init__(list(transforms))
        self._steps = cheaper_steps(self.transforms)

    def __call__(self, image: Any) -> Any:
        for step in self._steps:
            image = applied(step, image)
        return image.picture() if isinstance(image, Pixels) else image


class Pixels:
    """An image on the cheaper way.

    Args:
        values: (3, H, W), contiguous, whole numbers from 0 to 255 as uint8 or float32; belongs to this object alone.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def floats(self) -> np.ndarray:
        """The values, as float32 from now on; what is done to them stays."""
        if self.values.dtype == np.uint8:
            self.values = self.values.astype(np.float32)
        return self.values

    def picture(self) -> Image.Image:
        """As a Pillow image."""
        return Image.fromarray(np.ascontiguousarray(self.values.transpose(1, 2, 0), np.uint8))


def applied(transform: Any, image: Any) -> Any:
    """What a transform makes of an image, which may be :class:`Pixels` and become so."""
    if type(transform) is RandomChoice:
        (chosen,) = random.choices(transform.transforms, weights=transform.p)
        return applied(chosen, image)
    if not isinstance(image, Pixels):
        return _resized_crop(transform, image) if _begins(transform, image) else transform(image)
    known = _ON_PIXELS.get(type(transform))
    if known is None or (isinstance(transform, torch.nn.Module) and not is_plain_module(transform)):
        return transform(image.picture())
    return known(transform, image)


def _begins(transform: Any, image: Any) -> bool:
    return (
        type(transform) is RandomResizedCrop
        and is_plain_module(transform)
        and transform.interpolation in _FILTERS
        and isinstance(image, Image.Image)
        and image.mode == "RGB"
    )


def _resized_crop(transform: RandomResizedCrop, image: Image.Image) -> Pixels:
    y, x, height, width = transform.get_params(image, list(transform.scale), list(transform.ratio))
    crop = torch.from_numpy(np.array(image.crop((x, y, x + width, y + height))))
    mode = _FILTERS[transform.interpolation]
    resized = F.interpolate(crop.permute(2, 0, 1)[None], tuple(transform.size), mode=mode, antialias=True)
    return Pixels(resized[0].contiguous().numpy())


def _flip(transform: RandomHorizontalFlip, image: Pixels) -> Pixels:
    if torch.rand(1) < transform.p:
        image.values = torch.from_numpy(image.values).flip(2).numpy()
    return image


def _grayscale(transform: Grayscale, image: Pixels) -> Any:
    if transform.num_output_channels != 3:
        return transform(image.picture())
    values = image.floats()
    values[:] = _grey(values)
    return image


def _random_grayscale(transform: RandomGrayscale, image: Pixels) -> Pixels:
    if torch.rand(1) < transform.p:
        values = image.floats()
        values[:] = _grey(values)
    return image


def _solarize(transform: RandomSolarize, image: Pixels) -> Pixels:
    if torch.rand(1).item() < transform.p:
        values = image.floats()
        change = 255 - 2 * values
        change *= values >= transform.threshold
        values += change
    return image


def _blur(transform: RandomGaussianBlur, image: Pixels) -> Pixels:
    values = blurred(image.floats(), transform.radius())
    image.values = np.rint(values, out=values)
    return image


def _jitter(transform: ColorJitter, image: Pixels) -> Any:
    if transform.hue is not None:
        return transform(image.picture())
    order, *factors = transform.get_params(transform.brightness, transform.contrast, transform.saturation, None)
    for number in order.tolist():
        if factors[number] is not None:
            _CHANGES[number](image.floats(), factors[number])
    return image


def _to_tensor(transform: TensorFromTable, image: Pixels) -> Any:
    table = transform.table("RGB")
    if table is None or table.dtype != np.float32:
        return transform(image.picture())
    values = image.floats()
    values /= np.float32(255)
    for mean, std in transform.statistics:
        values -= np.array(mean, np.float32)[:, None, None]
        values /= np.array(std, np.float32)[:, None, None]
    return torch.from_numpy(values)


_ON_PIXELS: dict[type, Callable[[Any, Pixels], Any]] = {
    RandomHorizontalFlip: _flip,
    Grayscale: _grayscale,
    RandomGrayscale: _random_grayscale,
    RandomSolarize: _solarize,
    RandomGaussianBlur: _blur,
    ColorJitter: _jitter,
    TensorFromTable: _to_tensor,
}


# Arithmetic: Pillow's, to the last bit but for the blur. It is numpy's, which computes each number by itself and in one
# thread: torch may use fused multiplications for some elements and not for others, by how many threads share the work.


def _grey(values: np.ndarray) -> np.ndarray:
    """(H, W): how bright each pixel is, a whole number. Sums of products stay below 2^24, so float32 holds them."""
    grey = values[0] * LUMA[0]
    grey += values[1] * LUMA[1]
    grey += values[2] * LUMA[2]
    grey += 2**15
    grey *= 2.0**-16
    return np.floor(grey, out=grey)


def _change_brightness(values: np.ndarray, factor: float) -> None:
    _blend(np.float32(0), values, factor)


def _change_contrast(values: np.ndarray, factor: float) -> None:
    grey = _grey(values)
    _blend(np.float32(math.floor(grey.sum(dtype=np.float64) / grey.size + 0.5)), values, factor)


def _change_saturation(values: np.ndarray, factor: float) -> None:
    _blend(_grey(values), values, factor)


def _blend(grey: Any, values: np.ndarray, factor: float) -> None:
    """``values`` become as far from ``grey`` as ``factor`` times what they were, cut off to whole grey levels."""
    values -= grey
    values *= np.float32(factor)
    values += grey
    if factor > 1:
        np.clip(values, 0, 255, out=values)
    np.floor(values, out=values)


_CHANGES = (_change_brightness, _change_contrast, _change_saturation)
"""In the order in which ``ColorJitter`` numbers them."""


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """Blurred as by Pillow's ``GaussianBlur``: by three box filters in each direction.

    P. Gwosdek, S. Grewenig, A. Bruhn, J. Weickert, Theoretical Foundations of Gaussian Convolution by Extended Box
    Filtering, SSVM 2011. The edge's pixels go on outside.

    Args:
        values: (C, H, W), float32.
        radius: standard deviation of the Gaussian, in pixels.

    Returns:
        (C, H, W), float32.
    """
    variance = radius * radius / 3  # of each box
    reach = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)  # whole pixels on each side
    more = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance) / (6 * (variance - (reach + 1) ** 2))
    weight = 1 / (2 * (reach + more) + 1)
    margin = reach + 1
    for axis in (2, 1):
        shape = list(values.shape)
        shape[axis] += 2 * margin
        padded, other, spare = (np.empty(shape, np.float32) for _ in range(3))
        inside = [slice(None)] * 3
        inside[axis] = slice(margin, -margin)
        padded[tuple(inside)] = values
        step = padded.strides[axis] // padded.itemsize
        for _ in range(3):
            _extend(padded, axis, margin)
            flat = padded.reshape(-1), other.reshape(-1), spare.reshape(-1)
            _box(*flat, step, reach, np.float32(weight), np.float32(more))
            padded, other = other, padded
        values = padded[tuple(inside)]
    return np.ascontiguousarray(values)


def _extend(padded: np.ndarray, axis: int, margin: int) -> None:
    """Writes the edge's pixels into the margins."""
    lines = np.moveaxis(padded, axis, 0)
    lines[:margin] = lines[margin]
    lines[-margin:] = lines[-margin - 1]


def _box(
    given: np.ndarray,
    out: np.ndarray,
    spare: np.ndarray,
    step: int,
    reach: int,
    weight: np.float32,
    more: np.float32,
) -> None:
    """A box filter along one axis of an array that is written in a row.

    Lines run into each other, but only by as much as the margins are wide; those are overwritten.

    Args:
        given, out, spare: (N,); of ``out`` the first and last ``(reach + 1) * step`` stay as they are.
        step: from a pixel to its neighbour.
        reach: pixels on each side that count in full.
        weight: of those and of the pixel itself.
        more: part of that weight which the next pixel on each side has.
    """
    margin, count = (reach + 1) * step, len(given)

    def away(pixels: int) -> np.ndarray:
        return given[margin + pixels * step : count - margin + pixels * step]

    total, pair = out[margin : count - margin], spare[2 * margin :]
    np.add(away(-reach - 1), away(reach + 1), out=total)
    total *= more
    total += away(0)
    for pixels in range(1, reach + 1):
        total += np.add(away(-pixels), away(pixels), out=pair)
    total *= weight
