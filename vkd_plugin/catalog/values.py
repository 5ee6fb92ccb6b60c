"""Python values as an experiment file has them."""

import enum
import inspect
import math
import re
import sys
from pathlib import PurePath
from typing import Any

import torch


def public_name(target: Any) -> str | None:
    """The shortest dotted name under which ``target`` can be imported; None for what is defined in a function."""
    name, module = getattr(target, "__qualname__", ""), getattr(target, "__module__", None)
    if not name.isidentifier() or not isinstance(module, str):
        return None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        if getattr(sys.modules.get(parent), name, None) is target:
            return f"{parent}.{name}"
    return None


def literal(value: Any) -> str | None:
    """``value`` in YAML, on one line; None if YAML cannot have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, enum.Enum):
        owner = public_name(type(value))
        return f"!getattr [!import_get {{key: '{owner}'}}, '{value.name}']" if owner else None
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str | PurePath):
        return quoted(str(value))
    if isinstance(value, list | tuple | set | frozenset):
        items = [literal(item) for item in value]
        return None if None in items else f"[{', '.join(str(item) for item in items)}]"
    if isinstance(value, dict):
        pairs = [(literal(key), literal(item)) for key, item in value.items()]
        return None if any(None in pair for pair in pairs) else f"{{{', '.join(f'{k}: {v}' for k, v in pairs)}}}"
    if isinstance(value, torch.dtype):
        return f"!import_get {{key: '{value}'}}"
    name = public_name(value) if inspect.isclass(value) or inspect.isroutine(value) else None
    return f"!import_get {{key: '{name}'}}" if name else None


def short(value: Any) -> str:
    """``value`` for a reader: as YAML, but a name where YAML would take a tag."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(getattr(value, "__name__", value))
    if isinstance(value, torch.dtype):
        return str(value)
    return literal(value) or "..."


def quoted(text: str) -> str:
    """``text`` as a YAML string."""
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def _number(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    # YAML 1.1 reads 1e-05, without a point, as text.
    return re.sub(r"^(-?\d+)e", r"\1.0e", repr(float(value)))
