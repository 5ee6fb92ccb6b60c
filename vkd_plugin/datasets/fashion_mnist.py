"""Fashion-MNIST from whichever of its forms is there, with a validation split and nested parts of the training images.

Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, H. Xiao, K. Rasul, R. Vollgraf,
arXiv 1708.07747.
"""

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image
from torchdistill.datasets.registry import register_dataset

from ..arguments import one_of
from ..errors import UserError
from .fractions import check_fraction, kept_fraction, shuffled
from .grey_images import GreyImages

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""
DEFAULT_ROOT = "~/datasets"

_CLASSES = torchvision.datasets.FashionMNIST.classes
_SIZES = {"train": 60_000, "t10k": 10_000}
_VAL_PER_CLASS = 500
_VAL_SEED = "validation"


@register_dataset(key="SplitFashionMNIST")  # torchvision's keeps its name
class FashionMNIST(GreyImages):
    """Clothes of ten classes, 28 x 28 grey pixels: 55,000 training, 5,000 validation and 10,000 test images.

    In YAML::

        fashion_mnist/train: !import_call
          key: 'vkd_plugin.datasets.FashionMNIST'
          init:
            kwargs:
              split: 'train'
              fraction: 0.05
              transform: !import_call {key: 'torchvision.transforms.ToTensor', init: }

    Items are ``(image, label)``: a PIL image of mode ``L`` and an int from 0 to 9; each goes through its transform.
    The four idx files, with or without ``.gz``, are looked for in ``root``, in ``root/FashionMNIST/raw`` (torchvision's
    layout), and where Debian's package ``dataset-fashion-mnist`` puts them; the first folder that has them is read.

    Args:
        root: see above; ``~/datasets`` if it is not given.
        split: ``'train'``, ``'val'`` (500 images of each class out of the published training images, the same ones
            always) or ``'test'`` (the published test images).
        transform: applied to the image.
        target_transform: applied to the label.
        fraction: share of the training images to keep, in (0, 1], of each class at least one. With one ``seed`` a
            smaller fraction is a part of a larger one.
        seed: chooses which images a fraction keeps.
        download: has torchvision download the files into ``root`` if no folder has them.

    Attributes:
        classes: names of the ten classes.
        targets: label of each item, ints.

    Raises:
        UserError: no folder has the files, or one of them is not what its name says.
        ValueError: an unknown split, or a fraction out of range or of another split than the training images.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        _check_split(split, fraction)
        name = "t10k" if split == "test" else "train"
        folder = _folder(root, download)
        images = _read(folder, f"{name}-images-idx3-ubyte", (_SIZES[name], 28, 28))
        labels = _read(folder, f"{name}-labels-idx1-ubyte", (_SIZES[name],))
        kept = _kept(labels, split, fraction, seed)
        super().__init__(images[kept], labels[kept].tolist(), _CLASSES, transform, target_transform)

    @staticmethod
    def length_of_split(split: str = "train", fraction: float = 1.0, **_: Any) -> int:
        """The number of items of a data set with such arguments, without its files."""
        _check_split(split, fraction)
        classes = len(_CLASSES)
        per_class = {"train": _SIZES["train"] // classes - _VAL_PER_CLASS, "val": _VAL_PER_CLASS, "test": 1000}[split]
        return classes * len(kept_fraction(range(per_class), fraction))


def _check_split(split: str, fraction: float) -> None:
    one_of("split of FashionMNIST", split, ("train", "val", "test"))
    check_fraction(split, fraction)


def _kept(labels: np.ndarray, split: str, fraction: float, seed: int) -> list[int]:
    """Indices of a split's images, in the file's order."""
    if split == "test":
        return list(range(len(labels)))
    kept: list[int] = []
    for label in range(len(_CLASSES)):
        members = shuffled(np.flatnonzero(labels == label).tolist(), _VAL_SEED)
        val, train = members[:_VAL_PER_CLASS], members[_VAL_PER_CLASS:]
        kept += val if split == "val" else kept_fraction(shuffled(train, seed), fraction)
    return sorted(kept)


def _folder(root: str | os.PathLike[str] | None, download: bool) -> Path:
    given = Path(root or DEFAULT_ROOT).expanduser()
    places = (given, given / "FashionMNIST" / "raw", SYSTEM_FOLDER)
    for place in places:
        if _file(place, "train-images-idx3-ubyte") is not None:
            return place
    if download:
        torchvision.datasets.FashionMNIST(str(given), download=True)
        return places[1]
    looked = ", ".join(str(place) for place in places)
    raise UserError(
        f"Fashion-MNIST is not here: no train-images-idx3-ubyte, with or without .gz, in {looked}; "
        "install Debian's package dataset-fashion-mnist, or give download: True"
    )


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str, shape: Sequence[int]) -> np.ndarray:
    """The bytes of an idx file: two zeros, 8 for unsigned bytes, the number of dimensions, each size; big-endian."""
    path = _file(folder, name)
    if path is None:
        raise UserError(f"{folder / name}: no such file, with or without .gz, beside the others of Fashion-MNIST")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = " x ".join(map(str, shape))
    if content[: len(header)] != header or len(content) != len(header) + int(np.prod(shape)):
        raise UserError(f"{path}: not the idx file of Fashion-MNIST: expected {size} bytes and a header that says so")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
