"""ViDT (Song et al., arXiv 2110.03921): a Swin transformer that detects, and a decoder that refines.

Legend: B images, Q queries, K classes, C channels of the neck, S = decoder layers + 1 stages of predictions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .criterion import SetCriterion
from .decoder import DeformableTransformer
from .padding import pad_images, resize_mask
from .postprocess import detections
from .precision import full_precision
from .swin import SwinWithDetTokens
from .targets import objects_of

_PRIOR = math.log(0.01 / 0.99)  # every class begins with a probability of 0.01


class ViDT(nn.Module):
    """Detections of images; in training losses, torchvision's convention.

    Images are normalised and of the size that they are to be seen in, and may differ in size: what resizes them is the
    data's pipeline. Modules to hook, the features that are distilled:

    ====================  ====================  ===============================================================
    ``patch_tokens.i``    (B, C, H_i, W_i)      i = 0 ... 3: patches at an eighth of the resolution, a 16th, a
                                                32nd, a 64th, after ``input_proj`` (with its GroupNorm)
    ``body_tokens``       (B, Q, C)             detection tokens of the body, after ``tgt_proj``
    ``neck_tokens``       (B, S * Q, C)         those of every stage, stage after stage: the body's again, then
                                                the states after each decoder layer
    ``patch_masks.i``     (B, H_i, W_i) bool    True where ``patch_tokens.i`` is padding
    ====================  ====================  ===============================================================

    Args:
        backbone: the body.
        num_classes: K. COCO's category ids reach 90, so 91.
        hidden_dim: C, a multiple of 32.
        decoder_layers: S - 1.
        num_heads: of the decoder.
        feedforward_dim: of the decoder's perceptrons.
        dropout: of the decoder.
        attention_kernel: a name in :data:`vkd_plugin.models.vidt.deformable_attention.KERNELS`.

    Attributes:
        criterion: gives the losses.
    """

    def __init__(
        self,
        backbone: SwinWithDetTokens,
        num_classes: int = 91,
        hidden_dim: int = 256,
        decoder_layers: int = 6,
        num_heads: int = 8,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        attention_kernel: str = "grid_sample",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        levels = len(backbone.out_dims)
        self.transformer = DeformableTransformer(
            hidden_dim,
            decoder_layers,
            num_levels=levels,
            num_heads=num_heads,
            hidden_dim=feedforward_dim,
            dropout=dropout,
            num_points=4,
            kernel=attention_kernel,
        )
        self.class_embed = nn.ModuleList(_class_head(hidden_dim, num_classes) for _ in range(decoder_layers + 1))
        self.bbox_embed = self.transformer.decoder.bbox_embed  # the release has them under both names
        self.backbone = backbone
        self.input_proj = nn.ModuleList(_projection(channels, hidden_dim) for channels in backbone.out_dims)
        self.tgt_proj = _projection(backbone.det_dim, hidden_dim)
        self.query_pos_proj = _projection(hidden_dim, hidden_dim)
        self.patch_tokens = nn.ModuleList(nn.Identity() for _ in range(levels))
        self.patch_masks = nn.ModuleList(nn.Identity() for _ in range(levels))
        self.body_tokens = nn.Identity()
        self.neck_tokens = nn.Identity()
        self.criterion = SetCriterion()

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """In training a dict of losses, see :class:`SetCriterion`; in evaluation the detections of each image.

        Args:
            images: each (3, H_i, W_i), or a batch (B, 3, H, W).
            targets: for training; see :func:`vkd_plugin.models.vidt.targets.objects_of`.

        Returns:
            Losses, already weighted, to be added up; or see :func:`vkd_plugin.models.vidt.postprocess.detections`,
            with boxes in pixels of the images as they were given.

        Raises:
            UserError: images or targets that are none, or training without targets.
        """
        outputs = self.raw_outputs(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        if not self.training:
            return detections(outputs, sizes)
        if targets is None:
            raise UserError("ViDT needs targets in training: model(images, targets)")
        return self.criterion(outputs, objects_of(targets, sizes, self.num_classes, outputs["pred_logits"].device))

    def raw_outputs(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]:
        """Predictions as the release has them.

        Args:
            images: as for :meth:`forward`.

        Returns:
            ``pred_logits`` (B, Q, K) and ``pred_boxes`` (B, Q, 4) of the last stage, centre x, centre y, width and
            height in fractions of each image without its padding; ``aux_outputs``, a list with such a dict for each
            earlier stage. All in float32 or wider.

        Raises:
            UserError: anything else than images.
        """
        batch, mask = pad_images(images)
        maps, det, det_pos = self.backbone(batch, mask)
        maps = [tap(proj(x)) for tap, proj, x in zip(self.patch_tokens, self.input_proj, maps, strict=True)]
        masks = [
            tap(resize_mask(mask, (x.shape[2], x.shape[3]))) for tap, x in zip(self.patch_masks, maps, strict=True)
        ]
        det = self.body_tokens(_projected(self.tgt_proj, det))
        states, boxes = self.transformer(maps, masks, det, _projected(self.query_pos_proj, det_pos))
        states = self.neck_tokens(torch.cat(states, dim=1)).chunk(len(states), dim=1)
        stages = [
            {"pred_logits": full_precision(head, state), "pred_boxes": box}
            for head, state, box in zip(self.class_embed, states, boxes, strict=True)
        ]
        return {**stages[-1], "aux_outputs": stages[:-1]}


def _class_head(dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, _PRIOR)
    return head


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, channels, 1)
    nn.init.xavier_uniform_(layer.weight)
    layer.bias = nn.Parameter(torch.zeros(channels))
    return nn.Sequential(layer, nn.GroupNorm(32, channels))


def _projected(projection: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, Q, any) through a projection of maps, to (B, Q, C); GroupNorm's statistics are over all of them."""
    return projection(tokens.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
