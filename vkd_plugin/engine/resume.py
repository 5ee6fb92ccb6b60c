"""Going on from a checkpoint: which one, and whether it is of the same experiment."""

import logging
import os
from pathlib import Path
from typing import Any

from ..config import Experiment
from ..config.changes import Change, changes, sentence
from ..errors import UserError
from .checkpoint import LAST, has_checkpoint, read_newest
from .processes import job, restarted_job
from .records import versions, write_atomically

logger = logging.getLogger("vkd_plugin")

_JOB = ".job"


def find_checkpoint(resume: str | None, output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``--resume`` means, and what it holds; None if the run is to begin from the start.

    A job that torchrun has started again (``--max-restarts``) goes on from its own last checkpoint, asked or not;
    not from one of an earlier job in the same folder, which it may have had no time to move aside.

    Args:
        resume: ``auto``, a file, or None.
        output: the run's folder.

    Raises:
        UserError: there is no such file, or none that can be read.
    """
    last = output / "checkpoints" / LAST
    own = has_checkpoint(last)
    if own and is_own_folder(output):
        return read_newest(last)
    if resume is None:
        return None
    if resume == "auto":
        return read_newest(last) if own else None
    file = Path(os.path.expanduser(resume))
    if not file.is_file() and not (file.name == LAST and has_checkpoint(file)):
        raise UserError(f"--resume {file}: no such file")
    return read_newest(file)


def is_own_folder(output: Path) -> bool:
    """Whether this job, started again by torchrun, has written the run in the folder."""
    restarted = restarted_job()
    try:
        return restarted is not None and (output / _JOB).read_text("utf-8") == restarted
    except OSError:
        return False


def sign_folder(output: Path) -> None:
    """Notes which job writes the run in the folder, for :func:`is_own_folder`."""
    name = job()
    if name is not None:
        write_atomically(output / _JOB, name)
    else:
        (output / _JOB).unlink(missing_ok=True)


def changed_parts(
    source: Path, state: dict[str, Any], experiment: Experiment, seed: int, allowed: bool
) -> tuple[str, ...]:
    """Compares the experiment with that of a checkpoint.

    Args:
        source, state: the checkpoint.
        experiment, seed: the present ones.
        allowed: ``--allow-config-change``.

    Returns:
        ``optimizer`` and ``scheduler``, whichever are not what they were.

    Raises:
        UserError: something has changed, and that is not allowed; the line names the keys.
    """
    try:
        found = changes(state["config"], experiment)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if state["seed"] != seed:
        found.append(Change("--seed", str(state["seed"]), str(seed)))
    if found and not allowed:
        raise UserError(
            f"{source}: the experiment has changed since: {sentence(found)} (--allow-config-change goes on with it)"
        )
    if found:
        logger.warning("going on from %s with a changed experiment: %s", source, sentence(found, show=20))
    before, now = state["versions"], versions()
    for name in ("torch", "torchvision"):
        if before.get(name) != now[name]:
            logger.warning("%s was written with %s %s, this is %s", source, name, before.get(name), now[name])
    return tuple(part for part in ("optimizer", "scheduler") if any(_is_in(change.key, part) for change in found))


def _is_in(key: str, part: str) -> bool:
    path = key.split(".")
    return path[0] == "train" and part in path[1:3]  # in train, or in a stage of it
