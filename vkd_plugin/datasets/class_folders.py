"""Whether a folder is one of class folders, and where the right one may be if it is not.

Looks at names alone, of the folder and of those around it: a listing or two, where the images of ImageNet are a
million files.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.datasets.folder import is_image_file

from ..errors import BadValue
from ..suggest import closest, nearest

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_KAGGLE = "ILSVRC/Data/CLS-LOC"  # where the challenge's archive keeps train and val
_FEW = 20
"""Folders with at most so many folders are looked into for the right one."""


def split_folder(root: str, split: str | None) -> Path:
    """The folder that should hold class folders.

    Args:
        root: as the user wrote it.
        split: a folder in it; None means ``root`` itself.

    Raises:
        BadValue: there is none.
    """
    written = Path(os.path.expanduser(root))
    base = written.resolve() if ".." in written.parts else written.absolute()  # so that its parent lies above it
    if not base.exists():
        raise BadValue(f"nothing is at '{base}'{_nearest_entry(base)}", root)
    if split is None or not base.is_dir():
        folder = base
    else:
        folder = base / split
        if not folder.exists():
            around = (base.parent, base / _KAGGLE, *_few_folders(base))
            found = [place for place in around if (place / split).is_dir()]
            hint = _did_you_mean(found) or nearest(split, _folders(base)[:_FEW])
            raise BadValue(f"'{base}' has no folder '{split}'{hint}", root)
    if not folder.is_dir():
        raise BadValue(f"'{folder}' is a file, not a folder", root)
    return folder


def class_names(root: str, folder: str | os.PathLike[str], num_classes: int | None) -> list[str]:
    """Names of the class folders in ``folder``, in order.

    Args:
        root: as the user wrote it.
        folder: exists.
        num_classes: how many there have to be; None for any number.

    Raises:
        BadValue: there are none or as many others, or what is there are not classes.
    """
    path = Path(folder)
    names = _folders(path)
    if not names:
        raise BadValue(_why_no_classes(path), root)
    if set(names) <= set(_SPLITS):
        meant = _did_you_mean([path / name for name in names])
        raise BadValue(f"'{path}' holds {_listed(names)}, not classes{meant}", root)
    if num_classes is not None and len(names) != num_classes:
        said = f"'{path}' has {_count(len(names), 'class folder')}, num_classes is {num_classes}"
        raise BadValue(said + (_elsewhere(path, num_classes) or _differences(path, names)), root)
    return names


def check_samples(root: str, folder: Path, names: Sequence[str], labels: Iterable[int]) -> None:
    """Each class folder has an image.

    Args:
        root: as the user wrote it.
        folder: holds them.
        names: of the class folders.
        labels: of all images.

    Raises:
        BadValue: some have none.
    """
    empty = [names[label] for label in sorted(set(range(len(names))) - set(labels))]
    if empty:
        raise BadValue(f"'{folder}' has {_count(len(empty), 'class folder')} without an image: {_listed(empty)}", root)


def check_same_as_train(root: str, folder: Path, names: Sequence[str], num_classes: int | None) -> None:
    """A folder to evaluate on has the classes of the ``train`` beside it: labels number the folders.

    Args:
        root: as the user wrote it.
        folder: holds the class folders.
        names: theirs.
        num_classes: how many there have to be; a ``train`` with as many others is wrong itself.

    Raises:
        BadValue: it has others.
    """
    train = folder.parent / "train"
    if folder.name not in _SPLITS or folder.name == train.name or not train.is_dir():
        return
    theirs = set(_folders(train))
    if theirs - set(_SPLITS) and theirs != set(names) and num_classes in (None, len(theirs)):
        raise BadValue(f"'{folder}' and '{train}' have different classes{_differences(folder, names)}", root)


def _why_no_classes(path: Path) -> str:
    files = [entry.name for entry in os.scandir(path) if entry.is_file()]
    archives = [name for name in files if name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    images = sum(map(is_image_file, files))
    if images and path.name not in _SPLITS:
        return f"'{path}' holds images, no class folders; is it a class folder itself? Did you mean '{path.parent}'?"
    if images:
        return f"'{path}' holds {_count(images, 'image')} and no class folders: each has to lie in that of its class"
    if archives:
        return f"'{path}' holds {_count(len(archives), 'archive')} and no class folders; unpack each into a folder"
    return f"'{path}' holds no class folders"


def _elsewhere(path: Path, num_classes: int) -> str:
    """Folders above and below with the right number of folders, to append to a message."""
    below = _few_folders(path)
    deeper = [folder for place in below for folder in _few_folders(place)]
    return _did_you_mean([at for at in (path.parent, *below, *deeper) if len(_folders(at)) == num_classes])


def _differences(path: Path, names: Sequence[str]) -> str:
    """Which classes are missing and which are too many, where a ``train`` beside it, or ImageNet, tells."""
    train = path.parent / "train"
    imagenet = ImageNetInfo("imagenet-1k").label_names()
    right, whose = (_folders(train), f"'{train}'") if path != train and train.is_dir() else (imagenet, "ImageNet-1k")
    if 2 * len(set(right) & set(names)) < len(names):  # it is about something else
        return ""
    missing, extra = sorted(set(right) - set(names)), sorted(set(names) - set(right))
    parts = [f"{what}: {_listed(which)}" for what, which in (("missing", missing), ("too many", extra)) if which]
    return f" (compared with {whose}, {'; '.join(parts)})" if parts else ""


def _nearest_entry(path: Path) -> str:
    """What ``path`` may be a misspelling of, to append to a message."""
    there = next(parent for parent in path.parents if parent.is_dir())
    meant = closest(path.relative_to(there).parts[0], _folders(there))
    return _did_you_mean([there / meant]) if meant else ""


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return []


def _few_folders(path: Path) -> list[Path]:
    names = _folders(path)
    return [path / name for name in names] if len(names) <= _FEW else []


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _did_you_mean(found: Sequence[Path]) -> str:
    return f" (did you mean {' or '.join(f'{str(place)!r}' for place in found)}?)" if found else ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
