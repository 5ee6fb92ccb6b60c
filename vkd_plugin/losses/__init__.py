"""Losses, plain tensors in, and the wrapper that reads those from hooked modules.

:mod:`vkd_plugin.losses.registration` makes them known to torchdistill under their class names.
"""

from .distances import DISTANCES
from .feature_pair import Feature, FeaturePair, NotHookedError
from .soft_target import HardTeacherCrossEntropy, SoftTargetCrossEntropy, SoftTargetKLLoss
from .vkd import VkDLoss

__all__ = [
    "DISTANCES", "Feature", "FeaturePair", "HardTeacherCrossEntropy", "NotHookedError", "SoftTargetCrossEntropy",
    "SoftTargetKLLoss", "VkDLoss",
]  # fmt: skip
