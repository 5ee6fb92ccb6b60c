"""COCO 2017 for detectors: images with boxes and labels, checked before training.

T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.
"""

import logging
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchdistill.datasets.registry import register_collate_func, register_dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import get_size

from ..arguments import one_of
from ..errors import UserError
from .coco_annotations import SPLITS, find_split, read_annotations
from .unreadable import ON_ERROR, first_readable

logger = logging.getLogger(__name__)

Transforms: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
GROUND_TRUTH = ("left", "top", "width", "height", "area", "label", "iscrowd")
"""Columns of a target's ``ground_truth``."""


@register_dataset(key="CheckedCocoDetection")  # torchvision's keeps its name
class CocoDetection(Dataset[tuple[Any, dict[str, Tensor]]]):
    """``root/{train,val}2017`` with ``root/annotations/instances_{train,val}2017.json``, in torchvision's convention.

    In YAML::

        coco2017/train: !import_call
          key: 'vkd_plugin.datasets.CocoDetection'
          init:
            kwargs:
              root: '${COCO}'
              split: 'train'
              transforms: *train_transforms

    Items are ``(image, target)``, the image RGB whatever the file holds, the target a dictionary of

    * ``boxes`` (n, 4) float32, left, top, right, bottom in pixels of the image as it is given;
    * ``labels`` (n,) int64;
    * ``area`` (n,) float32, of the boxes, and ``iscrowd`` (n,) int64, all 0: crowds are nothing to train on;
    * ``image_id`` () int64, ``orig_size`` (2,) and ``size`` (2,) int64, height and width in the file and as given;
    * ``ground_truth`` (m, 7) float64, what an evaluation goes by: left, top, width, height, area, label and iscrowd
      of all the file's annotations, crowds included, as written and in pixels of the file.

    Boxes that reach over an edge are clipped, and those without width or height are left out (COCO's training images
    have a few), as are those that a crop has left nothing of.

    Args:
        root: holds ``train2017``, ``val2017`` and ``annotations``.
        split: ``'train'`` or ``'val'``.
        transforms: called with image and target, of which it sees ``boxes`` (``tv_tensors.BoundingBoxes``) and
            ``labels``; see :mod:`vkd_plugin.datasets.detection_transforms`.
        labels: ``'category_ids'`` takes COCO's ids, 1 to 90 with ten gaps, for labels, as torchvision's detectors
            (``num_classes: 91``) and the reference do; ``'contiguous'`` numbers the categories from 0 by their ids.
        keep_empty: keep images without a box to train on.
        on_error: what an image means that cannot be read, or has another size than the annotations say. ``'stop'``: a
            ``UserError`` with its path. ``'skip'``: the next item whose image can be read takes its place; the engine
            logs the path and counts (``unreadable_images`` in ``metrics.jsonl``). For training: an evaluation would
            leave the image's objects out.

    Attributes:
        classes: name of each label; ``'N/A'`` where no category has it.
        category_ids: label -> category id.
        image_ids: of the items.
        degenerate_boxes: how many boxes without width or height are left out.

    Raises:
        BadValue: a folder, the annotation file or an image is missing, or the file is not what COCO's are.
        ValueError: unknown ``split``, ``labels`` or ``on_error``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transforms: Transforms | None = None,
        labels: str = "category_ids",
        keep_empty: bool = True,
        on_error: str = "stop",
    ) -> None:
        one_of("split of CocoDetection", split, SPLITS)
        one_of("labels of CocoDetection", labels, ("category_ids", "contiguous"))
        self.on_error = one_of("on_error", on_error, ON_ERROR)
        self.root = str(root)
        self.transforms = transforms
        self.folder, file = find_split(self.root, split)
        self._found = found = read_annotations(self.root, self.folder, file)
        ids = list(found.names)
        contiguous = labels == "contiguous"
        self.category_ids = dict(enumerate(ids)) if contiguous else {i: i for i in ids}
        self.classes = list(found.names.values()) if contiguous else _names_by_id(found.names)
        self._labels = np.searchsorted(ids, found.categories) if contiguous else found.categories
        self._boxes = _clipped(found.boxes, np.repeat(found.sizes, np.diff(found.starts), axis=0))
        solid = np.all(self._boxes[:, 2:] > self._boxes[:, :2], axis=1)
        self._usable = solid & ~found.crowds
        self.degenerate_boxes = int((~solid).sum())
        if self.degenerate_boxes:
            logger.warning(
                "%s: %d of %d boxes have no width or height and are left out", file, self.degenerate_boxes, len(solid)
            )
        places = range(len(found.image_ids))
        self._places = [p for p in places if keep_empty or self._usable[self._objects(p)].any()]
        self.image_ids: list[int] = found.image_ids[self._places].tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        """Image and target; with ``on_error: 'skip'`` of the next item whose image can be read.

        Raises:
            UserError: the image cannot be read, or has another size than the annotations say.
        """
        at, image = first_readable(
            range(len(self))[operator.index(index)],
            len(self),
            lambda at: str(self._path(self._places[at])),
            lambda at: self._image(self._places[at]),
            self.on_error,
        )
        place = self._places[at]
        found, objects = self._found, self._objects(place)
        usable = np.flatnonzero(self._usable[objects]) + objects.start
        columns = (*found.boxes[objects].T, found.areas[objects], self._labels[objects], found.crowds[objects])
        return _item(
            image,
            torch.from_numpy(self._boxes[usable]).float(),
            torch.from_numpy(self._labels[usable]),
            torch.from_numpy(np.stack(columns, axis=1).astype(np.float64)),
            int(found.image_ids[place]),
            self.transforms,
        )

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and image id of each item: the engine names the files of a bad batch by them."""
        return [(str(self._path(p)), i) for p, i in zip(self._places, self.image_ids, strict=True)]

    def picture(self, image_id: int) -> Image.Image:
        """The image of an id as its file holds it, in RGB.

        Raises:
            OSError, UserError: it cannot be read, or has another size than the annotations say.
        """
        return self._image(self._places[self.image_ids.index(image_id)])

    @staticmethod
    def absent_item(
        image: Image.Image, index: int, transforms: Transforms | None = None, **_: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The item ``index`` of a data set with such arguments, without its files: ``image``, with one object."""
        width, height = image.size
        left, top, right, bottom = box = [width // 4, height // 4, width // 2, height // 2]
        sides = right - left, bottom - top
        truth = torch.tensor([[left, top, *sides, sides[0] * sides[1], 1, 0]]).double()
        return _item(image, torch.tensor([box]).float(), torch.tensor([1]), truth, index, transforms)

    def _objects(self, place: int) -> slice:
        return slice(*self._found.starts[place : place + 2].tolist())

    def _path(self, place: int) -> Path:
        return self.folder / self._found.file_names[place]

    def _image(self, place: int) -> Image.Image:
        path = self._path(place)
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        height, width = self._found.sizes[place].tolist()
        if image.size != (width, height):
            said = f"{image.width} x {image.height} pixels, the annotations say {width} x {height}"
            raise UserError(f"{path}: {said}")
        return image


@register_collate_func
def coco_collate_fn(samples: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """Images, targets and, where there are any, supplements, each as a tuple: images differ in size.

    The name is that of torchdistill's example scripts.
    """
    return tuple(zip(*samples, strict=True))


def _item(
    image: Any, boxes: Tensor, labels: Tensor, truth: Tensor, image_id: int, transforms: Transforms | None
) -> tuple[Any, dict[str, Tensor]]:
    """An image and its target, after the transforms."""
    width, height = image.size
    seen: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": labels,
    }
    if transforms is not None:
        image, seen = transforms(image, seen)
    boxes, labels = (seen[key].as_subclass(Tensor) for key in ("boxes", "labels"))
    left = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # of a crop
    boxes = boxes[left]
    return image.as_subclass(Tensor) if isinstance(image, Tensor) else image, {
        "boxes": boxes,
        "labels": labels[left],
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "image_id": torch.tensor(image_id),
        "orig_size": torch.tensor((height, width)),
        "size": torch.tensor(get_size(image)),
        "ground_truth": truth,
    }


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N, 4) left, top, right, bottom within images of ``sizes`` (N, 2), height and width."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, sizes[:, [1, 0, 1, 0]])


def _names_by_id(names: Mapping[int, str]) -> list[str]:
    return [names.get(i, "N/A") for i in range(max(names) + 1)]
