"""Models, registered with torchdistill (the DeiT students with timm too)."""

from .deit import (
    deit_base_distilled_conv_patch16_224,
    deit_small_distilled_conv_patch16_224,
    deit_tiny_distilled_conv_patch16_224,
)
from .fpn_detectors import fasterrcnn_resnet18_fpn, retinanet_resnet18_fpn
from .small import digits_cnn, digits_vit, fashion_cnn, fashion_vit
from .small_detector import shapes_fcos
from .timm_bridge import timm_model
from .vidt import vidt_swin_base, vidt_swin_nano, vidt_swin_small, vidt_swin_tiny
from .weights import fit_weights, load_weights

__all__ = [
    "deit_base_distilled_conv_patch16_224",
    "deit_small_distilled_conv_patch16_224",
    "deit_tiny_distilled_conv_patch16_224",
    "digits_cnn",
    "digits_vit",
    "fashion_cnn",
    "fashion_vit",
    "fasterrcnn_resnet18_fpn",
    "fit_weights",
    "load_weights",
    "retinanet_resnet18_fpn",
    "shapes_fcos",
    "timm_model",
    "vidt_swin_base",
    "vidt_swin_nano",
    "vidt_swin_small",
    "vidt_swin_tiny",
]
