"""Which prediction answers for which object: the assignment of least cost (DETR, arXiv 2005.12872, section 3.1).

Legend: S stages of predictions, B images, Q queries, K classes, n objects of an image.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from ...numerics import at_least_float32, without_autocast
from .targets import Objects

logger = logging.getLogger("vkd_plugin")

_FAR_OFF = 1e6
"""In place of a cost that is no number; finite ones stay below a few hundred."""


class HungarianMatcher(nn.Module):
    """Costs of class, place and overlap, each with its weight.

    Args:
        class_weight: of the focal loss that a prediction would have with the object's class, less that without.
        box_weight: of the L1 distance between boxes, in fractions of the image.
        giou_weight: of their generalised IoU, which lowers the cost.
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, objects: Sequence[Objects]) -> list[Tensor]:
        """Pairs for each image, those of each stage on their own.

        Costs are computed in float32 or wider, and taken to the CPU once. Costs that are not finite, of predictions
        that have gone astray, are the highest; a warning says so. The loss will then not be finite either.

        Args:
            logits: (S, B, Q, K).
            boxes: (S, B, Q, 4), centre x, centre y, width, height.
            objects: B of them.

        Returns:
            For each image (S, 2, min(Q, n)), int64, on the CPU: indices of predictions, ascending, and of objects.
        """
        with without_autocast(logits):
            logits, boxes = at_least_float32(logits), at_least_float32(boxes)
            costs = [self._costs(logits[:, i], boxes[:, i], own) for i, own in enumerate(objects)]
        row = torch.cat([cost.flatten() for cost in costs])
        if not bool(row.isfinite().all()):
            logger.warning("ViDT's predictions are not finite, and so the loss will not be")
            row = row.nan_to_num(_FAR_OFF, _FAR_OFF, _FAR_OFF)
        blocks = row.cpu().split([cost.numel() for cost in costs])
        return [_assigned(block.view(cost.shape)) for block, cost in zip(blocks, costs, strict=True)]

    def _costs(self, logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
        """(S, Q, n)."""
        p = logits.sigmoid()[..., objects.labels]
        absent = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        present = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        own = objects.boxes.to(boxes.dtype)
        distance = torch.cdist(boxes, own.expand(len(boxes), -1, -1), p=1)
        corners, own_corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes.flatten(0, 1), own))
        giou = generalized_box_iou(corners, own_corners).view(distance.shape)
        return self.class_weight * (present - absent) + self.box_weight * distance - self.giou_weight * giou


def _assigned(costs: Tensor) -> Tensor:
    """(S, Q, n) to (S, 2, min(Q, n))."""
    from scipy.optimize import linear_sum_assignment  # here: only detectors need it, and it is slow to import

    pairs = [torch.stack([torch.as_tensor(index) for index in linear_sum_assignment(cost)]) for cost in costs.numpy()]
    return torch.stack(pairs)
