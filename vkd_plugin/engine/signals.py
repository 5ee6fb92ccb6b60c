"""Stopping on request: the step in hand is finished and saved first.

What a scheduler sends before it takes a machine away: SIGTERM (Slurm, Kubernetes, torchrun), SIGUSR1 (Slurm's
``--signal=USR1@120``), and Ctrl-C's SIGINT.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from ..errors import EXIT_STOPPED, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_HANDED_ON_WITHIN = 2.0  # seconds

_END = b"\0"  # no signal has the number 0


class StoppedError(UserError):
    """Stopped by a signal, after saving (exit code 75)."""

    exit_code = EXIT_STOPPED


class StopRequest:
    """While it is entered, the first of ``STOP_SIGNALS`` only sets ``requested``; the second ends the process at once.

    A handler in Python runs between two instructions of the main thread, never within a call such as a collective
    that waits for a peer that is gone. Signals are therefore read in a thread of its own, from the pipe that the
    interpreter writes their numbers to as they come in (``signal.set_wakeup_fd``).

    A launcher hands a signal on that its processes may have got themselves (Slurm signals all processes of a step,
    torchrun and its own alike): the same one again within a moment is the same request there.

    Outside of the main thread nothing is done: there signals are somebody else's.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handed_on_within = _HANDED_ON_WITHIN if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._before: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._other_pipe = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        global _entered
        _entered = self
        reader, writer = self._pipe = os.pipe()
        os.set_blocking(writer, False)
        self._other_pipe = _own_pipe(writer)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None or self._thread is None:
            return
        global _entered
        _entered = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if isinstance(error, StoppedError) and self._handed_on_within:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, as another process has ended before
        reader, writer = self._pipe
        _own_pipe(self._other_pipe)
        os.write(writer, _END)  # closing it would not do: loaders' workers have it open too
        self._thread.join()
        os.close(reader)
        os.close(writer)
        self._before, self._pipe, self._thread = {}, None, None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _watch(self, reader: int) -> None:
        first: tuple[int, float] | None = None
        while _END not in (received := os.read(reader, 64)):
            for number in received:
                if number not in STOP_SIGNALS:
                    continue
                self.requested = True
                now = time.monotonic()
                if first is None:
                    first = number, now
                elif number != first[0] or now - first[1] > self._handed_on_within:
                    os._exit(128 + number)  # as a shell reports a process that a signal has ended


def _own_pipe(writer: int) -> int:
    return signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


_entered: StopRequest | None = None


def _in_child() -> None:
    """A forked process, such as a loader's worker, has no part in its parent's request."""
    global _entered
    request, _entered = _entered, None
    if request is None or threading.current_thread() is not threading.main_thread():
        return
    signal.set_wakeup_fd(-1)  # a Ctrl-C reaches it too, and would count as the parent's second signal
    for number, handler in request._before.items():
        # It can be terminated; Ctrl-C and USR1 to the whole group are for the parent, which still needs its batches.
        signal.signal(number, handler if number == signal.SIGTERM else signal.SIG_IGN)  # type: ignore[arg-type]
    request._pipe = None


os.register_at_fork(after_in_child=_in_child)
