"""A detector of a size for canvases of 64 pixels (``vkd_plugin.datasets.coco_shapes``): minutes on a CPU."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchdistill.models.registry import register_model
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .weights import with_weights

_STRIDES = (4, 8, 16, 32)


class _Body(nn.Module):
    """A residual network of three stages and a feature pyramid over them; torchvision's detectors ask ``out_channels``.

    Images (B, 3, H, W) to ``'0'``, ``'1'``, ``'2'`` and ``'pool'``, each (B, channels, H / stride, W / stride).
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stages = nn.ModuleList(_stage(max(width * i // 2, width), width * i) for i in (1, 2, 4))
        self.fpn = FeaturePyramidNetwork([width, 2 * width, 4 * width], channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for number, stage in enumerate(self.stages):
            maps[str(number)] = x = stage(x)
        return self.fpn(maps)


def _stage(in_channels: int, out_channels: int) -> BasicBlock:
    """A residual block that halves height and width."""
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels)
    )
    return BasicBlock(in_channels, out_channels, stride=2, downsample=shortcut)


@register_model
def shapes_fcos(
    num_classes: int = 12,
    width: int = 16,
    channels: int = 64,
    num_convs: int = 2,
    image_size: int = 64,
    checkpoint: str | None = None,
    **kwargs: Any,
) -> FCOS:
    """torchvision's FCOS (Tian et al., arXiv 1904.01355) with a narrow body, for objects of 4 pixels and more.

    The module ``backbone.fpn`` puts out a mapping ``'0'``, ``'1'``, ``'2'`` and ``'pool'``, each (B, channels, H_i,
    W_i), at a quarter of the resolution, an eighth, and so on.

    Args:
        num_classes: labels lie below it.
        width: channels of the body's first stage; the last has four times as many.
        channels: of the pyramid, a multiple of 32.
        num_convs: of each of the head's two branches.
        image_size: long side to which images are resized.
        checkpoint: a local file of weights.
        kwargs: of torchvision's ``FCOS``.
    """
    # FCOS gives a level the objects that reach up to 8 anchors' sides from a location: with anchors of half a stride
    # 16 pixels on the first level, 32 on the second. So dense are locations there that each object has one inside.
    anchors = AnchorGenerator(tuple((stride // 2,) for stride in _STRIDES), ((1.0,),) * len(_STRIDES))
    head = FCOSHead(channels, anchors.num_anchors_per_location()[0], num_classes, num_convs)
    given: dict[str, Any] = {"score_thresh": 0.05, **kwargs}
    model = FCOS(
        _Body(width, channels),
        num_classes,
        min_size=image_size,
        max_size=image_size,
        anchor_generator=anchors,
        head=head,
        **given,
    )
    return with_weights(model, checkpoint)
