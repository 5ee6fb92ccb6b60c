"""What goes wrong in a dry step, noted at its place in the experiment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import Experiment
from ..engine.build import blame
from ..errors import BadValue, ConfigError, UserError
from .facts import Facts
from .fake import NEEDS_CONTENTS
from .places import leaves, refused_argument


class NeedsContents(Exception):
    """The result of an operation depends on what is in a tensor."""


class NeedsGPU(Exception):
    """An operation is not there for the CPU, on which a check runs."""


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
            self._add(self._refused(error, path) or error)
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
        texts = {at: value for at, value in leaves(self.below(path), path) if isinstance(value, str)}
        repeated = [at for at, value in texts.items() if len(value) > 2 and value in message]
        return max(repeated, key=lambda at: len(texts[at]), default=path)

    def _refused(self, error: ConfigError, path: tuple[str | int, ...]) -> ConfigError | None:
        """The error at the argument below ``path`` that a class does not take, if that is what ``error`` is about."""
        cause = error.__context__  # not __cause__: that is changed on the way
        found = refused_argument(cause) if isinstance(cause, TypeError) else None
        if found is None:
            return None
        name, message = found
        at = next((at for at, _ in leaves(self.below(path), path) if at[-1] == name), None)
        return self.experiment.error(message, *at) if at else None

    def below(self, path: tuple[str | int, ...]) -> Any:
        """What stands at ``path``; None where nothing does."""
        data: Any = self.experiment.data
        for part in path:
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                return None
        return data

    def _add(self, error: ConfigError) -> None:
        if str(error) not in map(str, self.facts.problems):  # several loaders may have one data set
            self.facts.problems.append(error)

    def problem(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path``."""
        self._add(self.experiment.error(" ".join(message.split()), *path))

    def warn(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path`` as a warning."""
        self.facts.warnings.append(str(self.experiment.error(message, *path)))
