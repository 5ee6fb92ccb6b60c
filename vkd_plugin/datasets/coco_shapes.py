"""A folder in the layout of COCO 2017 whose boxes are known exactly: ``python -m vkd_plugin.datasets.coco_shapes DIR``.

Handwritten digits, or the clothes of Fashion-MNIST, in colours and sizes of their own, are laid side by side on noisy
canvases: ``train2017``, ``val2017`` and ``annotations/instances_{train,val}2017.json``. A box holds all pixels of its
item and not one row or column more; an annotation's area counts its item's pixels. The splits share no item. The first
images of each split are what COCO holds too: one without any object, one with a crowd, one in grey. Category ids have a
gap, as COCO's have.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import one_of
from ..errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from .digits import Digits
from .fashion_mnist import FashionMNIST
from .generated import new_folder, parser

CATEGORY_IDS = (*range(1, 10), 11)
_VISIBLE = 48  # grey levels below are cut off, so that an item ends where its box does
_TRIES = 30  # to find a place for an item
_CROWD = 6


def write_tree(
    folder: Path,
    train: int = 200,
    val: int = 50,
    size: int = 128,
    objects: int = 5,
    classes: int = 10,
    items: str = "digits",
    root: str | None = None,
    seed: int = 0,
) -> None:
    """Writes the tree; the same arguments give the same bytes (with the same Pillow and numpy).

    Args:
        folder: is made; has to be empty if it is there.
        train, val: images of each split.
        size: longest side of the images, pixels.
        objects: most items of an image; there is at least one, but for the image without any.
        classes: of how many classes the items are, the first of the ten.
        items: ``'digits'`` or ``'fashion_mnist'``.
        root: where Fashion-MNIST lies, see :class:`~vkd_plugin.datasets.FashionMNIST`.
        seed: of all that is random.

    Raises:
        UserError: ``folder`` holds something, or cannot be written; Fashion-MNIST is not here.
        ValueError: other ``items``, sizes too small to hold one, or more ``classes``.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    if not 1 <= classes <= len(CATEGORY_IDS):
        raise ValueError(f"classes must be from 1 to {len(CATEGORY_IDS)}, got {classes}")
    splits = {split: _FirstClasses(source, classes) for split, source in _items(items, root).items()}
    with new_folder(folder):
        (folder / "annotations").mkdir()
        first_id = 1
        for (split, source), count in zip(splits.items(), (train, val), strict=True):
            random = Random(f"{seed}/{split}")
            described = _write_split(folder / f"{split}2017", source, first_id, count, size, objects, random)
            (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(described))
            first_id += count


def _items(items: str, root: str | None) -> dict[str, Any]:
    one_of("items", items, ("digits", "fashion_mnist"))
    if items == "digits":
        return {"train": Digits(split="train"), "val": Digits(split="test")}
    return {split: FashionMNIST(root, split=split) for split in ("train", "val")}


class _FirstClasses:
    """Of a data set the items of its first classes."""

    def __init__(self, source: Any, classes: int) -> None:
        self.classes = source.classes[:classes]
        self._source = source
        self._indices = [index for index, label in enumerate(source.targets) if label < classes]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._indices[index]]


