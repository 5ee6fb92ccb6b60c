"""COCO's annotation files: read once, checked, and kept as arrays, which workers share instead of copying."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadValue
from ..suggest import closest, nearest

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Annotations:
    """What a file says of I images and their N annotated objects, objects in the order of their images.

    Attributes:
        image_ids: (I,) int64.
        file_names: of the images.
        sizes: (I, 2) int64, height and width.
        starts: (I + 1,) int64; the objects of image i are those from ``starts[i]`` to ``starts[i + 1]``.
        boxes: (N, 4) float64, left, top, width, height in pixels, as written.
        areas: (N,) float64, as written; of COCO's objects their masks'.
        categories: (N,) int64, category ids.
        crowds: (N,) bool.
        names: category id -> name, by ascending id.
    """

    image_ids: np.ndarray
    file_names: list[str]
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    categories: np.ndarray
    crowds: np.ndarray
    names: dict[int, str]


def find_split(root: str, split: str) -> tuple[Path, Path]:
    """The folder of images and the annotation file of a split of COCO 2017.

    Args:
        root: holds ``train2017``, ``val2017`` and ``annotations``; as the user wrote it.
        split: ``'train'`` or ``'val'``.

    Raises:
        BadValue: one of them is not there.
    """
    base = Path(os.path.expanduser(root)).absolute()
    if not base.is_dir():
        what = "is a file, not a folder" if base.exists() else "does not exist"
        raise BadValue(f"'{base}' {what}; it has to hold train2017, val2017 and annotations", root)
    folder, file = base / f"{split}2017", base / "annotations" / f"instances_{split}2017.json"
    for path, is_there in ((folder, folder.is_dir()), (file, file.is_file())):
        if not is_there:
            raise BadValue(f"'{path}' is missing{_meant(base, path)}", root)
    return folder, file


def read_annotations(root: str, folder: Path, file: Path) -> Annotations:
    """Reads and checks an annotation file, and that its images are in their folder.

    Args:
        root: as the user wrote it, the value that errors blame.
        folder: of the images.
        file: see above.

    Raises:
        BadValue: it is not what COCO's are; the message says where in the file.
    """
    try:
        content = json.loads(file.read_bytes(), object_hook=_without_mask)
        return _checked(content, folder, file)
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise BadValue(f"'{file}' {_what(error)}", root) from error


class _Wrong(ValueError):
    """What is wrong with a file, to be said after its name."""


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without its polygons, which are most of the file, and of the memory, and not asked for."""
    entry.pop("segmentation", None)
    return entry


