"""Data sets and collate functions, registered with torchdistill."""

# torchdistill's registry takes torchvision's data sets from sys.modules, where they must be by then.
import torchvision.datasets  # noqa: F401

from .digits import Digits
from .mixing import MixingCollator

__all__ = ["Digits", "MixingCollator"]
