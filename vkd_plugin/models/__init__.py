"""Models, registered with torchdistill."""

from .small import digits_cnn, digits_vit
from .timm_bridge import timm_model
from .weights import fit_weights, load_weights

__all__ = ["digits_cnn", "digits_vit", "fit_weights", "load_weights", "timm_model"]
