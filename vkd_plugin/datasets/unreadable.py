"""What a data set says of an image that it could not read and replaced.

The image may be read in a worker process, far from whoever counts and logs: :func:`replacements` collects there what
:func:`tell` says, and the engine sends it along with the batch.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger(__name__)

_told: ContextVar[list[str] | None] = ContextVar("told", default=None)


@contextmanager
def replacements() -> Iterator[list[str]]:
    """Within the block, what :func:`tell` says goes into the list that this gives."""
    found: list[str] = []
    token = _told.set(found)
    try:
        yield found
    finally:
        _told.reset(token)


def tell(message: str) -> None:
    """Says, in a line, that a sample was replaced; where nobody collects it, it is logged."""
    found = _told.get()
    if found is None:
        logger.warning("%s", message)
    else:
        found.append(message)
