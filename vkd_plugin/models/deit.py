"""DeiT students with a convolutional stem, as the VkD paper distils them on ImageNet.

Three things differ from timm's ``deit_*_distilled_patch16_224``: the stem, the "distillation token", which is not
learned but the mean of the stem's output, and that training puts out both heads. Names and shapes of the weights
are those of the reference code's releases.

Legend: B images of H x W pixels, N = H * W / 256 patches, C = embed_dim, K classes.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn, init_weights_vit_timm
from torch import Tensor, nn
from torchdistill.models.registry import register_model as register_with_torchdistill

_PATCH = 16
_STEM_WIDTH = 64


class ConvStem(PatchEmbed):
    """Three convolutions at half the resolution, then 8 x 8 patches of what they put out: 16 x 16 pixels a token.

    Images (B, in_chans, H, W) to tokens (B, N, C).

    Args:
        img_size: H and W, multiples of 16; one number if they are the same.
        in_chans: channels of the images.
        embed_dim: C.
        device, dtype: of the parameters.
        kwargs: what timm gives its patch embeddings besides.

    Raises:
        ValueError: another ``img_size``.
    """

    proj: nn.Conv2d

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 768,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        _check_size(img_size)
        super().__init__(img_size, in_chans=_STEM_WIDTH, embed_dim=embed_dim, device=device, dtype=dtype, **kwargs)
        del self.proj  # of the image itself
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((in_chans, 7, 2), (_STEM_WIDTH, 3, 1), (_STEM_WIDTH, 3, 1)):
            layers += [
                nn.Conv2d(channels, _STEM_WIDTH, kernel, stride, padding=kernel // 2, bias=False, **place),
                nn.BatchNorm2d(_STEM_WIDTH, **place),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(_STEM_WIDTH, embed_dim, _PATCH // 2, stride=_PATCH // 2, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's normal distribution for the convolutions; BatchNorm and the bias are as torch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Takes images of another size from now on.

        Raises:
            ValueError: a size that is no multiple of 16, or another size of patches.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"the patches of a convolutional stem are {_PATCH} x {_PATCH} pixels, not {patch_size}")
        if img_size is not None:
            _check_size(img_size)
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images to tokens.

        Raises:
            ValueError: images of another size than the model is for.
        """
        if x.shape[-2:] != self.img_size:
            sizes = [" x ".join(map(str, size)) for size in (x.shape[-2:], self.img_size)]
            raise ValueError(f"images of {sizes[0]} pixels, and the model is for {sizes[1]}: set its img_size")
        return self.proj(self.conv(x)).flatten(2).transpose(1, 2)


def _check_size(img_size: int | tuple[int, int]) -> None:
    if any(side < _PATCH or side % _PATCH for side in to_2tuple(img_size)):
        raise ValueError(f"img_size should be a multiple of {_PATCH}, got {img_size}")


class ConvStemDeiT(VisionTransformer):
    """timm's VisionTransformer with that stem, two heads, and a token for each.

    Images (B, in_chans, H, W) to logits (B, K): in evaluation the mean of both heads; in training the pair of them,
    the class token's first. Modules to hook: ``head`` and ``head_dist`` (B, K), ``norm`` (B, 2 + N, C), the tokens
    in the order class, distillation, patches.

    Args:
        img_size: H and W, multiples of 16; one number if they are the same. The table of positions is of that size.
        in_chans: channels of the images.
        num_classes: K; 0 leaves both heads out.
        embed_dim: C.
        depth: number of blocks.
        num_heads: of the attention.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm.
        distilled_training: put the pair out in training; else the mean there too.
        device, dtype: of the parameters.

    Raises:
        ValueError: another ``img_size``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled_training: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=_PATCH,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=ConvStem,
            device=device,
            dtype=dtype,
        )
        self.conv_embed = self._modules.pop("patch_embed")  # where the reference's weights have it
        self.num_prefix_tokens = 2
        self.distilled_training = distilled_training
        positions = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim, device=device, dtype=dtype))
        trunc_normal_(self.pos_embed, std=0.02)
        self.head_dist = self._new_head(num_classes)
        init_weights_vit_timm(self.head_dist)

    @property
    def patch_embed(self) -> Any:
        """The stem, under the name by which timm's methods look for it."""
        return self.conv_embed

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (B, N, C) to all tokens (B, 2 + N, C) with their positions; timm puts the class token in front."""
        return super()._pos_embed(torch.cat([x.mean(dim=1, keepdim=True), x], dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, 2 + N, C) to logits, see the class; with ``pre_logits`` the mean (B, C) of the two tokens."""
        class_token, distillation_token = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (class_token + distillation_token) / 2
        logits = self.head(class_token), self.head_dist(distillation_token)
        if self.training and self.distilled_training:
            return logits
        return (logits[0] + logits[1]) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training puts out both heads; else their mean."""
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Both heads."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, for other classes.

        Raises:
            ValueError: any ``global_pool`` but the two tokens.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"both heads read their own token, so global_pool is 'token', not '{global_pool}'")
        self.num_classes = num_classes
        self.head, self.head_dist = self._new_head(num_classes), self._new_head(num_classes)

    def _new_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        place: Any = self.cls_token
        return nn.Linear(self.embed_dim, num_classes, device=place.device, dtype=place.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that weight decay leaves alone."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter names, from the stem to the head."""
        return {
            "stem": r"^cls_token|pos_embed|conv_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv_embed.conv.0",
    "classifier": ("head", "head_dist"),
}
default_cfgs = generate_default_cfgs(
    {f"deit_{size}_distilled_conv_patch16_224": _CFG for size in ("tiny", "small", "base")}
)
"""Where timm looks for what its models expect."""


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ConvStemDeiT:
    features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        ConvStemDeiT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **kwargs
    )


@register_with_torchdistill
@register_with_timm
def deit_tiny_distilled_conv_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConvStemDeiT:
    """DeiT-Ti with a convolutional stem, the VkD paper's smaller student: 6.6 million parameters.

    Args:
        pretrained: timm's switch; there are no published weights under this name.
        kwargs: of :class:`ConvStemDeiT`.
    """
    return _create("deit_tiny_distilled_conv_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_with_torchdistill
@register_with_timm
def deit_small_distilled_conv_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConvStemDeiT:
    """DeiT-S with a convolutional stem, the VkD paper's larger student: 23.8 million parameters.

    Args:
        pretrained: timm's switch; there are no published weights under this name.
        kwargs: of :class:`ConvStemDeiT`.
    """
    return _create("deit_small_distilled_conv_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_with_torchdistill
@register_with_timm
def deit_base_distilled_conv_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConvStemDeiT:
    """DeiT-B with a convolutional stem: 90.0 million parameters.

    Args:
        pretrained: timm's switch; there are no published weights under this name.
        kwargs: of :class:`ConvStemDeiT`.
    """
    return _create("deit_base_distilled_conv_patch16_224", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
