"""The labels that a detector knows, told from how it is built."""

from torch import nn


def labels_of(model: nn.Module) -> range | None:
    """The labels that its targets may have: of ViDT and of torchvision's detectors; None for any other.

    Where torchvision's classes exclude each other (Faster R-CNN and what is built on it, SSD) the first of them is the
    background, so that an object with the label 0 would be trained to be none.
    """
    if isinstance(count := getattr(model, "num_classes", None), int):
        return range(count)
    places = (
        ("roi_heads.box_predictor.cls_score", "out_features", 1),
        ("head.classification_head", "num_columns", 1),  # of SSD
        ("head.classification_head", "num_classes", 0),
    )
    for path, name, first in places:
        try:
            count = getattr(model.get_submodule(path), name)
        except AttributeError:
            continue
        return range(first, int(count))
    return None
