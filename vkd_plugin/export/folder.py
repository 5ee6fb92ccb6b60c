"""A folder that is there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def check_target(target: Path) -> None:
    """That a folder can be made at ``target``, or an empty one taken.

    Raises:
        UserError: something is there.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"--to {target}: is not empty; choose another folder")
        if target.samefile(Path.cwd()):
            raise UserError(f"--to {target}: is the working folder; choose another")
    elif target.exists() or target.is_symlink():
        raise UserError(f"--to {target}: is no folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder nearby, which gets the name ``target`` at the end of the block, unless that fails.

    Raises:
        UserError: the disk refuses.
    """
    check_target(target)
    real = target.resolve()
    above = next(path for path in real.parents if path.exists())
    temporary = above / f".{real.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        real.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(real)
    except OSError as error:
        raise UserError(f"--to {target}: cannot write there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
