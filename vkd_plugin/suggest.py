"""The nearest right thing, for error messages."""

import difflib
from collections.abc import Iterable


def closest(name: object, candidates: Iterable[object]) -> str | None:
    """The candidate that ``name`` may be a misspelling of; None where none is near."""
    lower = {str(c).lower(): str(c) for c in candidates}
    found = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def nearest(name: object, candidates: Iterable[object], show: int = 8) -> str:
    """A clause to append to a message: `` (did you mean 'x'?)``, or the choices where nothing is near.

    Args:
        name: what the user wrote.
        candidates: what would have been right.
        show: list at most this many candidates where none is near ``name``.
    """
    names = sorted({str(c) for c in candidates})
    close = closest(name, names)
    if close is not None:
        return f" (did you mean '{close}'?)"
    if not names:
        return ""
    more = ", ..." if len(names) > show else ""
    return f" (choose from {', '.join(names[:show])}{more})"
