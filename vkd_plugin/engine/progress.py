"""What a person sees while a run goes on: a live bar on a terminal, one line per epoch elsewhere."""

import logging
import sys
import time
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torchdistill.common.constant import def_logger

from .records import writing

logger = logging.getLogger("vkd_plugin")
console = Console(stderr=True, highlight=False)


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
            handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for record in kept.buffer:
            handler.handle(record)
        for target in (logger, def_logger):
            target.addHandler(handler)
    for target in (logger, def_logger):
        target.removeHandler(kept)


class EpochProgress:
    """A bar over the steps of an epoch, with loss terms, images per second and the time left in the run.

    Off a terminal, and in processes other than the main one, it shows nothing.

    Args:
        epoch, epochs: the present epoch (from 0) and their number.
        steps: steps of this epoch, and of each that follows.
        enabled: False shows nothing.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, enabled: bool) -> None:
        self.enabled = enabled and console.is_terminal
        self.steps_left = (epochs - epoch - 1) * steps
        self.images = 0
        self.started = time.perf_counter()
        if self.enabled:
            self._bar = Progress(
                TextColumn(f"epoch {epoch + 1}/{epochs}"),
                BarColumn(bar_width=6),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps, shown="")

    def __enter__(self) -> "EpochProgress":
        if self.enabled:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._bar.stop()

    def advance(self, images: int) -> None:
        """A step is done."""
        self.images += images
        if self.enabled:
            self._bar.advance(self._task)

    def show(self, terms: dict[str, float]) -> None:
        """Present values of the loss terms (already on the host)."""
        if not self.enabled:
            return
        done = self._bar.tasks[0].completed
        steps_left = self.steps_left + (self._bar.tasks[0].total or 0) - done
        left = steps_left * (time.perf_counter() - self.started) / max(done, 1)
        shown = [f"{name} {value:.3f}" for name, value in terms.items()]
        shown += [f"{self.images_per_second:.0f} img/s", f"{_duration(left)} left"]
        self._bar.update(self._task, shown="  ".join(shown))

    @property
    def images_per_second(self) -> float:
        """Throughput of the epoch so far, all processes' images if the caller counts them."""
        return self.images / max(time.perf_counter() - self.started, 1e-9)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in one line: losses, validation metrics, learning rate, speed."""
    parts = [f"epoch {record['epoch']}/{epochs}"]
    parts += [f"{_short(k)} {v:.4f}" for k, v in record.items() if k == "loss" or k.startswith("loss/")]
    parts += [f"{k} {v:.2f}" for k, v in record.items() if k.startswith("val/") and not k.endswith("loss")]
    parts += [f"lr {record['lr']:.2e}", f"{record['images_per_s']:.0f} img/s"]
    return "  ".join(parts)


def _short(key: str) -> str:
    return key.removeprefix("loss/")
