"""The feature loss of VkD (Miles, Elezi, Deng, CVPR 2024, arXiv 2403.06213)."""

from torch import Tensor, nn

from ..arguments import number, one_of
from ..normalization import Normalization
from ..numerics import at_least_float32, without_autocast
from .distances import DISTANCES


class VkDLoss(nn.Module):
    r"""d(P z_s, norm(z_t)): the projected student against the normalised teacher.

    .. math:: L = d(Z_s P^\top, \mathrm{norm}(\mathrm{sg}(Z_t)))

    with Z_s P' (N, C_t) as an orthogonal projector puts it out, Z_t (N, C_t), sg the stop-gradient and norm
    the task-specific normalisation. The defaults are those of the paper's ImageNet code: layer-normed
    teacher, student as it is, smooth-L1 averaged over all entries. Its detection code is ``normalization:
    'standardize'`` with ``normalize_student: True``.

    .. code-block:: yaml

        criterion:
          key: 'VkDLoss'
          kwargs:
            normalization: 'layer_norm'   # none, l2, layer_norm, standardize, whiten
            distance: 'smooth_l1'         # smooth_l1, mse, l1, cosine, log_sum
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs:
            student: {module: 'features.tokens'}
            teacher: {module: 'final_conv', readout: 'spatial_mean'}
        weight: 1.0

    Under torch.distributed every rank has to call it. With as many rows on every rank, the mean of the losses
    and the gradients that DistributedDataParallel averages are those of one process with all rows (not for
    ``log_sum``, which is no mean: there, the logarithms are averaged). With unequal numbers of rows the
    statistics are still those of all rows, but each rank's loss is the mean over its own.

    Args:
        normalization: a method of :func:`vkd_plugin.normalization.normalize`.
        distance: a name in :data:`vkd_plugin.losses.distances.DISTANCES`.
        normalize_student: normalise the student as well, after its projection.
        eps: of the normalisation; None for the method's default.
        synchronize: statistics of ``standardize`` and ``whiten`` over the rows of all ranks.
        beta: where ``smooth_l1`` turns from quadratic to linear.
        alpha: exponent of ``log_sum``, at least 1.

    Raises:
        ValueError: an unknown name (the nearest is named) or a number out of range.
    """

    def __init__(
        self,
        normalization: str = "layer_norm",
        distance: str = "smooth_l1",
        normalize_student: bool = False,
        eps: float | None = None,
        synchronize: bool = True,
        beta: float = 1.0,
        alpha: float = 4.0,
    ) -> None:
        super().__init__()
        self.normalization = Normalization(normalization, eps, synchronize)
        self.distance = one_of("distance", distance, DISTANCES)
        self.normalize_student = normalize_student
        self.distance_kwargs: dict[str, float] = {}
        # Each of these shapes one distance only, and is not to be set in vain.
        for name, value, owner, default, least in (
            ("beta", beta, "smooth_l1", 1.0, 0.0),
            ("alpha", alpha, "log_sum", 4.0, 1.0),
        ):
            value = number(name, value, at_least=least)
            if distance == owner:
                self.distance_kwargs[name] = value
            elif value != default:
                raise ValueError(f"{name} shapes the distance '{owner}', and '{distance}' does not read it")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar in float32, or in float64 if a feature is.

        Args:
            student: projected features (N, C_t).
            teacher: features (N, C_t); gets no gradient.

        Raises:
            ValueError: the shapes do not fit; the message says what is missing.
        """
        check_rows(student, teacher)
        with without_autocast(student):
            student = at_least_float32(student)
            teacher = self.normalization(teacher.detach())
            if self.normalize_student:
                student = self.normalization(student)
            return DISTANCES[self.distance](student, teacher, **self.distance_kwargs)

    def extra_repr(self) -> str:
        shape = "".join(f", {name}={value:g}" for name, value in self.distance_kwargs.items())
        return f"distance='{self.distance}'{shape}, normalize_student={self.normalize_student}"


def check_rows(student: Tensor, teacher: Tensor) -> None:
    """Both (N, C), and the same N and C.

    Raises:
        ValueError: they are not; the message says which part is missing.
    """
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(f"features must be rows (N, C), got {shapes}: choose a readout that makes rows of them")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student and teacher must have the same rows, got {shapes}: their readouts do not match")
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same channels, got {shapes}: the student needs a projector with "
            f"out_features={teacher.shape[1]}"
        )
