"""What goes wrong in a dry step, noted at its place in the experiment."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import Experiment
from ..engine.build import blame
from ..errors import BadValue, ConfigError, UserError
from .facts import Facts
from .fake import NEEDS_CONTENTS


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
            self.facts.problems.append(error)
        except UserError as error:
            self.problem(str(error), *path)

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
                raise

    def problem(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path``."""
        self.facts.problems.append(self.experiment.error(message, *path))

    def warn(self, message: str, *path: str | int) -> None:
        """Notes ``message`` at ``path`` as a warning."""
        self.facts.warnings.append(str(self.experiment.error(message, *path)))
