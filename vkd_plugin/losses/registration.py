"""Makes the losses known to torchdistill, under their class names, when imported.

Labels need no wrapper of ours: torchdistill's ``SimpleLossWrapper`` hands indices and probability rows on as
they are, and hooks name one head of a student with several (``model.head``, ``model.head_dist``).
"""

from torchdistill.losses.registry import register_loss_wrapper, register_low_level_loss, register_mid_level_loss

from .attention_transfer import AttentionTransferLoss
from .feature_pair import FeaturePair
from .soft_target import HardTeacherCrossEntropy, SoftTargetCrossEntropy, SoftTargetKLLoss
from .token_matching import TokenMatchingLoss
from .vkd import VkDLoss

for _loss in (VkDLoss, SoftTargetCrossEntropy, SoftTargetKLLoss, HardTeacherCrossEntropy, AttentionTransferLoss):
    register_low_level_loss(_loss)
register_loss_wrapper(FeaturePair)
register_mid_level_loss(TokenMatchingLoss)
