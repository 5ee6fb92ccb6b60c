"""What the commands do once :mod:`vkd_cli` has parsed their arguments; and its ``main``, the whole command line.

Each imports what only it needs.
"""

import os
import sys
from argparse import Namespace

from vkd_cli import main

from .errors import EXIT_DONE, UserError

__all__ = ["main", "perform"]


def perform(command: str | None, options: Namespace) -> int:
    """Runs a command; errors that the user can mend become lines on stderr.

    Args:
        command: its name; None is training.
        options: what the command's parser gave.

    Returns:
        The exit code.
    """
    try:
        return (_train if command is None else _COMMANDS[command])(options)
    except UserError as error:
        if error.spoken if error.spoken is not None else os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return error.exit_code


def _train(options: Namespace) -> int:
    from .engine.run import Options, run

    given = vars(options).copy()
    del given["world_size"]  # the launcher's counts
    return run(Options(**given))


def _check(options: Namespace) -> int:
    from .check import check

    return check(options.configs, options.overrides, options.trust, options.data, options.json)


def _list(options: Namespace) -> int:
    from .catalog import print_catalog

    return print_catalog(options.kind, options.name, options.packages, options.json)


def _table(options: Namespace) -> int:
    from .results.table import load_table, print_table, run_missing, slurm_script

    table = load_table(options.table, options.runs)
    if options.slurm:
        print(slurm_script(table, options.device, options.trust), end="")
        return EXIT_DONE
    try:
        if options.run:
            run_missing(table, options.device, options.trust)
    finally:
        print_table(table, options.form)  # of a night's work too, if a run of it failed
    return EXIT_DONE


def _report(options: Namespace) -> int:
    from .results.report import write_report

    page = write_report(options.runs, options.output, not options.no_figures, options.device, options.trust)
    print(page)
    return EXIT_DONE


def _export(options: Namespace) -> int:
    from .export import export_run

    print(export_run(**vars(options)))
    return EXIT_DONE


_COMMANDS = {"check": _check, "list": _list, "table": _table, "report": _report, "export": _export}
