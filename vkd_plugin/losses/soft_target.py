"""Losses on logits (N, K): cross-entropy with labels or mixed labels, and distillation from a teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import number
from ..numerics import at_least_float32, without_autocast


class SoftTargetCrossEntropy(nn.Module):
    """Cross-entropy with class indices or with probability rows, as mixup and cutmix make them.

    Mean over N of - sum_k t_k log softmax(z)_k, in float32 or wider with autocast off.

    .. code-block:: yaml

        criterion: {key: 'SoftTargetCrossEntropy', kwargs: {}}
        criterion_wrapper:
          key: 'SimpleLossWrapper'
          kwargs:
            input: {is_from_teacher: False, module_path: 'model.head', io: 'output'}
            target: {uses_label: True}
        weight: 1.0

    Args:
        label_smoothing: in [0, 1), mixed into class indices. Probability rows come smoothed from the mixing,
            so smoothing those as well is an error.

    Raises:
        ValueError: ``label_smoothing`` out of range.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar.

        Args:
            logits: (N, K).
            target: class indices (N,), integer, or probabilities (N, K), real.

        Raises:
            ValueError: the shapes or types do not fit.
        """
        indices = not target.is_floating_point()
        expected = logits.shape[:1] if indices else logits.shape
        if logits.dim() != 2 or target.shape != expected or target.is_complex():
            raise ValueError(
                f"SoftTargetCrossEntropy reads logits (N, K) and class indices (N,) or probabilities (N, K), "
                f"got logits {tuple(logits.shape)} and targets {tuple(target.shape)} of {target.dtype}"
            )
        if self.label_smoothing and not indices:
            raise ValueError(
                "targets are probabilities already: set label_smoothing where they are mixed, not in the loss"
            )
        with without_autocast(logits):
            logits = at_least_float32(logits)
            target = target.long() if indices else target.to(logits.dtype)
            return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}"


class SoftTargetKLLoss(nn.Module):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over N.

    Distillation of logits (Hinton, Vinyals, Dean, arXiv 1503.02531); the VkD paper's ImageNet code has T = 1.
    In float32 or wider with autocast off.

    .. code-block:: yaml

        criterion: {key: 'SoftTargetKLLoss', kwargs: {temperature: 1.0}}
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs: {student: {module: 'model.head_dist'}, teacher: {module: '.'}}
        weight: 1.0

    Args:
        temperature: T > 0.

    Raises:
        ValueError: ``temperature`` out of range.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature)
        if self.temperature < torch.finfo(torch.float32).tiny:
            raise ValueError(f"temperature must lie in (0, inf), got {temperature}")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar.

        Args:
            student: logits (N, K).
            teacher: logits (N, K); gets no gradient.

        Raises:
            ValueError: the shapes do not fit.
        """
        _check_logits("SoftTargetKLLoss", student, teacher)
        with without_autocast(student):
            log_student = F.log_softmax(at_least_float32(student) / self.temperature, dim=1)
            log_teacher = F.log_softmax(at_least_float32(teacher.detach()) / self.temperature, dim=1)
            divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            return self.temperature**2 * divergence

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class HardTeacherCrossEntropy(nn.Module):
    """Cross-entropy with the class that the teacher decides for, as DeiT is distilled (arXiv 2012.12877, equation 3).

    Mean over N of - log softmax(z)_k, k the teacher's argmax, in float32 or wider with autocast off. DeiT takes it with
    weight 0.5 on the distillation head, and the labels' cross-entropy with weight 0.5 on the class head.

    .. code-block:: yaml

        criterion: {key: 'HardTeacherCrossEntropy', kwargs: {}}
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs: {student: {module: 'head_dist'}, teacher: {module: '.'}}
        weight: 0.5
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar.

        Args:
            student: logits (N, K).
            teacher: logits (N, K); gets no gradient.

        Raises:
            ValueError: the shapes do not fit.
        """
        _check_logits("HardTeacherCrossEntropy", student, teacher)
        with without_autocast(student):
            return F.cross_entropy(at_least_float32(student), teacher.argmax(dim=1))


def _check_logits(loss: str, student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        raise ValueError(f"{loss} reads two sets of logits (N, K), got {shapes}")
