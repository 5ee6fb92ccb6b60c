"""What the commands share that write small data sets into a folder."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder for what the block writes.

    Raises:
        UserError: it holds something, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; give a folder that is, or does not exist yet")
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write: {error.strerror or error}") from error


def parser(
    module: str, description: str, numbers: Iterable[tuple[str, int, str]], seed: str
) -> argparse.ArgumentParser:
    """Arguments ``DIR`` and ``--seed N``, and for each of ``numbers`` one of at least 1.

    Args:
        module: the command is ``python -m vkd_plugin.datasets.<module>``.
        description: of the command.
        numbers: name, default and meaning.
        seed: what it is the seed of.
    """
    found = argparse.ArgumentParser(prog=f"python -m vkd_plugin.datasets.{module}", description=description)
    found.add_argument("folder", metavar="DIR", type=Path, help="is made; has to be empty if it is there")
    for name, default, what in numbers:
        found.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what} ({default})")
    found.add_argument("--seed", type=int, default=0, metavar="N", help=f"of {seed} (0)")
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
