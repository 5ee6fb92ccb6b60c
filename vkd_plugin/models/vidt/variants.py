"""ViDT by its sizes, registered with torchdistill."""

from typing import Any

from torchdistill.models.registry import register_model

from ..weights import with_weights
from .backbone_weights import start_from
from .detector import ViDT
from .swin import SwinWithDetTokens


def _vidt(
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    drop_path_rate: float,
    num_classes: int = 91,
    num_queries: int = 100,
    hidden_dim: int = 256,
    decoder_layers: int = 6,
    feedforward_dim: int = 1024,
    dropout: float = 0.1,
    attention_kernel: str = "grid_sample",
    checkpoint: str | None = None,
    backbone_checkpoint: str | None = None,
) -> ViDT:
    """A ViDT; for the arguments see :func:`vidt_swin_nano`."""
    backbone = SwinWithDetTokens(
        embed_dim,
        depths,
        num_heads,
        drop_path_rate=drop_path_rate,
        num_det_tokens=num_queries,
        pos_dim=hidden_dim,
    )
    if backbone_checkpoint is not None:
        start_from(backbone, backbone_checkpoint)
    model = ViDT(
        backbone,
        num_classes=num_classes,
        hidden_dim=hidden_dim,
        decoder_layers=decoder_layers,
        feedforward_dim=feedforward_dim,
        dropout=dropout,
        attention_kernel=attention_kernel,
    )
    return with_weights(model, checkpoint)


@register_model
def vidt_swin_nano(drop_path_rate: float = 0.0, **kwargs: Any) -> ViDT:
    """ViDT with a Swin-nano body, the paper's smaller student: 15.7 million parameters.

    Args:
        drop_path_rate: stochastic depth of the body.
        num_classes: 91 for COCO's category ids.
        num_queries: detection tokens; at most so many objects are found in an image.
        hidden_dim: channels of the neck, a multiple of 32.
        decoder_layers: of the neck.
        feedforward_dim: of the neck's perceptrons.
        dropout: of the neck.
        attention_kernel: the implementation of deformable attention; ``grid_sample`` is PyTorch's.
        checkpoint: a local file of weights, of all of it.
        backbone_checkpoint: a local file of a Swin classifier's weights to begin from, in Microsoft's layout or timm's.
    """
    return _vidt(48, (2, 2, 6, 2), (3, 6, 12, 24), drop_path_rate, **kwargs)


@register_model
def vidt_swin_tiny(drop_path_rate: float = 0.2, **kwargs: Any) -> ViDT:
    """ViDT with a Swin-tiny body, the paper's larger student: 38.0 million parameters.

    Args:
        drop_path_rate: stochastic depth of the body.
        kwargs: as for :func:`vidt_swin_nano`.
    """
    return _vidt(96, (2, 2, 6, 2), (3, 6, 12, 24), drop_path_rate, **kwargs)


@register_model
def vidt_swin_small(drop_path_rate: float = 0.3, **kwargs: Any) -> ViDT:
    """ViDT with a Swin-small body: 60.5 million parameters.

    Args:
        drop_path_rate: stochastic depth of the body.
        kwargs: as for :func:`vidt_swin_nano`.
    """
    return _vidt(96, (2, 2, 18, 2), (3, 6, 12, 24), drop_path_rate, **kwargs)


@register_model
def vidt_swin_base(drop_path_rate: float = 0.3, **kwargs: Any) -> ViDT:
    """ViDT with a Swin-base body, the paper's teacher: 100.0 million parameters.

    Args:
        drop_path_rate: stochastic depth of the body.
        kwargs: as for :func:`vidt_swin_nano`.
    """
    return _vidt(128, (2, 2, 18, 2), (4, 8, 16, 32), drop_path_rate, **kwargs)
