"""COCO's average precision, and its format of results.

T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True)
class Seen:
    """An image, in its file's pixels.

    Args:
        boxes: (k, 4) float64, detections: left, top, width, height.
        scores: (k,) float64.
        labels: (k,) int64.
        truth: (m, 7) float64, annotated objects: left, top, width, height, area, label, iscrowd.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    truth: np.ndarray


def average_precision(images: Mapping[int, Seen]) -> dict[str, float]:
    """The figures of COCO's protocol for boxes, as pycocotools computes them.

    Args:
        images: by id.

    Returns:
        ``FIGURES`` in percent: the mean over IoU thresholds 0.5 to 0.95, at 0.5, at 0.75, and for objects below
        32 x 32, from there to 96 x 96, and above; nan where no object is of that size.

    Raises:
        UserError: there is nothing to find.
    """
    COCO, COCOeval = evaluator_classes()
    truth, found = _described(images)
    if not any(not annotation["iscrowd"] for annotation in truth["annotations"]):
        raise UserError(f"nothing to evaluate: no object is annotated in {len(images)} images")
    evaluator = COCOeval(COCO(truth), COCO(found), "bbox", print_function=lambda *_: None)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    stats = [float(value) for value in evaluator.stats[: len(FIGURES)]]
    return {name: 100 * value if value >= 0 else math.nan for name, value in zip(FIGURES, stats, strict=True)}


def evaluator_classes() -> tuple[Any, Any]:
    """``COCO`` and ``COCOeval`` of the evaluator, with the interfaces of pycocotools.

    Raises:
        UserError: it is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserError("evaluating detectors needs faster-coco-eval: pip install 'vkd-plugin[detection]'") from None
    return COCO, COCOeval_faster


def write_results(path: Path, images: Mapping[int, Seen], category_ids: Mapping[int, int] | None) -> None:
    """Writes detections as COCO's evaluation server takes them.

    Args:
        path: the JSON file; what is there is replaced.
        images: by id.
        category_ids: label -> category id, detections of other labels being left out; None where labels are the ids.

    Raises:
        UserError: it cannot be written.
    """
    results = [
        {"image_id": i, "category_id": category, "bbox": box, "score": score}
        for i, seen in sorted(images.items())
        for box, score, label in zip(seen.boxes.tolist(), seen.scores.tolist(), seen.labels.tolist(), strict=True)
        if (category := label if category_ids is None else category_ids.get(label)) is not None
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error


def _described(images: Mapping[int, Seen]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ground truth and detections as data sets in COCO's format. Ids begin at 1: COCO's protocol takes 0 for none."""
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, seen in images.items():
        for row in seen.truth.tolist():
            box, (area, label, crowd) = row[:4], row[4:]
            entry = {"image_id": i, "category_id": int(label), "bbox": box, "area": area, "iscrowd": int(crowd)}
            truth.append({"id": len(truth) + 1, **entry})
        for box, score, label in zip(seen.boxes.tolist(), seen.scores.tolist(), seen.labels.tolist(), strict=True):
            entry = {"image_id": i, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            found.append({"id": len(found) + 1, "score": score, **entry})
    labels = sorted({entry["category_id"] for entry in (*truth, *found)})
    shared = {"images": [{"id": i} for i in images], "categories": [{"id": label} for label in labels]}
    return {**shared, "annotations": truth}, {**shared, "annotations": found}
