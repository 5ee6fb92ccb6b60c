"""What differs between an exported classifier and an exported detector."""

from dataclasses import dataclass

from ..config import Experiment
from ..tasks import Classification, Detection
from ..tasks.coco_ap import FIGURES


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        tag: the hub's name of what it does.
        noun: for a sentence.
        figures: of a test, as the run records them.
        metric: the one that chooses the best checkpoint.
        about_figures: what they are.
    """

    tag: str
    noun: str
    figures: tuple[str, ...]
    metric: str
    about_figures: str


CLASSIFIER = Kind(
    "image-classification",
    "image classifier",
    ("top1", "top5", "loss"),
    Classification.metric,
    "top1 and top5 in percent; loss is the cross-entropy.",
)
DETECTOR = Kind(
    "object-detection",
    "object detector",
    FIGURES,
    Detection.metric,
    "COCO's average precision for boxes, in percent; empty where no object is of the size.",
)


def kind_of(experiment: Experiment) -> Kind:
    """By ``train.task``."""
    return DETECTOR if experiment.data["train"].get("task") == "detection" else CLASSIFIER
