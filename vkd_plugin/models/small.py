"""Teachers and students of a size for 8 x 8 digits and for Fashion-MNIST: minutes on a CPU, yet the paper's shapes.

The teachers are convolutional, the students vision transformers without any convolution beyond their patches, so
there is an inductive bias to hand over.
"""

from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from .weights import with_weights

WeightInit = Literal["", "jax", "jax_nlhb", "moco"]
"""timm's ways to draw a vision transformer's first weights."""


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DigitsCNN(nn.Module):
    """Four 3 x 3 convolutions with one halving; see :func:`digits_cnn`.

    Images (B, in_chans, H, W) to logits (B, num_classes). The module ``final_conv`` puts out the last feature
    map, (B, 4 * width, H / 2, W / 2), after its ReLU.
    """

    def __init__(self, num_classes: int, width: int, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_chans, width), _conv(width, 2 * width))
        self.pool = nn.MaxPool2d(2)
        self.middle = _conv(2 * width, 2 * width)
        self.final_conv = _conv(2 * width, 4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.pool(self.stem(x)))
        return self.head(self.final_conv(x).mean(dim=(2, 3)))


@register_model
def digits_cnn(num_classes: int = 10, width: int = 32, in_chans: int = 1, checkpoint: str | None = None) -> DigitsCNN:
    """A convolutional teacher: at the default width 131 thousand parameters, ``final_conv`` (B, 128, 4, 4).

    Args:
        num_classes: size of the output.
        width: channels of the first convolution; the last has four times as many.
        in_chans: channels of the images.
        checkpoint: a local file of weights.
    """
    return with_weights(DigitsCNN(num_classes, width, in_chans), checkpoint)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.conv1(x)))).relu()


class FashionCNN(nn.Module):
    """A residual network of seven 3 x 3 convolutions with two halvings; see :func:`fashion_cnn`.

    Images (B, in_chans, H, W) to logits (B, num_classes). The module ``final_conv`` puts out the last feature
    map, (B, 4 * width, H / 4, W / 4), after its ReLU; ``global_pool`` its mean over all locations, (B, 4 * width).
    """

    def __init__(self, num_classes: int, width: int, in_chans: int) -> None:
        super().__init__()
        self.stem = _conv(in_chans, width)
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Sequential(
            _conv(width, 2 * width), _Residual(2 * width), _conv(2 * width, 4 * width, stride=2)
        )
        self.final_conv = _Residual(4 * width)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.pool(self.stem(x)))
        return self.head(self.global_pool(self.final_conv(x)))


@register_model
def fashion_cnn(num_classes: int = 10, width: int = 32, in_chans: int = 1, checkpoint: str | None = None) -> FashionCNN:
    """A convolutional teacher: at the default width 464 thousand parameters, ``final_conv`` (B, 128, 7, 7).

    Args:
        num_classes: size of the output.
        width: channels of the first convolution; the last has four times as many.
        in_chans: channels of the images.
        checkpoint: a local file of weights.
    """
    return with_weights(FashionCNN(num_classes, width, in_chans), checkpoint)


@register_model
def digits_vit(
    num_classes: int = 10,
    embed_dim: int = 48,
    depth: int = 4,
    num_heads: int = 3,
    img_size: int = 8,
    patch_size: int = 2,
    in_chans: int = 1,
    drop_path_rate: float = 0.0,
    weight_init: WeightInit = "",
) -> VisionTransformer:
    """timm's VisionTransformer for 8 x 8 images: a class token, 16 patches; 115 thousand parameters.

    Its module ``norm`` puts out the tokens, (B, 17, embed_dim), the class token first; ``head`` the logits
    (B, num_classes).

    Args:
        num_classes: size of the output.
        embed_dim, depth, num_heads, img_size, patch_size, in_chans, drop_path_rate, weight_init: as in timm.
    """
    return VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        weight_init=weight_init,
    )


@register_model
def fashion_vit(
    img_size: int = 28, patch_size: int = 7, weight_init: WeightInit = "jax", **kwargs: Any
) -> VisionTransformer:
    """:func:`digits_vit` for 28 x 28 images: a class token, 16 patches; 117 thousand parameters.

    Args:
        img_size, patch_size: in pixels.
        weight_init: as in timm. Its default, a standard deviation of 0.02, is small for layers this narrow: students
            learn slowly from it.
        kwargs: as for :func:`digits_vit`.
    """
    return digits_vit(img_size=img_size, patch_size=patch_size, weight_init=weight_init, **kwargs)
