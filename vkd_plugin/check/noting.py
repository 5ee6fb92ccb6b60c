"""What goes wrong in a dry step, noted at its place in the experiment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import Experiment
from ..engine.build import blame
from ..errors import BadValue, ConfigError, UserError
from .facts import Facts
from .fake import NEEDS_CONTENTS


class NeedsContents(Exception):
    """The result of an operation depends on what is in a tensor."""


class NeedsGPU(Exception):
    """An operation is not there for the CPU, on which a check runs."""


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """``(path, value)`` of all that is neither a mapping nor a list in ``data``, which stands at ``path``."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    else:
        yield path, data


class Notes:
    """Collects problems and warnings.

    Args:
        experiment: whose lines are blamed.
        facts: where they go.
        real: whether tensors have contents.

    Attributes:
        is_doubtful: whether something failed that might not with contents.
    """

    def __init__(self, experiment: Experiment, facts: Facts, real: bool) -> None:
        self.experiment = experiment
        self.facts = facts
        self.real = real
        self.is_doubtful = False

    @contextmanager
    def collecting(self, *path: str | int) -> Iterator[None]:
        """Notes what goes wrong as a problem at ``path``, and goes on."""
        try:
            with self.blaming(*path):
                yield
        except ConfigError as error:
            self.facts.problems.append(error)
        except UserError as error:
            self.problem(str(error), *self._repeated(str(error), path))

    @contextmanager
    def blaming(self, *path: str | int) -> Iterator[None]:
        """Has what goes wrong be an error at ``path``.

        Raises:
            NeedsContents, NeedsGPU: it might not go wrong elsewhere.
        """
        with blame(self.experiment, *path):
            try:
                yield
            except NEEDS_CONTENTS as error:
                if self.real:
                    raise
                raise NeedsContents from error
            except (UserError, BadValue):
                raise
            except Exception as error:
                if isinstance(error, RuntimeError | AssertionError) and "cuda" in str(error).lower():
                    raise NeedsGPU(str(error)) from error
                self.is_doubtful = True
                if isinstance(error, AssertionError):  # so libraries check their arguments
                    raise ValueError(str(error)) from error
                raise

    def _repeated(self, message: str, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Where the text stands below ``path`` that ``message`` repeats, such as a file's name; else ``path``."""
        data: Any = self.experiment.data
        for part in path:
            data = data[part] if isinstance(data, dict | list) else None
        found = [
            at for at, value in leaves(data, path) if isinstance(value, str) and len(value) > 2 and value in message
        ]
        return found[0] if found else path

    def problem(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path``."""
        self.facts.problems.append(self.experiment.error(message, *path))

    def warn(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path`` as a warning."""
        self.facts.warnings.append(str(self.experiment.error(message, *path)))
