"""From what ViDT puts out to detections."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ...numerics import at_least_float32


@torch.no_grad()
def detections(
    outputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], limit: int = 100
) -> list[dict[str, Tensor]]:
    """The pairs of query and class with the highest sigmoid scores; a query can be there several times.

    Args:
        outputs: ``pred_logits`` (B, Q, K) and ``pred_boxes`` (B, Q, 4), centre x, centre y, width and height in
            fractions.
        sizes: (height, width) of each image, in the pixels that boxes are wanted in.
        limit: of detections for each image; there are ``min(limit, Q * K)``.

    Returns:
        For each image ``boxes`` (n, 4), x1, y1, x2, y2, not clipped to the image; ``labels`` (n,) int64; ``scores``
        (n,), falling. Floats are float32 or wider.
    """
    scores = at_least_float32(outputs["pred_logits"]).sigmoid()
    classes = scores.shape[2]
    scores, index = scores.flatten(1).topk(min(limit, scores[0].numel()), dim=1)
    boxes = box_convert(at_least_float32(outputs["pred_boxes"]), "cxcywh", "xyxy")
    boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    boxes = boxes * boxes.new_tensor([(width, height) * 2 for height, width in sizes])[:, None]
    return [
        {"boxes": own, "labels": label, "scores": score}
        for own, label, score in zip(boxes, index % classes, scores, strict=True)
    ]
