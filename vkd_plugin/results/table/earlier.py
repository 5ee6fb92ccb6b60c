"""What the folder of a run that has no result yet holds from before."""

from collections.abc import Sequence

from vkd_plugin.errors import UserError

from .data import Run


def is_interrupted(run: Run, trusted: Sequence[str] = ()) -> bool:
    """Whether it holds an unfinished run of the experiment that the row describes now."""
    from vkd_plugin.config.changes import changes  # here: printing a table needs no torch
    from vkd_plugin.config.experiment import Experiment, resolve
    from vkd_plugin.config.trust import Trust

    if (run.folder / "summary.json").exists() or not holds_checkpoint(run):
        return False
    try:
        root, _ = resolve(run.config, run.overrides, Trust(trusted))
        # Compared as text: building what the experiment describes could take minutes.
        return not changes((run.folder / "config.yaml").read_text("utf-8"), Experiment(run.config, root, {}))
    except (OSError, ValueError, UserError):
        return False


def holds_checkpoint(run: Run) -> bool:
    """Whether there is something to go on from, of whatever experiment."""
    from vkd_plugin.engine.checkpoint import LAST, has_checkpoint

    return has_checkpoint(run.folder / "checkpoints" / LAST)
