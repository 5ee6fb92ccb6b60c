"""Token matching (Song et al., ViDT, ICLR 2022, arXiv 2110.03921, section 3.3): distillation without a projector."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import number
from ..numerics import at_least_float32, without_autocast
from ..suggest import nearest
from .feature_pair import Feature, IODict
from .vkd import check_rows

_KEYS = ("student", "teacher", "weight")


class TokenMatchingLoss(nn.Module):
    r"""The root of a weighted sum of mean Euclidean distances between student's and teacher's tokens.

    .. math:: L = \sqrt{\textstyle\sum_i \frac{w_i}{N_i} \sum_n \lVert z^s_{i,n} - \mathrm{sg}(z^t_{i,n}) \rVert_2}

    with N_i tokens in the pair i. So ViDT's code computes it (github.com/naver-ai/vidt, of which the weights are 1, and
    the number of stages for the decoder's tokens); the paper's formula has neither the root nor these weights.
    torchdistill calls it with all that is hooked, so it takes no ``criterion_wrapper``.

    .. code-block:: yaml

        criterion:
          key: 'TokenMatchingLoss'
          kwargs:
            pairs:
              patch0:
                student: {module: 'patch_tokens.0', readout: 'every_location'}
                teacher: {module: 'patch_tokens.0', readout: 'every_location'}
              body:
                student: {module: 'body_tokens', readout: 'every_token', num_prefix_tokens: 0}
                teacher: {module: 'body_tokens', readout: 'every_token', num_prefix_tokens: 0}
        weight: 4.0

    Args:
        pairs: name -> ``{student, teacher, weight}``; the first two as in
            :class:`~vkd_plugin.losses.feature_pair.FeaturePair`, and of the same shape; ``weight`` is 1 by default.

    Raises:
        TypeError: no pairs, or a key that is unknown or missing.
        ValueError: an unknown ``io`` or ``readout``, or a negative weight.
    """

    def __init__(self, pairs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not isinstance(pairs, Mapping) or not pairs:
            raise TypeError(f"pairs must be a mapping from names to pairs of features, got {pairs!r}")
        self.pairs: dict[str, tuple[Feature, Feature, float]] = {}
        for name, pair in pairs.items():
            if not isinstance(pair, Mapping) or not {"student", "teacher"} <= pair.keys():
                raise TypeError(f"pair '{name}' must be a mapping with 'student' and 'teacher', got {pair!r}")
            for key in pair:
                if key not in _KEYS:
                    raise TypeError(f"pair '{name}' has no key '{key}'{nearest(key, _KEYS)}")
            student, teacher = (Feature.from_config(side, pair[side]) for side in ("student", "teacher"))
            self.pairs[name] = student, teacher, number(f"weight of pair '{name}'", pair.get("weight", 1.0))

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, targets: object = None) -> Tensor:
        """A scalar in float32, or in float64 if a feature is; ``targets`` are not read.

        Raises:
            NotHookedError: nothing was hooked where a feature is to be read.
            ValueError: features that are no rows, or of different shapes.
        """
        distances = [
            weight * mean_distance(student.read(student_io_dict), teacher.read(teacher_io_dict))
            for student, teacher, weight in self.pairs.values()
        ]
        total = torch.stack(distances).sum()
        # Without any difference the root has no gradient.
        return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def extra_repr(self) -> str:
        return "\n".join(f"{name}: {weight:g}" for name, (_, _, weight) in self.pairs.items())


def mean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over rows of the Euclidean distance between student and teacher, both (N, C); a scalar."""
    check_rows(student, teacher)
    with without_autocast(student):
        return torch.linalg.vector_norm(at_least_float32(student) - at_least_float32(teacher.detach()), dim=1).mean()
