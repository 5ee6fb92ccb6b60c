"""A folder in the shape of ImageNet for dry runs and tests: ``python -m vkd_plugin.datasets.tiny_imagenet DIR``.

``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG`` with WordNet-like class names, images of several sizes and
proportions. A class is a shape in a colour, so there is something to learn. The first images of each split are what
real data sets hold too: a greyscale JPEG, one in CMYK, and one that its EXIF data ask to turn.
"""

import colorsys
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from ..errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from .generated import new_folder, parser

_SIZES = ((96, 72), (72, 96), (128, 128), (160, 100), (100, 160), (64, 64))
_CORNERS = (3, 4, 0, 5, 6)  # of the shapes; 0 is a disc
_FIRST_CLASS = 90_000_000  # WordNet's numbers end before
_ORIENTATION = 0x0112


def write_tree(folder: Path, classes: int = 10, train: int = 20, val: int = 5, seed: int = 0) -> None:
    """Writes the tree; the same arguments give the same bytes (with the same Pillow).

    Args:
        folder: is made; has to be empty if it is there.
        classes: how many.
        train, val: images of each class.
        seed: of all that is random in them.

    Raises:
        UserError: ``folder`` holds something, or cannot be written.
    """
    with new_folder(folder):
        for split, count in (("train", train), ("val", val)):
            for label in range(classes):
                name = f"n{_FIRST_CLASS + label}"
                (folder / split / name).mkdir(parents=True)
                for number in range(count):
                    image = _image(label, Random(f"{seed}/{split}/{label}/{number}"))
                    _save(image, folder / split / name / f"{name}_{number}.JPEG", label * count + number)


def _image(label: int, random: Random) -> Image.Image:
    """A shape in the class's colour on a noisy grey."""
    width, height = size = random.choice(_SIZES)
    image = Image.new("RGB", size, (random.randint(90, 160),) * 3)
    reach = random.uniform(0.25, 0.4) * min(size)
    centre = [random.uniform(0.4, 0.6) * side for side in size]
    turn = random.uniform(-0.3, 0.3)
    corners = _CORNERS[label % len(_CORNERS)] or 60
    outline = [
        (centre[0] + reach * math.cos(turn + angle), centre[1] + reach * math.sin(turn + angle))
        for angle in (2 * math.pi * corner / corners for corner in range(corners))
    ]
    hue = label * (math.sqrt(5) - 1) / 2 % 1  # the golden ratio spreads any number of hues
    colour = colorsys.hsv_to_rgb(hue, random.uniform(0.75, 1), random.uniform(0.75, 1))
    ImageDraw.Draw(image).polygon(outline, fill=tuple(round(255 * part) for part in colour))
    noise = Image.frombytes("RGB", size, random.randbytes(3 * width * height))
    return Image.blend(image, noise, 0.15)


def _save(image: Image.Image, path: Path, place: int) -> None:
    """Writes the image that comes at ``place`` in its split."""
    exif = Image.Exif()
    if place == 0:
        image = image.convert("L")
    elif place == 1:
        image = image.convert("CMYK")
    elif place == 2:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[_ORIENTATION] = 6  # to be turned back by 90 degrees
    image.save(path, "JPEG", quality=85, exif=exif)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 0 done, 2 bad input.
    """
    numbers = (
        ("classes", 10, "number of classes"),
        ("train", 20, "training images of each class"),
        ("val", 5, "validation images of each class"),
    )
    about = "Write a small folder of JPEGs in the shape of ImageNet, for dry runs."
    options = parser("tiny_imagenet", about, numbers, "all that is random in them").parse_args(argv)
    try:
        write_tree(options.folder, options.classes, options.train, options.val, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    count = options.classes * options.train, options.classes * options.val
    print(f"{options.folder}: {options.classes} classes, {count[0]} training and {count[1]} validation images")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
