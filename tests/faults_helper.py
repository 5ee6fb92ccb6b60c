"""Starts ``python run.py`` a hundred times without importing torch a hundred times.

As a program it imports once what a run needs, and forks for each run that is asked for on its standard input. Such a
run is a process, session and process group of its own, which can be sent any signal and ends with its own exit code.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GENEROUS = 120.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Nursery:
    """Starts runs."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        self._asked("ready")

    def close(self) -> None:
        """Ends the server; runs are to have ended before."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(GENEROUS)

    def start(
        self,
        arguments: Sequence[str],
        err: Path,
        before: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> "Run":
        """A run with ``arguments``.

        Args:
            arguments: those of ``run.py``.
            err: a file for stdout and stderr.
            before: Python code to be executed first, which patches what is to go wrong.
            environment: more variables.
        """
        request = {"argv": list(arguments), "err": str(err), "before": before, "env": dict(environment or {})}
        return Run(self._asked(request), err, lambda pid: self._asked({"pid": pid}))

    def _asked(self, request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass
class Run:
    """A process that trains."""

    pid: int
    file: Path
    poll: Callable[[int], int | None]
    code: int | None = field(default=None)

    @property
    def err(self) -> str:
        """What it has said so far."""
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def ended(self) -> bool:
        """Whether it has."""
        if self.code is None:
            self.code = self.poll(self.pid)
        return self.code is not None

    def wait(self, timeout: float = GENEROUS) -> int:
        """Its exit code, negative where a signal has ended it."""
        try:
            until(self.ended, timeout)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.err}") from None
        assert self.code is not None
        return self.code

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        if not self.ended():
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Sends it and its children a signal, as a terminal's Ctrl-C does."""
        os.killpg(self.pid, number)

    def children(self) -> list[int]:
        """Processes that it has started: workers of its data loaders."""
        return children(self.pid)

    def says(self, text: str, timeout: float = GENEROUS) -> None:
        """Waits until it has said ``text``."""
        until(lambda: text in self.err or self.ended(), timeout)
        assert text in self.err, self.err


def until(condition: Callable[[], Any], timeout: float = GENEROUS) -> None:
    """Waits until ``condition()`` holds.

    Raises:
        TimeoutError: it does not.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


def _serve() -> dict[str, Any] | None:
    """Answers requests; returns one in the child that is to fulfil it, None at the end in the server."""
    import torch
    import torch.utils.tensorboard

    import vkd_plugin.engine.run  # noqa: F401
    from vkd_plugin.check.fake import Contents
    from vkd_plugin.datasets import Digits

    Digits("test")  # imports scikit-learn
    with torch.no_grad(), Contents(real=False)():  # imports what a check needs
        torch.nn.Linear(2, 2)(torch.zeros(1, 2))

    import frozen_helper  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request == "ready":
            answer = True
        elif "argv" in request:
            answer = os.fork()
            if not answer:
                return request
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def _fulfil(request: Mapping[str, Any]) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    sys.argv = ["run.py", *request["argv"]]
    exec(request["before"], {"__name__": "before"})
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    asked = _serve()
    if asked is not None:
        _fulfil(asked)