def _write_split(
    folder: Path, source: Any, first_id: int, count: int, size: int, objects: int, random: Random
) -> dict[str, Any]:
    """Writes images, numbered from ``first_id``, and returns what COCO's JSON says of them."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        width, height = (size - random.randrange(size // 4) for _ in range(2))
        canvas = _Canvas(width, height, random)
        if number == 1:
            canvas.place_crowd(source, random)
        if number > 0:  # the first has no object
            for _ in range(random.randint(1, objects)):
                canvas.place(source, random, size)
        image_id = first_id + number
        name = f"{image_id:012d}.jpg"
        canvas.image(grey=number == 2).save(folder / name, "JPEG", quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for annotation in canvas.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    names = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, source.classes, strict=False)]
    return {"images": images, "annotations": annotations, "categories": names}


class _Canvas:
    """An image that items are laid on, none over another."""

    def __init__(self, width: int, height: int, random: Random) -> None:
        noise = np.frombuffer(random.randbytes(3 * width * height), np.uint8).reshape(height, width, 3)
        self._pixels = random.uniform(40, 90) + noise * 0.15
        self._taken = np.zeros((height, width), dtype=bool)
        self.annotations: list[dict[str, Any]] = []

    def place(self, source: Any, random: Random, size: int) -> None:
        """Lays an item somewhere; where there is no room, it is left out."""
        mask, label = _item(source, random, random.randint(size // 8, size // 2))
        where = self._room(mask.shape, random)
        if where is not None:
            self._lay(mask, where, random)
            self._annotate(where, mask.shape, int((mask > 0).sum()), label, crowd=False)

    def place_crowd(self, source: Any, random: Random) -> None:
        """Lays small items of one class in a row, annotated as one crowd."""
        first, label = _item(source, random, 8)
        masks = [first]
        while len(masks) < _CROWD:
            mask, other = _item(source, random, 8)
            if other == label:
                masks.append(mask)
        rows, columns = max(len(mask) for mask in masks), sum(mask.shape[1] for mask in masks)
        row = np.zeros((rows, columns))
        at = 0
        for mask in masks:
            row[: len(mask), at : at + mask.shape[1]] = mask
            at += mask.shape[1]
        where = self._room(row.shape, random)
        if where is not None:
            self._lay(row, where, random)
            self._annotate(where, row.shape, int((row > 0).sum()), label, crowd=True)

    def image(self, grey: bool) -> Image.Image:
        """What it has come to."""
        image = Image.fromarray(self._pixels.clip(0, 255).round().astype(np.uint8))
        return image.convert("L") if grey else image

    def _room(self, shape: tuple[int, ...], random: Random) -> tuple[int, int] | None:
        """Row and column of a free place; None where none is found."""
        (height, width), (rows, columns) = self._taken.shape, shape
        if rows > height or columns > width:
            return None
        for _ in range(_TRIES):
            top, left = random.randint(0, height - rows), random.randint(0, width - columns)
            if not self._taken[top : top + rows, left : left + columns].any():
                return top, left
        return None

    def _lay(self, mask: np.ndarray, where: tuple[int, int], random: Random) -> None:
        part = np.s_[where[0] : where[0] + mask.shape[0], where[1] : where[1] + mask.shape[1]]
        colour = np.array([random.uniform(140, 255) for _ in range(3)])
        self._pixels[part] += mask[..., None] / 255 * (colour - self._pixels[part])
        self._taken[part] = True

    def _annotate(self, where: tuple[int, int], shape: tuple[int, ...], area: int, label: int, crowd: bool) -> None:
        box = [float(number) for number in (where[1], where[0], shape[1], shape[0])]
        category = CATEGORY_IDS[label]
        self.annotations.append({"category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)})


def _item(source: Any, random: Random, side: int) -> tuple[np.ndarray, int]:
    """An item's grey levels, cut off where it ends, before which it is resized to ``side``; and its label."""
    image, label = source[random.randrange(len(source))]
    mask = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=float)
    mask = np.where(mask < _VISIBLE, 0, mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):  # too dark to be seen when it is small
        return _item(source, random, side)
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], label


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 0 done, 2 bad input.
    """
    numbers = (
        ("train", 200, "training images"),
        ("val", 50, "validation images"),
        ("size", 128, "longest side of the images, pixels"),
        ("objects", 5, "most items of an image"),
        ("classes", 10, "classes of the items, the first of the ten"),
    )
    about = "Write a small data set in the layout of COCO 2017, its boxes known exactly."
    arguments = parser("coco_shapes", about, numbers, "all that is random")
    arguments.add_argument("--items", default="digits", metavar="KIND", help="digits or fashion_mnist (digits)")
    arguments.add_argument("--root", metavar="DIR", help="where Fashion-MNIST lies")
    options = arguments.parse_args(argv)
    try:
        write_tree(**vars(options))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{options.folder}: {options.train} training and {options.val} validation images of {options.items}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
