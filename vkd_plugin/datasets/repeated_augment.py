"""Repeated augmentation: several augmented versions of each image in one batch.

E. Hoffer et al., Augment Your Batch: Improving Generalization Through Instance Repetition, CVPR 2020.
H. Touvron et al., Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021.
"""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class RepeatedAugmentSampler(Sampler[int]):
    """Each image of a shuffled order several times in a row; an epoch has as many samples as without.

    In YAML::

        sampler:
          class_or_func: !import_get {key: 'vkd_plugin.datasets.RepeatedAugmentSampler'}
          kwargs: {repeats: 3}

    As DeiT has it: with three repeats an epoch shows a third of the images. It is the order of all processes
    together, which the engine deals out, so that versions of an image fall to different processes where there are
    several; each version has an augmentation of its own (:mod:`vkd_plugin.engine.randomness`).

    It draws from torch's global generator, which the engine addresses.

    Args:
        data_source: the data set.
        repeats: how often an image comes.
        round_to: the epoch's length is the number of images, rounded down to a multiple of this where there are as
            many. DeiT's is 256, whatever the batch size.

    Raises:
        ValueError: ``repeats`` or ``round_to`` below 1.
    """

    def __init__(self, data_source: Sized, repeats: int = 3, round_to: int = 256) -> None:
        if repeats < 1 or round_to < 1:
            raise ValueError(f"repeats and round_to must be at least 1, got {repeats} and {round_to}")
        self.data_source = data_source
        self.repeats = repeats
        self.round_to = round_to

    def __iter__(self) -> Iterator[int]:
        distinct = -(-len(self) // self.repeats)
        chosen = torch.randperm(len(self.data_source))[:distinct]
        return iter(chosen.repeat_interleave(self.repeats)[: len(self)].tolist())

    def __len__(self) -> int:
        images = len(self.data_source)
        return images // self.round_to * self.round_to or images
