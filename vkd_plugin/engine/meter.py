"""Figures of the steps: taken on the device, read on the host without waiting, averaged over the epoch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.high_level import AbstractLoss


class TermMeter:
    """The value of each loss term, before its weight, at the present step.

    Values are taken by forward hooks on the criterion's terms and stay on the device.
    """

    def __init__(self) -> None:
        self._now: dict[str, Tensor] = {}

    def attach(self, criterion: nn.Module) -> None:
        """Watches the terms of a torchdistill criterion (nothing where it has none), the model's own included."""
        if not isinstance(criterion, AbstractLoss):
            return
        if getattr(criterion, "model_loss_factor", None):  # else what the model returns is no part of the loss
            criterion.register_forward_hook(self._take_model_terms)
        for name, (term, _) in criterion.term_dict.items():
            term.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, value: Any) -> None:
            if isinstance(value, Tensor):
                self._now[name] = _scalar(value)

        return hook

    def _take_model_terms(self, criterion: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Those of a detector, which returns its losses by name: they are what torchdistill hands over second."""
        model_losses: Mapping[str, Tensor] = args[1]
        self._now |= {name: _scalar(loss) for name, loss in model_losses.items()}

    def take(self, loss: Tensor) -> dict[str, Tensor]:
        """``loss`` and, as ``loss/<name>``, the terms since the last call, as scalars on the device."""
        terms, self._now = self._now, {}
        return {"loss": _scalar(loss)} | {f"loss/{name}": value for name, value in terms.items()}


def _scalar(value: Tensor) -> Tensor:
    """``value`` without gradient; some losses are of shape (1,), torchdistill's CRDLoss for one."""
    return value.detach().float().mean()


@dataclass
class StepFigures:
    """What is known of a step.

    Args:
        step: counts from 1 over the whole run.
        epoch, batch: place of its batch; both count from 0.
        logged: it is one of those that ``log_freq`` asks for.
        values: ``loss``, ``loss/<term>``, ``gradient_norm`` where the optimizer made a step, and whatever else.
        gradients: parameters, and the norm of each one's gradient, (P,) on the device.
    """

    step: int
    epoch: int
    batch: int
    logged: bool = False
    values: dict[str, float] = field(default_factory=dict)
    gradients: tuple[list[nn.Parameter], Tensor] | None = None


class Readback:
    """Brings scalars from the device to the host without making the host wait for the device.

    On a GPU a copy into page-locked memory is queued behind the step's kernels, and looked at when it has come
    through: a few steps later, as the host runs ahead. On a CPU values are there at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[StepFigures, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def send(self, figures: StepFigures, values: Mapping[str, Tensor]) -> None:
        """Queues scalars; they arrive as ``figures.values``."""
        scalars = torch.stack([value.double().reshape(()) for value in values.values()])
        event = None
        if scalars.is_cuda:
            host = torch.empty(scalars.shape, dtype=scalars.dtype, pin_memory=True)
            host.copy_(scalars, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            scalars = host
        self._waiting.append((figures, list(values), scalars, event))

    def arrived(self, wait: bool = False) -> Iterator[StepFigures]:
        """Those that have arrived, oldest first; with ``wait`` all of them."""
        while self._waiting:
            figures, names, scalars, event = self._waiting[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._waiting.popleft()
            figures.values.update(zip(names, scalars.tolist(), strict=True))
            yield figures


class Means:
    """Mean of each figure over an epoch's steps, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name: [sum, number]

    def add(self, values: Mapping[str, float]) -> None:
        """Takes in a step's figures."""
        for name, value in values.items():
            entry = self._sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def state(self) -> dict[str, list[float]]:
        """Sums and numbers so far, for :meth:`load`."""
        return {name: list(entry) for name, entry in self._sums.items()}

    def load(self, *states: Mapping[str, list[float]]) -> None:
        """Goes on from one state, or from those of several processes together."""
        self._sums = total(states)

    def clear(self) -> None:
        """Begins a new epoch."""
        self._sums = {}


def total(states: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The sums and numbers of several :class:`Means`, added up in their order."""
    sums: dict[str, list[float]] = {}
    for state in states:
        for name, (value, number) in state.items():
            entry = sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += number
    return sums


@dataclass
class Pace:
    """Where an epoch's time goes.

    Args:
        images: of all processes.
        seconds: from the first batch's request to the last step.
        waited: seconds of these in which this process waited for data.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Throughput of all processes."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """The part of the time in which the model had nothing to do, from 0 to 1."""
        return self.waited / max(self.seconds, 1e-9)
