"""What a run writes into its output folder, by the main process alone.

``config.yaml`` as resolved, ``metrics.jsonl`` (one object per epoch), ``summary.json``, ``log.txt``, TensorBoard
events, ``checkpoints/``. A folder that already holds a run is moved aside, never overwritten.
"""

import fcntl
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
import torchdistill
import torchvision

from .. import __version__
from ..errors import UserError
from .checkpoint import Checkpoints, has_checkpoint

logger = logging.getLogger("vkd_plugin")

MEASURED = ("images_per_s", "data_wait_share", "teacher_cached_share", "gpu_memory_gib")
"""Keys of ``metrics.jsonl`` that no two runs share to the last bit; all others they do."""


def default_output(config: str | Path) -> Path:
    """``runs/<path of the config below configs/, without .yaml>``; outside of a ``configs`` folder its stem."""
    path = Path(os.path.normpath(config))
    parts = path.with_suffix("").parts
    if "configs" in parts:
        last = len(parts) - 1 - parts[::-1].index("configs")
        parts = parts[last + 1 :]
        return Path("runs", *parts)
    return Path("runs", path.stem)


class RunFolder:
    """The output folder of one run, locked while the run lives.

    Args:
        path: the folder; made if it is missing.
        carry_on: what cannot be written while training goes on (a full disk) is logged and tried again with the
            next, rather than an error.

    Raises:
        UserError: another process writes there, or it cannot be written.

    Attributes:
        checkpoints: the run's.
        records: those of ``metrics.jsonl``.
    """

    def __init__(self, path: Path, carry_on: bool = False) -> None:
        self.path = path
        self.carry_on = carry_on
        self.checkpoints = Checkpoints(path / "checkpoints", carry_on)
        self.records: list[dict[str, Any]] = []
        self._torn = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            self._probe()
        except OSError as error:
            raise UserError(f"--output {path}: cannot write there: {error.strerror or error}") from error

    def start_afresh(self, in_place: bool = False) -> None:
        """Moves an earlier run that the folder holds aside, to the first free ``<folder>.<number>``.

        Args:
            in_place: a run that was cut off before its first checkpoint is written over instead: of a job that is
                resumed until it is done, each attempt would otherwise leave a folder behind.

        Raises:
            UserError: it cannot be moved, or is the working folder, which paths in the configuration start from; or
                it holds a ``config.yaml`` of somebody else's.
        """
        if not (self.path / "config.yaml").exists():
            # Of a run that was cut off while it wrote its first file; other files of this kind may be somebody else's.
            for unfinished in (*self.path.glob("config.yaml.*.tmp"), *self.last.parent.glob("probe.*.tmp")):
                with writing(unfinished):
                    unfinished.unlink()
            return
        if not (self.path / "log.txt").exists():
            raise UserError(f"--output {self.path}: holds a config.yaml that is not a run's; choose another folder")
        if in_place and not has_checkpoint(self.last) and not (self.path / "summary.json").exists():
            self._remove_unfinished()
            self.write_metrics([])
            return
        real = self.path.resolve()  # behind a link, the folder moves and the link stays
        if Path.cwd().is_relative_to(real):
            raise UserError(f"--output {self.path}: the working folder holds an earlier run; choose another")
        moved, lock = _free_name(real), self._lock
        try:
            real.rename(moved)
            real.mkdir()
        except OSError as error:
            raise UserError(f"--output {self.path}: cannot move the earlier run: {error.strerror or error}") from error
        self.__init__(self.path, self.carry_on)  # type: ignore[misc]
        lock.close()
        logger.info("%s holds an earlier run; moved to %s", self.path, moved)

    def go_on(self, checkpoint: Path, records: list[dict[str, Any]]) -> None:
        """Makes the folder what it was when ``checkpoint`` was written.

        Files that a killed process left unfinished are removed. A ``last.pt`` that is not ``checkpoint`` (it is
        damaged, or another was asked for) becomes ``last.aside.pt``. If ``checkpoint`` is of another folder, its run
        goes on here, and a run that this folder holds is moved aside.

        Args:
            checkpoint: the file.
            records: of the epochs that it knows.
        """
        source = checkpoint.resolve().parents[1]
        if source != self.path.resolve():
            self.start_afresh()
            best = source / "checkpoints" / "best.pt"
            if best.is_file():
                shutil.copyfile(best, self.best)
        elif checkpoint.name != self.last.name and self.last.exists():
            with writing(self.last):  # otherwise it would become previous.pt, in the place of a good one
                self.last.replace(self.last.with_name("last.aside.pt"))
        self._remove_unfinished()
        self.write_metrics(records)

    def _remove_unfinished(self) -> None:
        for unfinished in (*self.path.glob("*.tmp"), *self.last.parent.glob("*.tmp")):
            with writing(unfinished):
                unfinished.unlink()

    def _probe(self) -> None:
        """Writes a file where checkpoints will lie: before hours of training, not after them."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        probe = folder / f"probe.{os.getpid()}.tmp"
        try:
            probe.write_bytes(b"can be written")
        finally:
            probe.unlink(missing_ok=True)

    def _locked(self) -> IO[str]:
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"--output {self.path}: another run is writing there") from None
        _LOCKS.add(lock)
        return lock

    def close(self) -> None:
        """Releases the lock (the end of the process does as well)."""
        self._lock.close()

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints.last

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric."""
        return self.checkpoints.best

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``.

        Raises:
            UserError: it cannot be written, unless the run is to carry on.
        """
        self.records.append(record)
        try:
            if self._torn:
                self.write_metrics(self.records)
            else:
                with writing(self._metrics) as path, path.open("a", encoding="utf-8") as file:
                    file.write(_json_line(record))
                    file.flush()
                    os.fsync(file.fileno())
            self._torn = False
        except UserError as error:
            self._torn = True
            if not self.carry_on:
                raise
            logger.error("%s; the run goes on (checkpoint.on_error)", error)

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replaces ``metrics.jsonl`` (a resumed run drops epochs that its checkpoint does not know)."""
        self.records = list(records)
        write_atomically(self._metrics, "".join(map(_json_line, records)))

    def finish(self) -> None:
        """Writes what could not be written while training went on.

        Raises:
            UserError: it cannot be written now either.
        """
        self.checkpoints.finish()
        if self._torn:
            self.write_metrics(self.records)

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_summary(self, summary: dict[str, Any]) -> None:
        """``summary.json``."""
        write_atomically(self.path / "summary.json", json.dumps(jsonable(summary), indent=2) + "\n")


_LOCKS: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _close_locks() -> None:
    # A lock belongs to whoever has the file open. A loader's worker outlives a killed run for a few seconds, in
    # which the run could not be started again.
    for lock in _LOCKS:
        lock.close()


os.register_at_fork(after_in_child=_close_locks)


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(jsonable(record)) + "\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``; a line that a killed process wrote in part is left out."""
    file = folder / "metrics.jsonl"
    records = []
    for line in file.read_text("utf-8", "replace").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records.append(record)
    return records


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """``path``; that it cannot be written (disk full, read-only) is an error of one line.

    Raises:
        UserError: see above.
    """
    try:
        yield path
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` so that ``path`` holds either the old or the new content, never a part.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def jsonable(value: Any) -> Any:
    """Tensors become numbers; numbers that JSON does not know become null."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    """Of what decides how numbers come out."""
    import timm

    return {
        "vkd_plugin": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "torchdistill": torchdistill.__version__,
        "timm": timm.__version__,
    }


def environment() -> dict[str, Any]:
    """Versions, git commit of the plugin's checkout (None outside of one) and the time, for ``summary.json``."""
    return {
        "versions": versions(),
        "git_commit": _git_commit(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
