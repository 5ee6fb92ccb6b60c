"""ViDT, the detectors of the paper's COCO experiments (Song et al., arXiv 2110.03921)."""

from .deformable_attention import KERNELS, deformable_attention
from .detector import ViDT
from .variants import vidt_swin_base, vidt_swin_nano, vidt_swin_small, vidt_swin_tiny

__all__ = [
    "KERNELS",
    "ViDT",
    "deformable_attention",
    "vidt_swin_base",
    "vidt_swin_nano",
    "vidt_swin_small",
    "vidt_swin_tiny",
]
