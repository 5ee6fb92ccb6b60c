"""What a person sees while a run goes on: a live bar on a terminal, one line per epoch elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torchdistill.common.constant import def_logger

from .meter import Pace
from .records import writing

logger = logging.getLogger("vkd_plugin")
console = Console(stderr=True, highlight=False)

_SECONDS_BETWEEN_LINES = 60


def setup_logging(is_main: bool) -> None:
    """The plugin's messages to the terminal; they and torchdistill's are kept for :func:`log_to`.

    Args:
        is_main: other processes say warnings and errors only.
    """
    if console.is_terminal:
        screen: logging.Handler = RichHandler(
            console=console, show_time=False, show_path=False, show_level=False, markup=False
        )
    else:
        screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO if is_main else logging.WARNING)
    kept = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    for target, handlers in ((logger, [screen, kept]), (def_logger, [kept])):
        for handler in list(target.handlers):
            target.removeHandler(handler)
            handler.close()
        target.setLevel(logging.DEBUG)
        target.propagate = False
        for handler in handlers:
            target.addHandler(handler)


def log_to(*files: Path) -> None:
    """Writes what was said since :func:`setup_logging`, and all that follows, to ``files``.

    Raises:
        UserError: a file cannot be written.
    """
    kept = next(handler for handler in logger.handlers if isinstance(handler, MemoryHandler))
    for file in files:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            handler = _LogFile(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for record in kept.buffer:
            handler.handle(record)
        for target in (logger, def_logger):
            target.addHandler(handler)
    for target in (logger, def_logger):
        target.removeHandler(kept)


class _LogFile(logging.FileHandler):
    """A log file that may become impossible to write to, on a full disk, without taking the run with it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            console.print(f"{self.baseFilename}: cannot write: {error.strerror or error}", markup=False)


class EpochProgress:
    """Shows an epoch as it goes on: a bar with loss terms, images per second and the time left in the run.

    Off a terminal there is a line a minute instead, and in processes other than the main one nothing.

    Args:
        epoch, epochs: the present epoch (from 0) and their number.
        steps, done: of this epoch; those that follow have as many.
        pace: this epoch's, kept by the caller.
        enabled: False shows nothing.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, done: int, pace: Pace, enabled: bool) -> None:
        self.title = f"epoch {epoch + 1}/{epochs}"
        self.steps, self.done = steps, done
        self.steps_later = (epochs - epoch - 1) * steps
        self.pace = pace
        self.enabled = enabled
        self._said = time.perf_counter()
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn(self.title),
                BarColumn(bar_width=6),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, shown="")

    def __enter__(self) -> "EpochProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self) -> None:
        """A step is done."""
        self.done += 1
        if self._bar:
            self._bar.advance(self._task)

    def show(self, figures: Mapping[str, float]) -> None:
        """The newest figures of a step (already on the host)."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.update(self._task, shown=self._text(figures))
        elif time.perf_counter() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.perf_counter()
            logger.info("%s  step %d/%d  %s", self.title, self.done, self.steps, self._text(figures))

    def _text(self, figures: Mapping[str, float]) -> str:
        steps_left = self.steps_later + self.steps - self.done
        left = steps_left * self.pace.seconds / max(self.done, 1)
        shown = [f"{_short(name)} {value:.3f}" for name, value in figures.items() if name.startswith("loss")]
        return "  ".join([*shown, f"{self.pace.images_per_second:.0f} img/s", f"{_duration(left)} left"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in one line: losses, validation metrics, learning rate, speed."""
    parts = [f"epoch {record['epoch']}/{epochs}"]
    parts += [f"{_short(k)} {v:.4f}" for k, v in record.items() if k == "loss" or k.startswith("loss/")]
    validation = [k for k in record if k.startswith(("val/", "val_ema/")) and not k.endswith("loss")]
    parts += [f"{k} {record[k]:.2f}" for k in validation]
    parts += [f"grad norm {record['gradient_norm']:.3g}"] if "gradient_norm" in record else []
    parts += [f"lr {record['lr']:.2e}", f"{record['images_per_s']:.0f} img/s"]
    return "  ".join(parts)


def _short(key: str) -> str:
    return key.removeprefix("loss/")
