"""Checkpoint files: written so that no moment of a power cut, a kill or a full disk loses what was saved before.

=================  =========================================================================================
``last.pt``        where the run is: at the end of each epoch, every so many steps, before a stop
``previous.pt``    the ``last.pt`` before, in case that one is damaged
``best.pt``        student, projectors and EMA of the best epoch
``epoch<N>.pt``    a ``last.pt`` that ``checkpoint: {keep: K}`` keeps
=================  =========================================================================================

Files are read without executing anything that they hold (``weights_only=True``).
"""

import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..models.weights import first_line, read_checkpoint
from ..seal import damage, sealed

logger = logging.getLogger("vkd_plugin")

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"

# What a checkpoint to go on from holds at least.
_NEEDED = {"model", "projectors", "optimizer", "epoch", "batch", "step", "ranks"}


class SaveError(UserError):
    """A checkpoint could not be written; those written before are as they were."""


def save_atomically(state: Mapping[str, Any], path: Path, previous: Path | None = None) -> None:
    """Writes ``state`` beside ``path``, reads it back, and only then gives it the name ``path``.

    Args:
        state: tensors and plain values.
        path: the checkpoint.
        previous: the name that what ``path`` held before gets.

    Raises:
        SaveError: the disk refuses (full, read-only, gone); what ``path`` held is still there.
    """
    _write(_serialized(state), path, previous)


def _serialized(state: Mapping[str, Any]) -> bytearray:
    # In memory first: torch.save to a full disk fails with a RuntimeError about positions in a file.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return sealed(buffer.getbuffer())


def _write(content: bytearray, path: Path, previous: Path | None = None) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if found := damage(temporary):
            raise OSError(f"what was written does not read back: {found}")
        _prove_loadable(temporary, path)
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        why = _why(error, path.parent, len(content))
        _remove(temporary)
        raise SaveError(f"{path}: cannot save the checkpoint: {why}; what was saved before is intact") from error


def _prove_loadable(temporary: Path, path: Path) -> None:
    """That nothing in it needs code to be read, such as an object that an optimizer or scheduler keeps."""
    try:
        torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a class does
        _remove(temporary)
        raise UserError(f"{path}: would not be readable with weights_only=True: {first_line(error)}") from error


def _keep(path: Path, previous: Path) -> None:
    """Gives ``path`` the name ``previous`` too, so that at no time there is no ``path``."""
    if previous.exists() and previous.samefile(path):  # a process was killed between the two renamings
        return
    link = previous.with_name(f"{previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        link.replace(previous)
    except OSError:  # a file system without hard links: for a moment previous.pt is all there is
        _remove(link)
        path.replace(previous)


def _sync_folder(folder: Path) -> None:
    """Makes the names durable, as fsync of a file does for its content."""
    with suppress(OSError):  # some network file systems know no fsync of a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder has become read-only; resuming removes it
        path.unlink(missing_ok=True)


def _why(error: OSError, folder: Path, size: int) -> str:
    text = error.strerror or str(error)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return text
    return f"{text} ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"


def read_run_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that ``run.py`` wrote to go on from.

    Raises:
        UserError: missing, damaged, unreadable, or something else.
    """
    state = read_checkpoint(path, damage)
    missing = _NEEDED - state.keys()
    if missing:
        raise UserError(f"{path}: not a checkpoint to resume from: it holds no {', '.join(sorted(missing))}")
    return state


def read_newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint ``path``; for a ``last.pt`` that is damaged or missing, the newest readable one beside it.

    Returns:
        Where it was found, and what it holds.

    Raises:
        UserError: none can be read.
    """
    problems: list[str] = []

    def attempt(candidate: Path) -> tuple[Path, dict[str, Any]] | None:
        try:
            return candidate, read_run_checkpoint(candidate)
        except UserError as error:
            problems.append(str(error))
            return None

    found = attempt(path)
    if found is None:
        found = _newest(filter(None, map(attempt, _fallbacks(path))))
        if found is None:
            raise UserError("; ".join(problems))
        for problem in problems:
            logger.warning("%s; going on from %s, step %d", problem, found[0], found[1]["step"])
    return found


def _newest(readable: Iterator[tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]] | None:
    """Of previous.pt and the newest of those that were kept, the one that is further."""
    first = next(readable, None)
    second = next(readable, None) if first is not None and first[0].name == PREVIOUS else None
    return second if first and second and second[1]["step"] > first[1]["step"] else first


def has_checkpoint(last: Path) -> bool:
    """Whether there is a ``last.pt`` or something to fall back on."""
    return last.exists() or any(True for _ in _fallbacks(last))


def _fallbacks(path: Path) -> Iterator[Path]:
    if path.name != LAST:
        return
    if (previous := path.with_name(PREVIOUS)).exists():
        yield previous
    kept = [file for file in path.parent.glob("epoch*.pt") if file.stem[5:].isdigit()]
    yield from sorted(kept, key=lambda file: int(file.stem[5:]), reverse=True)


class Checkpoints:
    """The checkpoints of one run, written by its main process.

    Args:
        folder: where they lie.
        carry_on: what cannot be written (a full disk) is kept in memory and tried again with the next one, and the
            run goes on; otherwise it is an error.
    """

    def __init__(self, folder: Path, carry_on: bool = False) -> None:
        self.last, self.best = folder / LAST, folder / BEST
        self.carry_on = carry_on
        self._pending: dict[Path, bytearray] = {}

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Where the run is; the one before becomes ``previous.pt``."""
        self._save(state, self.last)

    def save_best(self, state: Mapping[str, Any]) -> None:
        """The best student so far."""
        self._save(state, self.best)

    def save_epoch(self, state: Mapping[str, Any], epoch: int) -> None:
        """One to keep."""
        self._save(state, self.last.with_name(f"epoch{epoch}.pt"))

    def finish(self) -> None:
        """Writes what is still to be written.

        Raises:
            SaveError: it cannot be written now either.
        """
        self.carry_on = False
        self._write_pending()

    def _save(self, state: Mapping[str, Any], path: Path) -> None:
        self._pending.pop(path, None)  # so that it comes last: best.pt is written before the last.pt that knows of it
        self._pending[path] = _serialized(state)
        try:
            self._write_pending()
        except SaveError as error:
            if not self.carry_on:
                raise
            logger.error("%s; the run goes on and tries again with the next one (checkpoint.on_error)", error)

    def _write_pending(self) -> None:
        for path in list(self._pending):
            previous = path.with_name(PREVIOUS) if path == self.last else None
            _write(self._pending[path], path, previous)
            del self._pending[path]
