"""Losses, plain tensors in, and the wrapper that reads those from hooked modules.

:mod:`vkd_plugin.losses.registration` makes them known to torchdistill under their class names.
"""

from .attention_transfer import AttentionTransferLoss
from .distances import DISTANCES
from .feature_pair import Feature, FeaturePair, NotHookedError, unmasked
from .soft_target import HardTeacherCrossEntropy, SoftTargetCrossEntropy, SoftTargetKLLoss
from .token_matching import TokenMatchingLoss
from .vkd import VkDLoss

__all__ = [
    "DISTANCES", "AttentionTransferLoss", "Feature", "FeaturePair", "HardTeacherCrossEntropy", "NotHookedError",
    "SoftTargetCrossEntropy", "SoftTargetKLLoss", "TokenMatchingLoss", "VkDLoss", "unmasked",
]  # fmt: skip
