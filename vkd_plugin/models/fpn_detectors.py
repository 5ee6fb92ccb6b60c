"""torchvision's detectors with smaller bodies than torchvision builds them with, registered with torchdistill."""

from typing import Any

from torch import nn
from torchdistill.models.registry import register_model
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..arguments import one_of
from .weights import with_weights


@register_model
def fasterrcnn_resnet18_fpn(
    num_classes: int = 91,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int = 3,
    checkpoint: str | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """torchvision's Faster R-CNN (Ren et al., arXiv 1506.01497) with a ResNet-18 and a feature pyramid: 28 million
    parameters at COCO's 91 classes.

    Modules to hook are those of torchvision's ``fasterrcnn_resnet50_fpn``: ``backbone.fpn`` puts out a mapping ``'0'``
    to ``'3'`` and ``'pool'``, each (B, 256, H_i, W_i), at a quarter of the resolution, an eighth, and so on.

    Args:
        num_classes: the background included.
        weights_backbone: name of ImageNet weights of ResNet-18 to download, such as ``'IMAGENET1K_V1'``.
        trainable_backbone_layers: of five, counted from the last; the others are frozen, and BatchNorm in all of them.
            Without weights to begin from, everything trains.
        checkpoint: a local file of weights, of all of it.
        kwargs: of torchvision's ``FasterRCNN``, such as ``min_size`` and ``max_size``, to which it resizes images.
    """
    backbone = _body("resnet18", weights_backbone, trainable_backbone_layers)
    return with_weights(FasterRCNN(backbone, num_classes, **kwargs), checkpoint)


@register_model
def retinanet_resnet18_fpn(
    num_classes: int = 91,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int = 3,
    checkpoint: str | None = None,
    **kwargs: Any,
) -> RetinaNet:
    """torchvision's RetinaNet (Lin et al., arXiv 1708.02002) with a ResNet-18 and a feature pyramid: 21 million
    parameters at COCO's 91 classes.

    Modules to hook are those of torchvision's ``retinanet_resnet50_fpn``: ``backbone.fpn`` puts out a mapping ``'0'``,
    ``'1'``, ``'2'``, ``'p6'`` and ``'p7'``, each (B, 256, H_i, W_i), at an eighth of the resolution, a 16th, and so on.

    Args:
        num_classes: the background included.
        weights_backbone: name of ImageNet weights of ResNet-18 to download, such as ``'IMAGENET1K_V1'``.
        trainable_backbone_layers: of five, counted from the last; the others are frozen, and BatchNorm in all of them.
            Without weights to begin from, everything trains.
        checkpoint: a local file of weights, of all of it.
        kwargs: of torchvision's ``RetinaNet``, such as ``min_size`` and ``max_size``, to which it resizes images.
    """
    backbone = _body(
        "resnet18",
        weights_backbone,
        trainable_backbone_layers,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return with_weights(RetinaNet(backbone, num_classes, **kwargs), checkpoint)


def _body(name: str, weights: str | None, trainable_layers: int, **kwargs: Any) -> BackboneWithFPN:
    """As in torchvision's builders, a body without weights trains in all layers, BatchNorm included."""
    if weights is None:
        return resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **kwargs
        )
    published = get_model_weights(name)
    chosen = published[one_of("weights_backbone", weights, published.__members__)]
    return resnet_fpn_backbone(backbone_name=name, weights=chosen, trainable_layers=trainable_layers, **kwargs)
