"""What two models that should be one are compared by: their answers to the same random images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.weights import first_line
from ..tasks.classification import logits
from ..tasks.detection import detections

Probe = Callable[[nn.Module], Tensor]
"""Takes a model in evaluation mode, on the CPU."""

_SIZES = ((96, 128), (128, 96))


def logits_of(shape: Sequence[int]) -> Probe:
    """Logits (2, classes) of images of ``shape``, channels, height and width."""
    images = _random(2, *shape)

    def probe(model: nn.Module) -> Tensor:
        with _asked(f"{tuple(shape)} each"):
            return logits(model(images))

    return probe


def layers_of() -> Probe:
    """Of each layer of a detector, as often as it runs, the mean of what it puts out and of the absolute values.

    Detections alone would say little: of random images a trained detector may find none.
    """
    images = [_random(3, *size) for size in _SIZES]

    def probe(model: nn.Module) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                values = output.double()
                found.append(torch.stack([values.mean(), values.abs().mean()]))

        with _asked("of two sizes"), ExitStack() as stack:
            for module in model.modules():
                if not any(module.children()):
                    stack.callback(module.register_forward_hook(keep).remove)
            detections(model(images), len(images))
        return torch.cat(found)

    return probe


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def _asked(images: str) -> Iterator[None]:
    try:
        with torch.inference_mode():
            yield
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"the student does not take its test images, {images}: {first_line(error)}") from error
