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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
import torchdistill
import torchvision

from .. import __version__
from ..errors import UserError

logger = logging.getLogger("vkd_plugin")


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

    Raises:
        UserError: another process writes there, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            (path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {path}: cannot write there: {error.strerror or error}") from error

    def start_afresh(self) -> None:
        """Moves an earlier run that the folder holds aside, to the first free ``<folder>.<number>``.

        Raises:
            UserError: it cannot be moved, or is the working folder, which paths in the configuration start from; or
                it holds a ``config.yaml`` of somebody else's.
        """
        if not (self.path / "config.yaml").exists():
            return
        if not (self.path / "log.txt").exists():
            raise UserError(f"--output {self.path}: holds a config.yaml that is not a run's; choose another folder")
        real = self.path.resolve()  # behind a link, the folder moves and the link stays
        if Path.cwd().is_relative_to(real):
            raise UserError(f"--output {self.path}: the working folder holds an earlier run; choose another")
        moved, lock = _free_name(real), self._lock
        try:
            real.rename(moved)
            real.mkdir()
        except OSError as error:
            raise UserError(f"--output {self.path}: cannot move the earlier run: {error.strerror or error}") from error
        self.__init__(self.path)  # type: ignore[misc]
        lock.close()
        logger.info("%s holds an earlier run; moved to %s", self.path, moved)

    def go_on(self, checkpoint: Path, epoch: int) -> list[dict[str, Any]]:
        """Makes the folder what it was after ``epoch`` epochs of the run that ``checkpoint`` is from.

        Epochs that the checkpoint does not know are dropped, and files that a killed process left unfinished. If it
        is another folder's, its run goes on here, and a run that this folder holds is moved aside.

        Returns:
            The records of ``metrics.jsonl``.
        """
        source = checkpoint.resolve().parents[1]
        records = [record for record in read_metrics(source) if record["epoch"] <= epoch]
        if source != self.path.resolve():
            self.start_afresh()
            best = source / "checkpoints" / "best.pt"
            if best.is_file():
                shutil.copyfile(best, self.best)
        for unfinished in self.last.parent.glob("*.tmp"):
            unfinished.unlink()
        self.write_metrics(records)
        return records

    def _locked(self) -> IO[str]:
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"--output {self.path}: another run is writing there") from None
        return lock

    def close(self) -> None:
        """Releases the lock (the end of the process does as well)."""
        self._lock.close()

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric."""
        return self.path / "checkpoints" / "best.pt"

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        with writing(self.path / "metrics.jsonl") as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record)) + "\n")

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replaces ``metrics.jsonl`` (a resumed run drops epochs that its checkpoint does not know)."""
        text = "".join(json.dumps(jsonable(record)) + "\n" for record in records)
        write_atomically(self.path / "metrics.jsonl", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """``summary.json``."""
        write_atomically(self.path / "summary.json", json.dumps(jsonable(summary), indent=2) + "\n")


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
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


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


def environment() -> dict[str, Any]:
    """Versions, git commit of the plugin's checkout (None outside of one) and the time, for ``summary.json``."""
    import timm

    return {
        "versions": {
            "vkd_plugin": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "torchdistill": torchdistill.__version__,
            "timm": timm.__version__,
        },
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
