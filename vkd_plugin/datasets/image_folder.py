"""Images in a folder for each class, the layout of ImageNet, checked before training and guarded while it lasts."""

import operator
import os
from collections.abc import Callable
from typing import Any

import torchvision.datasets
from PIL import Image
from torchdistill.datasets.registry import register_dataset
from torchvision.datasets.folder import default_loader

from ..arguments import one_of
from .class_folders import check_same_as_train, check_samples, class_names, split_folder
from .unreadable import ON_ERROR, first_readable


@register_dataset(key="CheckedImageFolder")  # torchvision's keeps its name
class ImageFolder(torchvision.datasets.ImageFolder):
    """``root/<split>/<class>/<image>``, read as torchvision's ``ImageFolder`` reads it.

    In YAML::

        ilsvrc2012/train: !import_call
          key: 'vkd_plugin.datasets.ImageFolder'
          init:
            kwargs:
              root: '${IMAGENET}'
              split: 'train'
              num_classes: 1000
              on_error: 'stop'
              transform: *train_transform

    Items are ``(image, label)``. Images are RGB whatever the file holds (greyscale, palette, CMYK). They are not
    turned as their EXIF data ask for: torchvision does not, so neither did the training of published models. Labels
    number the class folders by name, which for ImageNet is the order of everybody's weights.

    Args:
        root: the folder that holds the class folders, or with ``split`` the one above it.
        split: name of a folder in ``root``.
        transform: applied to the image.
        target_transform: applied to the label.
        num_classes: how many class folders there have to be; None takes what is there.
        on_error: what an image means that cannot be read. ``'stop'``: a ``UserError`` with its path. ``'skip'``: the
            next image of the folder that can be read, with its label and with the augmentation that the address of
            the unreadable one draws, takes its place; the engine logs the path and counts
            (``unreadable_images`` in ``metrics.jsonl``). For training: an evaluation would count the other twice.

    Attributes:
        classes, class_to_idx, samples, targets: as torchvision's.

    Raises:
        BadValue: ``root`` and ``split`` do not lead to class folders, ``num_classes`` of them, each with an image.
        ValueError: an unknown ``on_error``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        num_classes: int | None = None,
        on_error: str = "stop",
    ) -> None:
        self.on_error = one_of("on_error", on_error, ON_ERROR)
        self.num_classes = num_classes
        self._given_root = str(root)
        folder = split_folder(self._given_root, split)
        # Whether it is empty check_samples judges.
        super().__init__(str(folder), transform, target_transform, loader=rgb_image, allow_empty=True)
        check_samples(self._given_root, folder, self.classes, self.targets)
        check_same_as_train(self._given_root, folder, self.classes, num_classes)

    def find_classes(self, directory: str | os.PathLike[str]) -> tuple[list[str], dict[str, int]]:
        """Names and labels of the class folders, checked before their images are listed."""
        names = class_names(self._given_root, directory, self.num_classes)
        return names, {name: label for label, name in enumerate(names)}

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The sample ``index``, or with ``on_error: 'skip'`` the next one that can be read.

        Raises:
            UserError: it cannot be read.
        """
        place, image = first_readable(
            range(len(self))[operator.index(index)],
            len(self),
            lambda place: self.samples[place][0],
            lambda place: self.loader(self.samples[place][0]),
            self.on_error,
        )
        label = self.samples[place][1]
        if self.transform is not None:
            image = self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)


def rgb_image(path: str) -> Any:
    """The image of a file, in RGB, as torchvision's loader gives it, which copies what is RGB already."""
    if torchvision.get_image_backend() != "PIL":
        return default_loader(path)
    with open(path, "rb") as file:
        image = Image.open(file)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
