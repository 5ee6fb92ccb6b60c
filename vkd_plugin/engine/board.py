"""TensorBoard: the figures of ``metrics.jsonl``, and those of single steps under ``step/``."""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("vkd_plugin")


class Board:
    """Writes scalars; that it cannot (a full disk) is said once and does not end the run.

    Args:
        folder: where the events go.
        step: steps that are done. What an interrupted run wrote of later ones is hidden.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        self._own_hook = threading.excepthook
        threading.excepthook = self._in_thread
        self._guarded(lambda: self._open(folder, step))

    def _open(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def add(self, values: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Each number among ``values`` as a point of its curve."""
        for name, value in values.items():
            if self._writer is not None and isinstance(value, int | float) and math.isfinite(value):
                writer = self._writer
                self._guarded(lambda: writer.add_scalar(prefix + name, value, step))  # noqa: B023 (called at once)

    def close(self) -> None:
        """Writes what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guarded(writer.close)
        threading.excepthook = self._own_hook

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        writer, self._writer = self._writer, None
        logger.warning("TensorBoard events cannot be written any more: %s", error)
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, whose traceback would end up on the terminal.
        if isinstance(failure.exc_value, OSError) and "tensorboard" in type(failure.thread).__module__:
            logger.debug("TensorBoard's thread ended: %s", failure.exc_value)
        else:
            self._own_hook(failure)
