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
import subprocess
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
    path = Path(config)
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
        """Moves an earlier run that the folder holds aside, to the first free ``<folder>.<number>``."""
        if not (self.path / "config.yaml").exists():
            return
        moved = _free_name(self.path)
        self._lock.close()
        self.path.rename(moved)
        self.__init__(self.path)  # type: ignore[misc]
        logger.info("%s holds an earlier run; moved to %s", self.path, moved)

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
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(jsonable(record)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """What ``metrics.jsonl`` holds so far."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replaces ``metrics.jsonl`` (a resumed run drops epochs that its checkpoint does not know)."""
        text = "".join(json.dumps(jsonable(record)) + "\n" for record in records)
        write_atomically(self.path / "metrics.jsonl", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """``summary.json``."""
        write_atomically(self.path / "summary.json", json.dumps(jsonable(summary), indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` so that ``path`` holds either the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
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
