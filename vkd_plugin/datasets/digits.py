"""Handwritten digits of scikit-learn as a torchvision-style data set: real images, no download, 8 x 8 pixels.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torchdistill.datasets.registry import register_dataset

from ..arguments import one_of
from .fractions import check_fraction, kept_fraction, shuffled
from .grey_images import GreyImages

_TEST_PER_CLASS = 50


@register_dataset
class Digits(GreyImages):
    """1,297 training and 500 test images of ten classes, the same on every machine.

    In YAML::

        digits/train: !import_call
          key: 'vkd_plugin.datasets.Digits'
          init:
            kwargs:
              split: 'train'
              transform: !import_call {key: 'torchvision.transforms.ToTensor', init: }

    Items are ``(image, label)``: a PIL image of mode ``L``, 8 x 8, its 17 grey levels spread over 0 to 255,
    and an int from 0 to 9; each goes through its transform.

    Args:
        split: ``'train'`` or ``'test'``. In each class the file's order, which goes from writer to writer,
            gives every n/50-th image to the test split: both splits hold all writers and the test split is
            balanced.
        transform: applied to the image.
        target_transform: applied to the label.
        fraction: share of the training images to keep, in (0, 1], of each class at least one. With one
            ``seed`` a smaller fraction is a part of a larger one.
        seed: chooses which images a fraction keeps.

    Attributes:
        classes: names of the ten classes.
        targets: label of each item, ints.

    Raises:
        ValueError: an unknown split, or a fraction out of range or of the test split.
        ImportError: scikit-learn, which holds the images, is not installed.
    """

    def __init__(
        self,
        split: str,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        one_of("split of Digits", split, ("train", "test"))
        check_fraction(split, fraction)
        all_images, labels = _all_digits()
        kept: list[int] = []
        for label in range(10):
            members = np.flatnonzero(labels == label).tolist()
            test = {members[i * len(members) // _TEST_PER_CLASS] for i in range(_TEST_PER_CLASS)}
            if split == "test":
                kept += test
            else:
                kept += kept_fraction(shuffled(sorted(set(members) - test), seed), fraction)
        kept.sort()
        images = np.rint(all_images[kept] * (255 / 16)).astype(np.uint8)
        super().__init__(images, labels[kept].tolist(), [*map(str, range(10))], transform, target_transform)


@cache  # an experiment has three splits of them, and scikit-learn keeps them as text
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) grey levels from 0 to 16 and (1797,) labels; to be read only."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Digits needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return data.images, data.target
