"""Whether images are normalised with what a published model was trained with."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torchvision.transforms import Normalize
from torchvision.transforms.v2 import Normalize as NormalizeV2

from ..models.renormalization import Statistics, data_statistics


def other_statistics(model: nn.Module, kwargs: dict[str, Any], datasets: Iterable[Any]) -> str | None:
    """What to say of a model of timm with published weights that is given images normalised otherwise.

    A file given as ``checkpoint`` is taken for timm's if the model has as many classes as those. Nothing is said where
    data sets differ among themselves, or do not tell: the images may be normalised elsewhere.

    Args:
        model: as built.
        kwargs: of ``timm_model``.
        datasets: of the experiment.
    """
    published = getattr(model, "pretrained_cfg", None) or {}
    is_published = kwargs.get("pretrained") or (
        kwargs.get("checkpoint") is not None and published.get("num_classes") == getattr(model, "num_classes", None)
    )
    found = {statistics for dataset in datasets for statistics in _normalizations(dataset)}
    if not is_published or len(found) != 1:
        return None
    (data,) = found
    expected = data_statistics(model) or Statistics(*(tuple(map(float, published[key])) for key in ("mean", "std")))
    if expected == data or len(expected.mean) != len(data.mean):
        return None
    return (
        f"its images are normalised with mean {_shown(data.mean)} and std {_shown(data.std)}, it takes "
        f"{_shown(expected.mean)} and {_shown(expected.std)}: "
        f"renormalize: {{mean: {_shown(data.mean)}, std: {_shown(data.std)}}} translates"
    )


def _normalizations(holder: Any, depth: int = 4) -> Iterator[Statistics]:
    """The statistics of every ``Normalize`` in a data set's transforms."""
    if isinstance(holder, Normalize | NormalizeV2):
        yield Statistics(*(tuple(map(float, values)) for values in (holder.mean, holder.std)))
    elif depth:
        inner = [getattr(holder, name, None) for name in ("dataset", "transform", "transforms")]
        for part in [*inner, *(holder if isinstance(holder, list | tuple) else ())]:
            if part is not None:
                yield from _normalizations(part, depth - 1)


def _shown(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
