"""The errors that a user causes, and the exit codes that they end in.

The command line turns each of them into one line on stderr, without a traceback.
"""

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_NOT_FINITE = 3
EXIT_STOPPED = 75


class UserError(Exception):
    """Something that the user can mend: a config, a flag, a checkpoint, a data folder (exit code 2).

    Attributes:
        spoken: with several processes, whether this one is to print it; None where that is not settled.
    """

    exit_code = EXIT_BAD_INPUT
    spoken: bool | None = None


class NotFiniteError(UserError):
    """Training stopped because a loss was not finite (exit code 3)."""

    exit_code = EXIT_NOT_FINITE


class ConfigError(UserError):
    """A mistake in an experiment file.

    Args:
        message: what is wrong, and the nearest right thing.
        where: ``FILE:LINE:COLUMN`` of the key or value to blame; left out where no line is.
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        self.message = message
        self.where = where
        super().__init__(f"{where}: {message}" if where else message)


class BadValue(ValueError):
    """A value that means nothing where it stands, e.g. the path of a module that does not exist.

    Args:
        message: what is wrong, and the nearest right thing.
        value: the value itself, by which its line in an experiment file is found.
    """

    def __init__(self, message: str, value: object) -> None:
        self.value = value
        super().__init__(message)
