"""The training augmentation of DeiT III without its random erasing, as far as torchvision does not have it.

H. Touvron, M. Cord, H. Jégou, DeiT III: Revenge of the ViT, ECCV 2022.

ImageNet in YAML, for training::

    transforms:
      - !import_call
        key: 'torchvision.transforms.RandomResizedCrop'
        init: {kwargs: {size: 224, scale: [0.08, 1.0], ratio: [0.75, 1.3333333333333333], interpolation: 3}}  # bicubic
      - !import_call {key: 'torchvision.transforms.RandomHorizontalFlip', init: {kwargs: {p: 0.5}}}
      - !import_call
        key: 'torchvision.transforms.RandomChoice'              # exactly one of three, each with probability 1/3
        init:
          kwargs:
            transforms:
              - !import_call {key: 'torchvision.transforms.Grayscale', init: {kwargs: {num_output_channels: 3}}}
              - !import_call {key: 'torchvision.transforms.RandomSolarize', init: {kwargs: {threshold: 128, p: 1.0}}}
              - !import_call
                key: 'vkd_plugin.datasets.RandomGaussianBlur'
                init: {kwargs: {min_radius: 0.1, max_radius: 2.0}}
      - !import_call
        key: 'torchvision.transforms.ColorJitter'
        init: {kwargs: {brightness: 0.3, contrast: 0.3, saturation: 0.3}}
      - &to_tensor !import_call {key: 'torchvision.transforms.ToTensor', init: }
      - &normalize !import_call
        key: 'torchvision.transforms.Normalize'
        init: {kwargs: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}

and for evaluation::

    transforms:
      - !import_call {key: 'torchvision.transforms.Resize', init: {kwargs: {size: 256, interpolation: 3}}}
      - !import_call {key: 'torchvision.transforms.CenterCrop', init: {kwargs: {size: 224}}}
      - *to_tensor
      - *normalize

All of them draw from the global generators, which the engine addresses.
"""

import random

from PIL import Image, ImageFilter
from torchdistill.datasets.registry import register_transform

from ..arguments import number


@register_transform
class RandomGaussianBlur:
    """Blurs each image, with a radius drawn uniformly from a range.

    Pillow's filter, a fast approximation of a Gaussian whose standard deviation is the radius.
    ``torchvision.transforms.GaussianBlur`` is another: it cuts the Gaussian off at a fixed kernel size.

    It draws from python's global generator.

    Args:
        min_radius, max_radius: pixels.

    Raises:
        ValueError: a radius that is negative, or the smaller above the larger.
    """

    def __init__(self, min_radius: float = 0.1, max_radius: float = 2.0) -> None:
        self.min_radius = number("min_radius", min_radius)
        self.max_radius = number("max_radius", max_radius, at_least=self.min_radius)

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.radius()))

    def radius(self) -> float:
        """Draws one."""
        return random.uniform(self.min_radius, self.max_radius)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(min_radius={self.min_radius}, max_radius={self.max_radius})"
