"""What an evaluation transform does to an image, in the words of timm's ``pretrained_cfg``."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from ..config import Experiment
from .kind import DETECTOR, kind_of

_TO_TENSOR = {"ToTensor", "ToImage", "PILToTensor", "ConvertImageDtype", "ToDtype", "MaybeToTensor"}


@dataclass
class Preprocessing:
    """How the images that a run was tested on became its model's input.

    Attributes:
        told: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode`` as in timm, those
            of them that can be told.
        untold: steps of the transform that timm has no words for.
        written: the transform as it prints itself; None without one.
    """

    told: dict[str, Any] = field(default_factory=dict)
    untold: list[str] = field(default_factory=list)
    written: str | None = None


def preprocessing(experiment: Experiment) -> Preprocessing:
    """That of the test section's data set; a detector's images have no size of their own, and are not cropped."""
    dataset = experiment.data["datasets"].get(experiment.data["test"]["test_data_loader"]["dataset_id"])
    shape = _sample_shape(dataset)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None) or getattr(dataset, "transforms", None)
    found = Preprocessing()
    if transform is not None:
        found.written = str(transform)
        _read(transform, found)
    if kind_of(experiment) is DETECTOR:
        shape = None
        found.told = {name: value for name, value in found.told.items() if not name.startswith("crop")}
    if shape is not None:
        found.told = {"input_size": shape, **found.told}
        if found.written and not found.untold and "mean" not in found.told:  # nothing but numbers from 0 to 1
            found.told |= {"mean": [0.0] * shape[0], "std": [1.0] * shape[0]}
    return found


def _sample_shape(dataset: Any) -> list[int] | None:
    try:
        sample = dataset[0]
    except Exception:  # the data are not here, and whatever stands for them may fail in its own way
        return None
    image = sample[0] if isinstance(sample, tuple | list) and sample else sample
    return list(image.shape) if isinstance(image, Tensor) and image.dim() == 3 else None


def _read(transform: Any, found: Preprocessing) -> None:
    resize: Any = None
    crop: Any = None
    normalised = False
    for step in _steps(transform):
        kind = type(step).__name__
        if kind == "Resize" and resize is None and crop is None:
            resize = _sizes(step.size)
            found.told["interpolation"] = str(getattr(step.interpolation, "value", step.interpolation))
        elif kind == "CenterCrop" and crop is None:
            crop = _sizes(step.size)
        elif kind == "Normalize" and not normalised:
            normalised = True
            found.told |= {name: [float(value) for value in getattr(step, name)] for name in ("mean", "std")}
        elif kind not in _TO_TENSOR or getattr(step, "scale", True) is False:
            found.untold.append(str(step))
    cropping = _cropping(resize, crop)
    if cropping is not None:
        found.told |= cropping
    else:
        named = {"Resize": resize, "CenterCrop": crop}
        found.untold.append(" and ".join(f"{kind} to {size}" for kind, size in named.items() if size))


def _steps(transform: Any) -> Iterator[Any]:
    if type(transform).__name__ == "Compose" or isinstance(transform, nn.Sequential):
        for step in getattr(transform, "transforms", transform):
            yield from _steps(step)
    else:
        yield transform


def _sizes(size: Any) -> list[int]:
    """``[short side]`` or ``[height, width]``."""
    return [int(size)] if isinstance(size, int | float) else [int(side) for side in size]


def _cropping(resize: list[int] | None, crop: list[int] | None) -> dict[str, Any] | None:
    """timm resizes to the input size divided by ``crop_pct``, rounded down, and crops; None if it cannot do it."""
    crop = crop * 2 if crop is not None and len(crop) == 1 else crop
    if resize is None:
        return {"crop_pct": 1.0} if crop is None else None
    if crop is None:
        return {"crop_pct": 1.0, "crop_mode": "squash"} if len(resize) == 2 else None
    mode, resized = ("squash", resize) if len(resize) == 2 else ("center", resize * 2)
    if (mode == "center" and crop[0] != crop[1]) or crop[0] * resized[1] != crop[1] * resized[0]:
        return None
    share = crop[0] / resized[0]
    while any(math.floor(side / share) < whole for side, whole in zip(crop, resized, strict=True)):
        share = math.nextafter(share, 0.0)  # it was rounded the wrong way
    return {"crop_pct": share, "crop_mode": mode} if share <= 1 else None
