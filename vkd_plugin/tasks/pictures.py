"""Detections against ground truth, drawn side by side in one picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from ..errors import UserError
from .coco_ap import Seen

Colour = tuple[int, int, int]

TRUTH: Colour = (0, 158, 115)
CROWD: Colour = (86, 180, 233)
FOUND: Colour = (230, 159, 0)
"""Of annotated objects, annotated crowds, and detections; colour-blind eyes tell them apart (Okabe and Ito's)."""

_LARGEST = 400  # long side of a panel, pixels: larger images are scaled down
_SMALLEST = 200  # smaller ones are drawn larger, by a whole number, as names would hide them
_PAIRS = 4  # in a row of the grid
_GREY = 128  # beside panels that are smaller than the largest


@dataclass(frozen=True)
class Pictures:
    """What is to be drawn.

    Args:
        count: how many images.
        score: the lowest score of a detection that is drawn.
        read: the image of an id, as its file holds it.
        classes: names by label; a label that has none is its number.
    """

    count: int
    score: float
    read: Callable[[int], Image.Image]
    classes: Sequence[str] = ()

    def draw(self, path: Path, images: Mapping[int, Seen]) -> None:
        """Writes a grid of pairs: an image with its annotated objects, and with detections over their outlines.

        Args:
            path: the PNG; what is there is replaced.
            images: by id, at least one. Drawn are as many as asked for, at equal distances in the order of their ids:
                the same of the same data set, in whatever order they come.

        Raises:
            UserError: an image is gone, or the picture cannot be written.
        """
        ids = sorted(images)
        places = np.linspace(0, len(ids) - 1, min(self.count, len(ids))).round().astype(int)
        try:
            panels = [panel for place in places for panel in self._pair(ids[place], images[ids[place]])]
            height, width = (max(panel.shape[side] for panel in panels) for side in (1, 2))
            cells = torch.full((len(panels), 3, height, width), _GREY, dtype=torch.uint8)
            for cell, panel in zip(cells, panels, strict=True):
                cell[:, : panel.shape[1], : panel.shape[2]] = panel
            grid = make_grid(cells, nrow=2 * min(_PAIRS, len(places)), padding=4, pad_value=255)
            path.parent.mkdir(parents=True, exist_ok=True)
            F.to_pil_image(grid).save(path, "PNG")
        except OSError as error:
            raise UserError(f"{path}: cannot be drawn: {error.strerror or error}") from error

    def _pair(self, image_id: int, seen: Seen) -> tuple[Tensor, Tensor]:
        image, scale = _panel(self.read(image_id))
        colours = [CROWD if is_crowd else TRUTH for is_crowd in seen.truth[:, 6]]
        names = [self._name(label) for label in seen.truth[:, 5]]
        annotated = seen.truth[:, :4] * scale
        order = np.argsort(seen.scores, kind="stable")  # the surest last, over the others
        order = order[seen.scores[order] >= self.score]
        found = [f"{self._name(seen.labels[i])} {seen.scores[i]:.2f}" for i in order]
        both = _drawn(_drawn(image, annotated, colours), seen.boxes[order] * scale, [FOUND] * len(order), found)
        return _drawn(image, annotated, colours, names), both

    def _name(self, label: float) -> str:
        number = int(label)
        return self.classes[number] if 0 <= number < len(self.classes) else str(number)


def _panel(image: Image.Image) -> tuple[Tensor, float]:
    """(3, H, W) uint8, and by how much the image was scaled."""
    long = max(image.size)
    scale = _LARGEST / long if long > _LARGEST else float(max(_SMALLEST // long, 1))
    width, height = (max(round(side * scale), 1) for side in image.size)
    pixels: Tensor = F.pil_to_tensor(image)
    interpolation = F.InterpolationMode.BILINEAR if scale < 1 else F.InterpolationMode.NEAREST
    return F.resize(pixels, [height, width], interpolation, antialias=True), scale


def _drawn(image: Tensor, boxes: np.ndarray, colours: list[Colour], names: list[str] | None = None) -> Tensor:
    """The image with boxes (n, 4), left, top, width, height, as far as they lie in it; those without area are not."""
    height, width = image.shape[1:]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    corners = corners.clip(0, [width - 1, height - 1] * 2)
    kept = np.flatnonzero((corners[:, 2:] > corners[:, :2]).all(axis=1))
    if not len(kept):
        return image
    labels = None if names is None else [names[i] for i in kept]
    drawn: Tensor = draw_bounding_boxes(
        image,
        torch.from_numpy(corners[kept]),
        labels,
        [colours[i] for i in kept],
        width=2,
        fill_labels=labels is not None,
    )
    return drawn
