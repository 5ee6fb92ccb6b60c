"""What is to be found in each image: from pixels to fractions, and checked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ...errors import UserError
from ...numerics import at_least_float32


class Objects(NamedTuple):
    """The objects of one image.

    Args:
        labels: (n,) int64.
        boxes: (n, 4), centre x, centre y, width and height in fractions of the image, without its padding.
    """

    labels: Tensor
    boxes: Tensor


def objects_of(
    targets: Sequence[Mapping[str, Any]],
    sizes: Sequence[tuple[int, int]],
    num_classes: int,
    device: torch.device,
) -> list[Objects]:
    """The objects of each image, in fractions.

    Args:
        targets: torchvision's: ``boxes`` (n, 4), x1, y1, x2, y2 in pixels, floating point, n = 0 for an image without
            objects; ``labels`` (n,) int64. Anything else, such as ``image_id``, is for messages.
        sizes: (height, width) of each image.
        num_classes: labels lie below it.
        device: where they are to be.

    Raises:
        UserError: as many targets as images, boxes and labels that fit each other, labels in range, finite boxes with
            a width and a height are not what was given; the first image in which it is not is named.
    """
    if len(targets) != len(sizes):
        raise UserError(f"ViDT was given {len(targets)} targets for {len(sizes)} images")
    found = []
    for number, (target, (height, width)) in enumerate(zip(targets, sizes, strict=True)):
        boxes, labels = (_tensor(target, key, number) for key in ("boxes", "labels"))
        if boxes.numel() == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise UserError(f"{_name(target, number)}: boxes should be (n, 4) floats, got {_said(boxes)}")
        if labels.shape != boxes.shape[:1] or (labels.dtype != torch.int64 and len(labels)):
            raise UserError(
                f"{_name(target, number)}: labels should be ({len(boxes)},) int64 for {len(boxes)} boxes, got "
                f"{_said(labels)}"
            )
        boxes = at_least_float32(boxes.to(device))
        scale = boxes.new_tensor([width, height, width, height])
        found.append(Objects(labels.to(device, torch.int64), box_convert(boxes / scale, "xyxy", "cxcywh")))
    _check_values(targets, found, num_classes)
    return found


def _check_values(targets: Sequence[Mapping[str, Any]], found: list[Objects], num_classes: int) -> None:
    labels, boxes = torch.cat([x.labels for x in found]), torch.cat([x.boxes for x in found])
    good = (labels >= 0) & (labels < num_classes) & boxes.isfinite().all(1) & (boxes[:, 2:] > 0).all(1)
    if bool(good.all()):  # the device is waited for once
        return
    index = int((~good).nonzero()[0])
    owners = [number for number, objects in enumerate(found) for _ in objects.labels]
    number = owners[index]
    place = index - owners.index(number)
    label = int(labels[index])
    box = torch.as_tensor(targets[number]["boxes"])[place].tolist()
    if not 0 <= label < num_classes:
        problem = f"label {label} of box {place} is none of the model's {num_classes} classes (0 to {num_classes - 1})"
    elif not boxes[index].isfinite().all():
        problem = f"box {place} is not finite: {box}"
    else:
        problem = f"box {place} should be x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {box}"
    raise UserError(f"{_name(targets[number], number)}: {problem}")


def _tensor(target: Mapping[str, Any], key: str, number: int) -> Tensor:
    value = target.get(key) if isinstance(target, Mapping) else None
    if not isinstance(value, Tensor):
        raise UserError(f"{_name(target, number)}: a target is a mapping with tensors 'boxes' and 'labels'; no '{key}'")
    return value.as_subclass(Tensor)


def _name(target: object, number: int) -> str:
    image_id = target.get("image_id") if isinstance(target, Mapping) else None
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = image_id.item()
    return f"image {number} of the batch" if image_id is None else f"image_id {image_id}"


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
