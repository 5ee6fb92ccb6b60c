"""Stopping on request: the step in hand is finished and saved first."""

import signal
from types import FrameType, TracebackType

from ..errors import EXIT_STOPPED, UserError


class StoppedError(UserError):
    """Stopped by a signal, after saving (exit code 75)."""

    exit_code = EXIT_STOPPED


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT only sets ``requested``; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
