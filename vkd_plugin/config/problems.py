"""What is wrong with an experiment file: every problem at once, one line each."""

from collections.abc import Iterable
from typing import TypeAlias

from vkd_plugin.errors import ConfigError

FLAG = "--set "
"""A place that begins so lies in an override, which has no lines."""

KeyPath: TypeAlias = tuple[object, ...]
"""The way to a value, e.g. ``('train', 'teacher', 'forward_hook', 'output', 0)``."""


def dotted(path: KeyPath) -> str:
    """``path`` as ``--set`` takes it: ``train.teacher.forward_hook.output.0``."""
    return ".".join(str(part) for part in path)


class ConfigErrors(ConfigError):
    """All that is wrong with an experiment file; ``str()`` has one line for each problem.

    Args:
        problems: at least one; ``message`` and ``where`` are those of the first.
    """

    def __init__(self, problems: Iterable[ConfigError]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems[0].message, self.problems[0].where)
        self.args = ("\n".join(str(problem) for problem in self.problems),)


class Problems:
    """Collects problems; a value that several places share by an anchor is blamed once.

    Attributes:
        warnings: what a user should know and the run survives, ``FILE:LINE:COLUMN: message`` each.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], ConfigError] = {}
        self.warnings: list[str] = []

    def add(self, message: str, where: str | None, path: KeyPath = ()) -> None:
        """Notes ``message`` about the value at ``path``, said at ``where``."""
        prefix = f"{dotted(path)}: " if path else ""
        # In an override, which has no columns, two values may stand at one place.
        key = (where, message, path if where is None or where.startswith(FLAG) else ())
        self._found.setdefault(key, ConfigError(prefix + message, where))

    def warn(self, message: str, where: str, path: KeyPath) -> None:
        """Notes ``message`` about the value at ``path`` without refusing the file."""
        warning = f"{where}: {dotted(path)}: {message}"
        if warning not in self.warnings:
            self.warnings.append(warning)

    def raise_if_any(self) -> None:
        """Raises ConfigErrors, in the order in which the problems were found."""
        if self._found:
            raise ConfigErrors(self._found.values())
