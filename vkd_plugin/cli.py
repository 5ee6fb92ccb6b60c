"""The command line: ``python run.py --config C``, also installed as ``vkd``. Argument parsing only."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from .errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from .suggest import nearest


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser; flags that torchdistill's example scripts have keep their names and meanings."""
    p = _Parser(
        prog="run.py",
        description="Train and test the experiment that a YAML file describes. Also: run.py table TABLE [--run].",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--config", required=True, metavar="C", help="experiment file (YAML)")
    add(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b.c=value",
        help="override a value (YAML); repeatable",
    )
    add("--output", metavar="DIR", help="output folder (default: runs/<path of the config below configs/>)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from the last checkpoint, or from PATH",
    )
    add("--allow-config-change", action="store_true", help="resume although the experiment has changed")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--seed", type=_seed, default=0, metavar="N", help="root of all randomness (default: 0)")
    add("--run_log", metavar="F", help="write the log to this file as well")
    add("--start_epoch", type=_count, default=0, metavar="N", help="first epoch (counted from 0)")
    add("-test_only", action="store_true", help="test without training")
    add("-student_only", action="store_true", help="test the student only")
    add("-adjust_lr", action="store_true", help="multiply learning rates by the number of processes")
    add("-log_config", action="store_true", help="log the resolved configuration")
    add("-disable_cudnn_benchmark", action="store_true", help="do not let cuDNN choose algorithms by timing")
    add(
        "--world_size",
        type=int,
        default=1,
        metavar="N",
        help="accepted for torchdistill; the launcher's value counts",
    )
    add("--dist_url", default="env://", metavar="U", help="how processes meet")
    return p


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _table_parser() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py table", description="Print a table of runs; --run runs what is missing.")
    add = p.add_argument
    add("table", metavar="TABLE", help="table file (YAML), e.g. configs/tables/digits.yaml")
    add("--run", action="store_true", help="first run the rows and seeds that have no result yet")
    add("--device", help="passed to the runs")
    add("--md", action="store_true", help="print Markdown")
    return p


def _train(argv: Sequence[str]) -> int:
    options = vars(parser().parse_args(argv))
    options.pop("world_size")
    from .engine.run import Options, run  # here: what only training needs

    return run(Options(**options))


def _table(argv: Sequence[str]) -> int:
    options = _table_parser().parse_args(argv)
    from .results.table import load_table, print_table, run_missing

    table = load_table(options.table)
    if options.run:
        run_missing(table, options.device)
    print_table(table, options.md)
    return EXIT_DONE


_COMMANDS = {"table": _table}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors that the user can mend become one line on stderr.

    Returns:
        The exit code: 0 done, 2 bad input, 3 the loss was not finite.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0].startswith("-"):
            return _train(arguments)
        command, *rest = arguments
        if command not in _COMMANDS:
            raise UserError(f"no command '{command}'{nearest(command, _COMMANDS)}; to train: run.py --config C")
        return _COMMANDS[command](rest)
    except UserError as error:
        if error.spoken if error.spoken is not None else os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while setting up or testing; training saves first (exit code 75)
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if argv is None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; the interpreter's end is not to be cut off
