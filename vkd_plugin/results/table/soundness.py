"""Whether the rows of a table fit their experiments, before hours are spent on the first."""

from collections.abc import Iterable, Sequence

from vkd_plugin.config.problems import FLAG, ConfigErrors, Problems

from .data import Row, Run


def check_experiments(runs: Iterable[Run], trusted: Sequence[str] = ()) -> None:
    """Reads the experiments of ``runs``, overrides applied; nothing in them is executed.

    Raises:
        ConfigErrors: all that is wrong, at its place in the table or the experiment.
    """
    from vkd_plugin.config.experiment import resolve  # here: printing a table needs no torch
    from vkd_plugin.config.trust import Trust

    problems = Problems()
    for run in {run.row.slug: run for run in runs}.values():  # seeds differ in nothing
        try:
            resolve(run.config, run.row.overrides, Trust(trusted))
        except ConfigErrors as errors:
            for problem in errors.problems:
                where = _place_in_table(run.row, problem.where)
                problems.add(str(problem) if where else problem.message, where or problem.where)
    problems.raise_if_any()


def _place_in_table(row: Row, where: str | None) -> str | None:
    """Where the override stands that a problem is blamed on; None if it is the experiment's own."""
    for override, place in zip(row.overrides, row.set_at, strict=True):
        if where == FLAG + " ".join(override.split()):
            return place
    return None
