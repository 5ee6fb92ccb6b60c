"""Models, registered with torchdistill."""

from .small import digits_cnn, digits_vit
from .timm_bridge import load_weights, timm_model

__all__ = ["digits_cnn", "digits_vit", "load_weights", "timm_model"]
