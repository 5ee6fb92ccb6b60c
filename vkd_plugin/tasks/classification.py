"""Image classification: the batch, the measure, and the metric that chooses the best checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import UserError
from .evaluating import evaluating


class Classification:
    """The task whose targets are classes.

    Attributes:
        metric: name of the figure that chooses the best checkpoint; higher is better.
        lists: a batch holds tuples of samples; here it holds tensors.
    """

    metric = "top1"
    lists = False

    def unpack(self, batch: Any, device: torch.device) -> tuple[Any, Any, Any]:
        """Samples and targets on the device, and the supplement where the loader put it.

        Args:
            batch: ``(samples, targets)`` or torchdistill's ``(samples, targets, supplement)``.
            device: where to.

        Returns:
            ``(samples, targets, supplement)``; the supplement is ``{}`` if there is none.

        Raises:
            UserError: it is a batch of detection.
        """
        samples, targets, *rest = batch
        if isinstance(targets, tuple | list | Mapping):
            found = type(targets).__name__
            raise UserError(
                f"a classifier's targets are a tensor, got a {found}; detectors need train: task: 'detection'"
            )
        supplement = rest[0] if rest else {}
        return samples.to(device, non_blocking=True), targets.to(device, non_blocking=True), supplement

    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], device: torch.device, folder: Path | None = None
    ) -> dict[str, float]:
        """Accuracy and cross-entropy over all samples of a loader, and over those of all processes.

        Every process calls it with its own part of the samples; the parts may differ in size. What is summed
        are counts, so with parts that do not overlap the figures are those of one process, to the last
        sample.

        Args:
            model: from images to logits (N, K). Where it returns several heads, as DeiT does in training
                mode, their mean is measured, as DeiT does. It is measured in evaluation mode and left as it
                was.
            loader: batches with targets (N,), int64.
            device: where the model is.
            folder: where a task may leave more than figures; this one leaves nothing.

        Returns:
            ``top1`` and ``top5``, percent (``top5`` of fewer than five classes is 100), and ``loss``, the
            mean cross-entropy.

        Raises:
            UserError: outputs that are not logits, or no samples at all.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # samples, top-1 hits, top-5 hits, loss
        with evaluating(model) as bare:
            for batch in loader:
                samples, targets, _ = self.unpack(batch, device)
                sums += _batch_sums(logits(bare(samples)), targets)
        if dist.is_initialized():
            dist.all_reduce(sums)
        count, top1, top5, loss = sums.tolist()  # the only time that the host waits for the device
        if not count:
            raise UserError("nothing to evaluate: the data set is empty")
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


def logits(outputs: Any) -> Tensor:
    """(N, K) float32 from what a classifier returns: logits, or several heads, whose mean is taken.

    Raises:
        UserError: anything else.
    """
    if isinstance(outputs, tuple | list) and outputs and all(isinstance(head, Tensor) for head in outputs):
        outputs = torch.stack([head.float() for head in outputs]).mean(dim=0)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(f"a classifier must return logits (N, classes), or several of them; got {found}")
    return outputs.float()


def _batch_sums(outputs: Tensor, targets: Tensor) -> Tensor:
    """Samples, top-1 hits, top-5 hits and summed loss of a batch, (4,) float64 on the device."""
    best = outputs.topk(min(5, outputs.shape[1])).indices
    hits = best == targets[:, None]
    count = hits.new_tensor(len(targets), dtype=torch.float64)
    loss = F.cross_entropy(outputs, targets, reduction="sum")
    return torch.stack([count, hits[:, 0].sum(), hits.sum(), loss.double()])
