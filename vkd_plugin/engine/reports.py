"""What a loader's workers have to say besides their batches: unreadable images, and errors in a line."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from ..errors import UserError

logger = logging.getLogger(__name__)


class Report(NamedTuple):
    """A batch, and what there is to say of it.

    Args:
        batch: collated.
        replaced: a line for each sample that could not be read, in whose place another one is.
        failure: the message of a ``UserError`` that there is instead of a batch. torch would raise it in the main
            process with the worker's traceback for its text.
    """

    batch: Any
    replaced: list[str]
    failure: str | None = None


class ReportingLoader(DataLoader[Any]):
    """A data loader that takes reports in and gives batches out.

    Attributes:
        replaced: unreadable images, in the place of which others came, since somebody last set it to 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaced = 0
        self._said: set[str] = set()

    def __iter__(self) -> "_Batches":  # type: ignore[override]
        return _Batches(super().__iter__(), self)

    def hear(self, batch: Any) -> Any:
        """``batch`` without a report around it. A replaced image is logged once, and counted each time.

        Raises:
            UserError: it is reported.
        """
        if not isinstance(batch, Report):
            return batch
        if batch.failure is not None:
            raise UserError(batch.failure)
        for message in batch.replaced:
            if message not in self._said:
                self._said.add(message)
                logger.warning("%s", message)
        self.replaced += len(batch.replaced)
        return batch.batch


class _Batches(Iterator[Any]):
    """The iterator of a loader; reports are heard when their batch's turn comes, not when a worker sends it."""

    def __init__(self, inner: Any, loader: ReportingLoader) -> None:
        self._inner = inner
        self._loader = loader
        self._workers = getattr(inner, "_workers", ())  # who has died is asked of them

    def __next__(self) -> Any:
        return self._loader.hear(next(self._inner))


def unreadable_images(loader: DataLoader[Any]) -> int | None:
    """Images that could not be read and were replaced, in the batches since the last call.

    None where there are none and the data set is not one that would replace any.
    """
    assert isinstance(loader, ReportingLoader)
    count, loader.replaced = loader.replaced, 0
    return count if count or getattr(loader.dataset, "on_error", None) == "skip" else None
