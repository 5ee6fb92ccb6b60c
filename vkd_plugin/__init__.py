"""VkD for torchdistill: orthogonal projections and task-specific normalisation as YAML-ready modules.

Importing the package registers everything with torchdistill; ``dependencies: ['vkd_plugin']`` in a YAML is enough.
"""

from .losses import (
    AttentionTransferLoss,
    FeaturePair,
    HardTeacherCrossEntropy,
    SoftTargetCrossEntropy,
    SoftTargetKLLoss,
    VkDLoss,
)
from .normalization import Normalization, normalize
from .projectors import LinearProjector, MLPProjector, OrthogonalProjector, ReleasedProjector
from .stiefel import orthogonalize
from .wrappers import ProjectedStudent

from . import registration  # isort: skip  # noqa: F401 - after what it registers

__version__ = "0.1.0"

__all__ = [
    "AttentionTransferLoss",
    "FeaturePair",
    "HardTeacherCrossEntropy",
    "LinearProjector",
    "MLPProjector",
    "Normalization",
    "OrthogonalProjector",
    "ProjectedStudent",
    "ReleasedProjector",
    "SoftTargetCrossEntropy",
    "SoftTargetKLLoss",
    "VkDLoss",
    "normalize",
    "orthogonalize",
]
