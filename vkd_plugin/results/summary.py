"""What a run recorded of itself when it was finished."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_summary(file: Path) -> dict[str, Any]:
    """The contents of a ``summary.json``.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a run's summary: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a run's summary: no mapping")
    return found