def _what(error: Exception) -> str:
    if isinstance(error, _Wrong):
        return str(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"is not JSON: {error}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return f"is not an annotation file of COCO: {error}"


def _checked(content: Any, folder: Path, file: Path) -> Annotations:
    images, objects, names = _lists(content)
    index: dict[int, int] = {}
    for place, image in enumerate(images):
        number = _whole(image, "id", f"images[{place}]")
        if number in index:
            raise _Wrong(f"has two images with the id {number}")
        index[number] = place
    file_names = [_file_name(image, f"images[{place}]") for place, image in enumerate(images)]
    sizes = np.array(
        [
            [_whole(image, side, f"images[{place}]", least=1) for side in ("height", "width")]
            for place, image in enumerate(images)
        ],
        dtype=np.int64,
    )
    _check_files(folder, file_names)
    places = np.array([_place(entry, index, names, at) for at, entry in enumerate(objects)], dtype=np.int64)
    boxes = np.array([_box(entry, at) for at, entry in enumerate(objects)]).reshape(-1, 4)
    order = np.argsort(places, kind="stable")
    found = Annotations(
        image_ids=np.fromiter(index, dtype=np.int64),
        file_names=file_names,
        sizes=sizes,
        starts=np.searchsorted(places[order], np.arange(len(images) + 1)),
        boxes=boxes[order],
        areas=np.array([_area(entry, at) for at, entry in enumerate(objects)])[order],
        categories=np.array([entry["category_id"] for entry in objects], dtype=np.int64)[order],
        crowds=np.array([bool(entry.get("iscrowd", 0)) for entry in objects])[order],
        names=names,
    )
    _check_inside(found, objects, places, boxes)
    return found


def _lists(content: Any) -> tuple[list[Any], list[Any], dict[int, str]]:
    """Images, annotations and names of categories; none of them may be missing, and none empty."""
    if not isinstance(content, dict):
        raise _Wrong(f"holds a {type(content).__name__}, not 'images', 'annotations' and 'categories'")
    lists = []
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise _Wrong(f"has no '{key}'{nearest(key, content) if closest(key, content) else ''}")
        if not isinstance(content[key], list):
            raise _Wrong(f"has '{key}' that are not a list")
        if not content[key]:
            raise _Wrong(f"has an empty list of {key}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise _Wrong(f"has entries under '{key}' that are not mappings")
        lists.append(content[key])
    images, objects, categories = lists
    names = {_whole(c, "id", f"categories[{at}]", least=0): str(c.get("name")) for at, c in enumerate(categories)}
    if len(names) < len(categories):
        raise _Wrong("has two categories with one id")
    return images, objects, dict(sorted(names.items()))


def _whole(entry: Mapping[str, Any], key: str, where: str, least: int | None = None) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise _Wrong(f"{where}: '{key}' should be a whole number{at_least}, not {value!r}")
    return value


def _file_name(image: Mapping[str, Any], where: str) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise _Wrong(f"{where}: 'file_name' should be the name of a file, not {name!r}")
    return name


def _check_files(folder: Path, names: Sequence[str]) -> None:
    """One listing of the folder, where asking for each of COCO's 118,287 files would take as many system calls."""
    there = set(os.listdir(folder))
    absent = [name for name in names if name not in there and not (os.sep in name and (folder / name).is_file())]
    if absent:
        shown = ", ".join(f"'{name}'" for name in absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise _Wrong(f"names {len(absent)} of {len(names)} images that are not in '{folder}': {shown}")


def _place(entry: Mapping[str, Any], index: Mapping[int, int], names: Mapping[int, str], at: int) -> int:
    """The image of an annotation, whose category has to be known."""
    where = f"annotations[{at}] (id {entry.get('id')})"
    category, image = entry.get("category_id"), entry.get("image_id")
    if not isinstance(category, int) or category not in names:
        raise _Wrong(f"{where}: category {category!r} is not among the {len(names)} categories")
    if not isinstance(image, int) or image not in index:
        raise _Wrong(f"{where}: image {image!r} is not among the {len(index)} images")
    return index[image]


def _box(entry: Mapping[str, Any], at: int) -> list[float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        where = f"annotations[{at}] (id {entry.get('id')})"
        raise _Wrong(f"{where}: 'bbox' should be four numbers [left, top, width, height], not {box!r}")
    return box


def _area(entry: Mapping[str, Any], at: int) -> float:
    area = entry.get("area", None)
    if area is None:  # of boxes that are not COCO's
        return entry["bbox"][2] * entry["bbox"][3]
    if not _is_number(area):
        raise _Wrong(f"annotations[{at}] (id {entry.get('id')}): 'area' should be a number, not {area!r}")
    return area


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_inside(found: Annotations, objects: Sequence[Any], places: np.ndarray, boxes: np.ndarray) -> None:
    """No box lies wholly outside of its image. COCO has some that reach over an edge, which is no mistake."""
    if not len(boxes):
        return
    height, width = found.sizes[places].T
    left, top, right, bottom = boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    outside = np.flatnonzero((left >= width) | (top >= height) | (right < 0) | (bottom < 0))
    if len(outside):
        at = int(outside[0])
        name, box = found.file_names[places[at]], boxes[at].tolist()
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        size = f"{width[at]} x {height[at]} pixels"
        where = f"annotations[{at}] (id {objects[at].get('id')})"
        raise _Wrong(f"{where}: the box {box} lies outside of image '{name}', {size}{more}")


def _meant(base: Path, path: Path) -> str:
    """Where the missing file or folder may be, to append to a message."""
    for place in (base.parent, base / "coco2017", base / "coco", base / "images"):
        if place != base and (place / path.relative_to(base)).exists():
            return f" (did you mean root: '{place}'?)"
    there = path.parent if path.parent.is_dir() else path.parent.parent
    missing = path.relative_to(there).parts[0]
    meant = closest(missing, os.listdir(there)) if there.is_dir() else None
    return f" (did you mean '{there / meant}'?)" if meant and meant != missing else ""
