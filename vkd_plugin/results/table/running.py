"""Running what a table lacks, one run after another; it can be stopped and continued, and shared by several."""

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console
from rich.text import Text

from vkd_plugin.engine.signals import STOP_SIGNALS, StoppedError
from vkd_plugin.errors import EXIT_DONE, EXIT_STOPPED, UserError

from .data import Run, Table
from .earlier import is_interrupted
from .measured import missing_runs, summary
from .soundness import check_experiments

PROGRAM = (sys.executable, "-m", "vkd_plugin")
"""What trains."""


def run_missing(table: Table, device: str | None = None, trust: Sequence[str] = ()) -> None:
    """Runs each row and seed that has no ``summary.json`` yet; one that was interrupted goes on.

    A run that fails does not keep the others from running. What another process is running is left to it: the same
    command given twice shares the work.

    Args:
        table: the table.
        device: ``--device`` of the runs.
        trust: ``--trust`` of the runs.

    Raises:
        ConfigErrors: rows do not fit their experiments; nothing was run.
        UserError: runs failed or were left to another process, a line each. What is done is not run again.
        StoppedError: a signal came, which the present run got too; the last line says which. Failures before it have
            lines of their own.
    """
    missing = missing_runs(table)
    check_experiments(missing, trust)
    console = Console(stderr=True, highlight=False)
    failures: list[str] = []
    busy: list[Run] = []
    with _Relay() as relay:
        for number, run in enumerate(missing, 1):
            if relay.stopped:
                raise StoppedError("\n".join([*failures, f"stopped before {run.name}; the same command goes on there"]))
            with _claim(run) as is_claimed:
                if not is_claimed or _is_locked(run.folder):
                    busy.append(run)
                    continue
                if summary(run) is not None:  # another process has come first
                    continue
                console.print(Text(f"[{number}/{len(missing)}] {run.name}"))
                resume = ["--resume", "auto"] if is_interrupted(run, trust) else []
                code = relay.run([*PROGRAM, *run.arguments, *passed_on(device, trust), *resume])
                if code == EXIT_DONE:
                    continue
                if code == EXIT_STOPPED or relay.stopped:
                    saved = " and saved" if code == EXIT_STOPPED else ""
                    line = f"{run.name}: stopped{saved}; the same command goes on from there"
                    raise StoppedError("\n".join([*failures, line]))
                if _is_locked(run.folder):  # started by hand or by a job at the same time
                    busy.append(run)
                else:
                    failures.append(f"{run.name}: the run ended with {_ending(code)}")
    failures += [
        f"{run.name}: another process was running it, and has not finished" for run in busy if summary(run) is None
    ]
    if failures:
        raise UserError("\n".join(failures))


def passed_on(device: str | None, trust: Sequence[str]) -> list[str]:
    """What ``run.py table`` hands on to every run."""
    return [*(["--device", device] if device is not None else []), *(x for name in trust for x in ("--trust", name))]


class _Relay:
    """Runs commands; while it is entered, the signals that stop a run go to the present one.

    Attributes:
        stopped: a signal has come; no more should be started.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Relay":
        self._before = {number: signal.signal(number, self._hand_on) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """The command's exit code; negative where a signal has ended it."""
        # In a session of its own: Ctrl-C would reach it twice otherwise, from the terminal and from here, and the
        # second signal ends a run at once.
        child = self._child = subprocess.Popen(command, start_new_session=True)
        if self.stopped:  # between the caller's look at it and the line above
            child.terminate()
        try:
            return child.wait()
        finally:
            self._child = None
            if child.poll() is None:
                child.kill()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.send_signal(number)


@contextmanager
def _claim(run: Run) -> Iterator[bool]:
    """Whether this process alone looks after the run now, among those that run tables.

    The run's own lock does not do: it begins with the run, after a look at what there is, and moves away with the
    folder of an earlier run.
    """
    path = run.folder.with_name(f".{run.folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write there: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_locked(folder: Path) -> bool:
    """Whether a run is writing there."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none yet
        return False
    return False


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"
