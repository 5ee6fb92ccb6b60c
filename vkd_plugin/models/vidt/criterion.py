"""What ViDT learns from: classes and boxes of the matched predictions, no class of all others.

Legend: S stages of predictions (the body's, then those of each decoder layer), B images, Q queries, K classes,
T matched pairs in a stage.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from ...distributed import is_distributed
from ...numerics import at_least_float32, without_autocast
from .matcher import HungarianMatcher
from .targets import Objects

# torchvision's own of 1e-7 counts: in fractions, it is a thousandth of the area of a box of 8 x 8 in 800 x 800 pixels.
_EPS = 1e-16


class SetCriterion(nn.Module):
    """Focal loss of the classes, L1 distance and generalised IoU of the boxes, divided by the number of objects.

    That number is the average of all ranks, and at least 1. Each stage is matched for itself. Everything is computed in
    float32 or wider.

    Args:
        class_weight, box_weight, giou_weight: of the three losses, and of the matcher's costs.
        alpha, gamma: of the focal loss.

    Attributes:
        weights: of the losses, by the names that :meth:`forward` returns for the last stage.
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
        self.matcher = HungarianMatcher(class_weight, box_weight, giou_weight, alpha, gamma)
        self.alpha = alpha
        self.gamma = gamma
        self.weights = {"loss_ce": class_weight, "loss_bbox": box_weight, "loss_giou": giou_weight}

    def forward(self, outputs: Mapping[str, Any], objects: Sequence[Objects]) -> dict[str, Tensor]:
        """The losses, weighted.

        Args:
            outputs: ``pred_logits`` (B, Q, K), ``pred_boxes`` (B, Q, 4), and ``aux_outputs``, a list of such mappings.
            objects: B of them, on the device of the predictions.

        Returns:
            Scalars ``loss_ce``, ``loss_bbox`` and ``loss_giou`` of the predictions, and those of ``aux_outputs[i]``
            under the same names followed by ``_i``.
        """
        stages = [*outputs.get("aux_outputs", ()), outputs]
        with without_autocast(outputs["pred_logits"]):
            logits, boxes = (
                at_least_float32(torch.stack([s[k] for s in stages])) for k in ("pred_logits", "pred_boxes")
            )
            losses = self._losses(logits, boxes, objects)
        named = {}
        for name, values in losses.items():
            *auxiliary, last = (self.weights[name] * values).unbind()
            named[name] = last
            named |= {f"{name}_{number}": value for number, value in enumerate(auxiliary)}
        return named

    def _losses(self, logits: Tensor, boxes: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        """Each (S,), not weighted, of logits (S, B, Q, K) and boxes (S, B, Q, 4)."""
        pairs = self.matcher(logits, boxes, objects)
        image = torch.cat([torch.full(p.shape[-1:], number) for number, p in enumerate(pairs)]).to(logits.device)
        query, own = torch.cat(pairs, dim=-1).to(logits.device).unbind(1)  # each (S, T)
        first = torch.tensor([0, *(len(x.labels) for x in objects[:-1])], device=logits.device).cumsum(0)
        own = own + first[image]  # among the objects of all images
        stage = torch.arange(len(logits), device=logits.device)[:, None]

        classes = torch.zeros_like(logits)
        classes[stage, image, query, torch.cat([x.labels for x in objects])[own]] = 1
        matched = boxes[stage, image, query]  # (S, T, 4)
        wanted = torch.cat([x.boxes for x in objects]).to(boxes.dtype)[own]
        corners, wanted_corners = (box_convert(x, "cxcywh", "xyxy") for x in (matched, wanted))
        losses = {
            "loss_ce": sigmoid_focal_loss(logits, classes, self.alpha, self.gamma).flatten(1).sum(1),
            "loss_bbox": (matched - wanted).abs().flatten(1).sum(1),
            "loss_giou": generalized_box_iou_loss(corners, wanted_corners, eps=_EPS).sum(1),
        }
        number = average_number(objects, logits.device)
        return {name: values / number for name, values in losses.items()}


def average_number(objects: Sequence[Objects], device: torch.device) -> Tensor:
    """Of objects in a batch, over all ranks, each of which has to call; at least 1. A scalar in float32."""
    number = torch.tensor(float(sum(len(x.labels) for x in objects)), device=device)
    if is_distributed():
        dist.all_reduce(number)
        number = number / dist.get_world_size()
    return number.clamp(min=1)
