"""Mixup and CutMix while batches are collated, so that they work under torchdistill's own scripts as well.

H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
S. Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
ICCV 2019.
"""

from typing import Any

from timm.data.mixup import Mixup, mixup_target
from torch.utils.data import default_collate
from torchdistill.datasets.registry import register_collate_func

from ..arguments import number, one_of


class MixingCollator:
    """Collates a batch and mixes each image with its mirror in the batch, as timm does.

    In YAML::

        collate_fn: !import_call
          key: 'vkd_plugin.datasets.MixingCollator'
          init: {kwargs: {num_classes: 1000, mixup_alpha: 0.8, cutmix_alpha: 1.0, label_smoothing: 0.1}}

    Samples are ``(image, label)`` or ``(image, label, supplement)``, images float (C, H, W), labels ints.
    The batch is ``(images, targets)`` or ``(images, targets, supplements)``, targets float (N, num_classes)
    with rows that sum to one. Where N is odd, which timm refuses, the last image is left as it is.

    It draws from numpy's global generator, which the engine addresses.

    Args:
        num_classes: number of classes, K.
        mixup_alpha: of mixup's Beta distribution; 0 turns mixup off.
        cutmix_alpha: of CutMix's Beta distribution; 0 turns CutMix off.
        prob: probability of mixing a batch (or element) at all.
        switch_prob: probability of CutMix where both are on.
        mode: ``'batch'``, ``'pair'`` or ``'elem'``: what shares a draw.
        label_smoothing: share of each target that is spread over all classes.

    Raises:
        ValueError: an argument out of its range, or both alphas zero.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        label_smoothing: float = 0.1,
    ) -> None:
        number("mixup_alpha", mixup_alpha)
        number("cutmix_alpha", cutmix_alpha)
        number("label_smoothing", label_smoothing, below=1.0)
        if mixup_alpha == 0 and cutmix_alpha == 0:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: nothing would be mixed")
        self.mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            mode=one_of("mixing mode", mode, ("batch", "pair", "elem")),
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        # torchdistill looks collate functions up in its registry, with whatever stands in the YAML for a key:
        # being its own key, an object built in the YAML is found.
        register_collate_func(key=self)(self)

    def __call__(self, samples: list[Any]) -> tuple[Any, ...]:
        images, labels, *supplement = default_collate(samples)
        even = len(images) - len(images) % 2
        targets = mixup_target(labels, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        if even:
            images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return (images, targets, *supplement)
