"""Object detection: the batch, COCO's measure, and the metric that chooses the best checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import default_collate

from ..errors import UserError
from .coco_ap import Seen, average_precision, evaluator_classes, write_results
from .evaluating import evaluating
from .pictures import Pictures

_TRUTH = "ground_truth"
_PARTS = ("boxes", "labels", "scores")


class Detection:
    """The task whose targets are boxes; models follow torchvision's convention.

    Args:
        category_ids: label -> category id, for :attr:`RESULTS`; None where labels are category ids.
        pictures: what is drawn at :attr:`PICTURES`; None for nothing.

    Attributes:
        metric: name of the figure that chooses the best checkpoint; higher is better.
        lists: a batch holds tuples of samples, as they differ in size.

    Raises:
        UserError: the evaluator is not installed.
    """

    metric = "AP"
    lists = True
    RESULTS = "detections.json"
    PICTURES = "detections.png"

    def __init__(self, category_ids: Mapping[int, int] | None = None, pictures: Pictures | None = None) -> None:
        self.category_ids = category_ids
        self.pictures = pictures
        evaluator_classes()  # now, not after an epoch

    def unpack(self, batch: Any, device: torch.device) -> tuple[list[Tensor], list[dict[str, Any]], Any]:
        """Images and targets on the device, and the supplement where the loader put it.

        Args:
            batch: ``(images, targets)`` or ``(images, targets, supplements)``, a sequence of samples each.
            device: where to; a target's ``ground_truth`` stays on the host, where it is read.

        Returns:
            ``(images, targets, supplement)``; the supplement is collated, ``{}`` if there is none.

        Raises:
            UserError: the batch is another one, or images are no tensors of floating-point numbers.
        """
        images, targets, *rest = batch
        if isinstance(images, Tensor) or isinstance(targets, Tensor | Mapping):
            raise UserError("a detector's batch is a list of images: give the loader collate_fn: 'coco_collate_fn'")
        for image in images:
            if not isinstance(image, Tensor) or not image.is_floating_point():
                found = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise UserError(f"a detector's images are tensors of floats, got {found}: end transforms with ToDtype")
        moved = [
            {key: _moved(value, device) if key != _TRUTH else value for key, value in target.items()}
            for target in targets
        ]
        supplement = default_collate(list(rest[0])) if rest and rest[0] else {}
        return [image.to(device, non_blocking=True) for image in images], moved, supplement

    def evaluate(
        self, model: nn.Module, loader: Iterable[Any], device: torch.device, folder: Path | None = None
    ) -> dict[str, float]:
        """Average precision over all images of a loader, and over those of all processes.

        Every process calls it with its own part; an image that comes twice counts once. Detections are scaled from
        ``size`` to ``orig_size`` of their targets, and compared there with ``ground_truth``
        (:class:`~vkd_plugin.datasets.CocoDetection`), crowds and COCO's areas included; where targets have none, with
        ``boxes``, ``labels`` and, if they are there, ``area`` and ``iscrowd``.

        Args:
            model: from a list of images to a list of ``boxes``, left, top, right, bottom in pixels of the image,
                ``labels`` and ``scores``. It is measured in evaluation mode and left as it was.
            loader: batches as :meth:`unpack` takes them, with ``image_id`` in each target.
            device: where the model is.
            folder: the main process leaves all detections there, in COCO's format of results (:attr:`RESULTS`), and
                the picture, if one is asked for (:attr:`PICTURES`).

        Returns:
            ``AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large``, percent; nan where no object is of
            the size.

        Raises:
            UserError: outputs that are not detections, or are not finite; nothing to evaluate; results that cannot be
                written.
        """
        own: dict[int, Seen] = {}
        with evaluating(model) as bare:
            for batch in loader:
                images, targets, _ = self.unpack(batch, device)
                for target, output in zip(targets, detections(bare(images), len(images)), strict=True):
                    own.setdefault(_image_id(target), _seen(target, output))
        if not dist.is_initialized():
            return self._measure([own], folder)
        is_main = dist.get_rank() == 0
        parts: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(own, parts, dst=0)
        outcome: list[Any] = [None]
        if parts is not None:
            try:
                outcome = [self._measure(parts, folder)]
            except UserError as error:  # for all processes, which would wait for ever
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def _measure(self, parts: Sequence[Mapping[int, Seen]], folder: Path | None) -> dict[str, float]:
        images = {i: seen for part in reversed(parts) for i, seen in part.items()}
        if not images:
            raise UserError("nothing to evaluate: the data set is empty")
        if folder is not None:
            write_results(folder / self.RESULTS, images, self.category_ids)
            if self.pictures is not None:
                self.pictures.draw(folder / self.PICTURES, images)
        return average_precision(images)


def detections(outputs: Any, count: int) -> list[dict[str, Tensor]]:
    """What a detector returns for ``count`` images, if it is that.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(outputs, list | tuple) or len(outputs) != count:
        found = f"{len(outputs)} outputs" if isinstance(outputs, list | tuple) else type(outputs).__name__
        raise UserError(f"a detector must return a list of detections, one of each of {count} images; got {found}")
    for output in outputs:
        if not isinstance(output, Mapping) or not all(isinstance(output.get(part), Tensor) for part in _PARTS):
            found = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise UserError(f"a detector must return boxes, labels and scores of an image; got {found}")
    return list(outputs)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _image_id(target: Mapping[str, Any]) -> int:
    if "image_id" not in target:
        raise UserError(f"targets need an image_id to be evaluated; got {', '.join(target)}")
    return int(target["image_id"])


def _seen(target: Mapping[str, Any], output: Mapping[str, Tensor]) -> Seen:
    boxes = _in_file(_array(output["boxes"]), target)
    scores = _array(output["scores"])
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise UserError("the detector's boxes or scores are not finite")
    return Seen(boxes, scores, output["labels"].cpu().numpy().astype(np.int64), _truth(target))


def _truth(target: Mapping[str, Any]) -> np.ndarray:
    """(m, 7), see :class:`~vkd_plugin.tasks.coco_ap.Seen`."""
    if _TRUTH in target:
        return _array(target[_TRUTH])
    boxes = _in_file(_array(target["boxes"]), target)
    by_size = torch.tensor(np.prod(boxes[:, 2:], axis=1))
    crowd = _array(target.get("iscrowd", torch.zeros(len(boxes))))
    area = _array(target["area"]) * np.prod(_scale(target)[:2]) if "area" in target else _array(by_size)
    return np.column_stack([boxes, area, _array(target["labels"]), crowd])


def _in_file(corners: np.ndarray, target: Mapping[str, Any]) -> np.ndarray:
    """Left, top, width, height in the file of corners in the image as it was given."""
    scaled = corners.reshape(-1, 4) * _scale(target)
    return np.concatenate([scaled[:, :2], scaled[:, 2:] - scaled[:, :2]], axis=1)


def _scale(target: Mapping[str, Any]) -> np.ndarray:
    """(4,), of x, y, x, y."""
    if "size" not in target or "orig_size" not in target:
        return np.ones(4)
    return np.tile((_array(target["orig_size"]) / _array(target["size"]))[::-1], 2)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
