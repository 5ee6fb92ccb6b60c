"""Data sets, transforms, samplers and collate functions, registered with torchdistill."""

# torchdistill's registry takes torchvision's data sets from sys.modules, where they must be by then.
import torchvision.datasets  # noqa: F401

from .augmentation import RandomGaussianBlur
from .coco import CocoDetection, coco_collate_fn
from .detection_transforms import RandomSizeCrop, ResizeShortSide
from .digits import Digits
from .fashion_mnist import FashionMNIST
from .fast_compose import FastCompose
from .image_folder import ImageFolder
from .mixing import MixingCollator
from .repeated_augment import RepeatedAugmentSampler

__all__ = [
    "CocoDetection",
    "Digits",
    "FashionMNIST",
    "FastCompose",
    "ImageFolder",
    "MixingCollator",
    "RandomGaussianBlur",
    "RandomSizeCrop",
    "RepeatedAugmentSampler",
    "ResizeShortSide",
    "coco_collate_fn",
]
