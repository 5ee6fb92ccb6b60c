"""Data sets, transforms, samplers and collate functions, registered with torchdistill."""

# torchdistill's registry takes torchvision's data sets from sys.modules, where they must be by then.
import torchvision.datasets  # noqa: F401

from .augmentation import RandomGaussianBlur
from .digits import Digits
from .image_folder import ImageFolder
from .mixing import MixingCollator
from .repeated_augment import RepeatedAugmentSampler

__all__ = ["Digits", "ImageFolder", "MixingCollator", "RandomGaussianBlur", "RepeatedAugmentSampler"]
