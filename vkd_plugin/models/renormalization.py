"""Images normalised for one model, handed to another that expects other means and standard deviations.

The data pipeline normalises once, for the student. A teacher with other statistics has each channel mapped on its
way in, by x -> x * scale + shift, which is x * std_data + mean_data, the pixel, and then (pixel - mean) / std.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Statistics(NamedTuple):
    """What images are normalised with.

    Args:
        mean, std: a number a channel, for pixels between 0 and 1; ``std`` is positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Sequence[float]]) -> "Statistics":
        """The statistics that a YAML mapping ``{mean: [...], std: [...]}`` gives.

        Raises:
            ValueError: other keys, or values that are no such numbers.
        """
        if not isinstance(config, Mapping) or config.keys() != {"mean", "std"}:
            raise ValueError(f"expected {{mean: [...], std: [...]}}, got {config!r}")
        mean, std = (_numbers(config[key]) for key in ("mean", "std"))
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels, std {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std should be positive, got {list(std)}")
        return cls(mean, std)


def _numbers(value: object) -> tuple[float, ...]:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
        raise ValueError(f"expected a list of numbers, one a channel, got {value!r}")
    return tuple(map(float, numbers))


def renormalize_inputs(model: nn.Module, data: Statistics, expected: Statistics) -> None:
    """Has ``model`` take images (B, C, H, W) that are normalised with ``data`` for ones with ``expected``.

    Done before each forward pass of the model as a whole, not of parts of it that are called by themselves; with a
    hook and buffers of its own, so module paths and the state dict stay what they were, and copies, devices,
    DistributedDataParallel and torch.compile are no concern. Nothing is done where both are the same.

    Args:
        model: changed.
        data: of the images.
        expected: what the model was trained with.

    Raises:
        ValueError: another number of channels.
    """
    if len(data.mean) != len(expected.mean):
        raise ValueError(f"images have {len(data.mean)} channels, the model expects {len(expected.mean)}")
    model._data_statistics = data  # type: ignore[assignment]
    if data == expected:
        return
    data_mean, data_std, mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (*data, *expected)
    )
    like = next(model.parameters())
    for name, value in (("_input_scale", data_std / std), ("_input_shift", (data_mean - mean) / std)):
        model.register_buffer(name, value.to(like.device, like.dtype), persistent=False)
    model.register_forward_pre_hook(_renormalize)


def data_statistics(model: nn.Module) -> Statistics | None:
    """What :func:`renormalize_inputs` was told of the images; None for a model that it was not given."""
    return getattr(model, "_data_statistics", None)


def _renormalize(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = args
    scale: Tensor = module.get_buffer("_input_scale").to(images.dtype)
    shift: Tensor = module.get_buffer("_input_shift").to(images.dtype)
    return images * scale + shift, *rest
