"""A ViDT that is small enough for every test, and what it is given."""

from typing import Any

import torch
from torch import Tensor

from vkd_plugin.models.vidt.detector import ViDT
from vkd_plugin.models.vidt.swin import SwinWithDetTokens

QUERIES, CLASSES, STAGES = 6, 5, 3


def small_body(**kwargs: Any) -> SwinWithDetTokens:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "pos_dim": 64}
    return SwinWithDetTokens(**{**sizes, "num_det_tokens": QUERIES, **kwargs})


def small_vidt(body: SwinWithDetTokens | None = None, seed: int = 0, **kwargs: Any) -> ViDT:
    """Two decoder layers; the boxes of the queries differ, as after some training."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_classes": CLASSES, "hidden_dim": 64, "decoder_layers": STAGES - 1, "dropout": 0.0}
    model = ViDT(body or small_body(), **{**sizes, "num_heads": 4, "feedforward_dim": 96, **kwargs})
    with torch.no_grad():
        model.backbone.det_pos_embed.normal_()
        for head in model.bbox_embed:
            head.layers[-1].weight.normal_(std=0.1)
    return model


def random_images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def target(boxes: list[list[float]], labels: list[int], **more: Any) -> dict[str, Any]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **more,
    }
