"""The nearest right thing, for error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: object, candidates: Iterable[object], show: int = 8) -> str:
    """A clause to append to a message: `` (did you mean 'x'?)``, or the choices where nothing is near.

    Args:
        name: what the user wrote.
        candidates: what would have been right.
        show: list at most this many candidates where none is near ``name``.
    """
    names = sorted({str(c) for c in candidates})
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{lower[close[0]]}'?)"
    if not names:
        return ""
    more = ", ..." if len(names) > show else ""
    return f" (choose from {', '.join(names[:show])}{more})"
