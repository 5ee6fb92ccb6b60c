"""Checks of the arguments that reach a class from YAML, said in the words of the YAML."""

from collections.abc import Collection

from .suggest import nearest


def one_of(kind: str, name: object, choices: Collection[str]) -> str:
    """``name``, if it is one of ``choices``.

    Raises:
        ValueError: it is not; the message names the nearest choice.
    """
    if not isinstance(name, str) or name not in choices:
        raise ValueError(f"no {kind} '{name}'{nearest(name, choices)}")
    return name


def number(name: str, value: object, *, at_least: float = 0.0, below: float = float("inf")) -> float:
    """``value`` as a float in [at_least, below).

    Raises:
        ValueError: it is no number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        # YAML 1.1 reads a bare 1e-5 as text, the commonest way to get here.
        hint = " (YAML reads 1e-5 as text; write 1.0e-5)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number, got {value!r}{hint}")
    if not at_least <= value < below:
        raise ValueError(f"{name} must lie in [{at_least:g}, {below:g}), got {value}")
    return float(value)
