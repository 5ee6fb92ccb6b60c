"""Images that cannot be read: the run stops and names them, or others take their place, and that is said.

The image may be read in a worker process, far from whoever counts and logs: :func:`replacements` collects there what
:func:`first_readable` says, and the engine sends it along with the batch.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from PIL import UnidentifiedImageError

from ..errors import UserError

logger = logging.getLogger(__name__)

ON_ERROR = ("stop", "skip")

# So many unreadable images in a row are no matter of images: a disk is gone, or rights have changed.
UNREADABLE_IN_A_ROW = 100

_told: ContextVar[list[str] | None] = ContextVar("told", default=None)

T = TypeVar("T")


def first_readable(
    place: int, count: int, path_of: Callable[[int], str], read: Callable[[int], T], on_error: str
) -> tuple[int, T]:
    """The image of a place, or with ``on_error: 'skip'`` of the next that can be read, which is told.

    Args:
        place: from 0.
        count: of all images; after the last comes the first.
        path_of: the file of a place.
        read: reads it; a ``UserError`` of its own says by itself what is wrong with the file.
        on_error: one of :data:`ON_ERROR`.

    Returns:
        Place and image.

    Raises:
        UserError: it cannot be read.
    """
    unreadable = ""
    attempts = min(UNREADABLE_IN_A_ROW, count)
    for step in range(attempts):
        taken = (place + step) % count
        try:
            image = read(taken)
        except MemoryError:
            raise
        except Exception as error:  # of damaged files Pillow raises whatever its parsers come upon
            own = isinstance(error, UserError)
            message = str(error) if own else f"{path_of(taken)}: cannot be read as an image: {_reason(error)}"
            if on_error == "stop":
                raise UserError(f"{message}; replace it, or give the data set on_error: 'skip'") from error
            unreadable = unreadable or message
            continue
        if unreadable:
            _tell(f"{unreadable}; {path_of(taken)} takes its place")
        return taken, image
    raise UserError(f"{unreadable}; nor can those that would take its place ({attempts} tried)")


@contextmanager
def replacements() -> Iterator[list[str]]:
    """Within the block, what :func:`first_readable` tells goes into the list that this gives."""
    found: list[str] = []
    token = _told.set(found)
    try:
        yield found
    finally:
        _told.reset(token)


def _tell(message: str) -> None:
    """Says, in a line, that a sample was replaced; where nobody collects it, it is logged."""
    found = _told.get()
    if found is None:
        logger.warning("%s", message)
    else:
        found.append(message)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty, or in no format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
