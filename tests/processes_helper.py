"""Processes that a test has started."""

import time
from typing import Any


def wait_for(context: Any, seconds: float) -> None:
    """Until all of them have ended, of a context of ``torch.multiprocessing``; none is left behind.

    Raises:
        AssertionError: they take longer than ``seconds``.
        Exception: what one of them has raised.
    """
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
