"""The command line: ``python run.py [COMMAND] ...``, also installed as ``vkd``. Argument parsing only.

This module stands beside the package, not in it: importing any part of :mod:`vkd_plugin` registers the whole with
torchdistill, and that takes seconds. Help, and what is wrong with the arguments, are said before, with the standard
library alone. What the commands do is in :mod:`vkd_plugin.cli`.
"""

import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

_EXIT_BAD_INPUT = 2  # vkd_plugin.errors.EXIT_BAD_INPUT, which cannot be imported without the rest


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints the version; only then are the metadata of installed packages looked for."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        from importlib import metadata

        try:
            print(f"vkd_plugin {metadata.version('vkd-plugin')}")
        except metadata.PackageNotFoundError:
            parser.error("vkd_plugin is not installed, so that its version is not known: pip install -e .")
        parser.exit()


def _train() -> argparse.ArgumentParser:
    """Flags that torchdistill's example scripts have keep their names and meanings."""
    p = _Parser(
        prog="run.py",
        description="Train and test the experiment that a YAML file describes.",
        epilog=f"Also: run.py {'|'.join(_PARSERS)} --help.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--config", required=True, metavar="C", help="experiment file (YAML)")
    _add_overrides(p)
    _add_trust(p)
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
    add("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")
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


def _add_overrides(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b.c=value",
        help="override a value (YAML); repeatable",
    )


def _add_trust(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the YAML run this package's code (docs/trust.md); repeatable",
    )


def _check() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py check", description="Find what is wrong with experiment files, without data or GPU.")
    add = p.add_argument
    add("configs", nargs="+", metavar="CONFIG", help="experiment file (YAML)")
    _add_overrides(p)
    _add_trust(p)
    add("--data", action="store_true", help="data sets have to be here, and their first samples readable")
    add("--json", action="store_true", help="print one JSON object per file instead of a page")
    return p


def _list() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py list", description="What an experiment can name; with a NAME, YAML to paste.")
    add = p.add_argument
    add("kind", nargs="?", metavar="KIND", help="losses, models, projectors, ... (default: all kinds)")
    add("name", nargs="?", metavar="NAME", help="one component: its arguments and a YAML snippet")
    add("--import", dest="packages", action="append", default=[], metavar="PACKAGE", help="list what it registers too")
    add("--json", action="store_true", help="for machines")
    return p


def _table() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py table", description="Print a table of runs beside the published figures.")
    add = p.add_argument
    add("table", metavar="TABLE", help="table file (YAML), e.g. configs/tables/digits.yaml")
    add("--runs", metavar="FOLDER", help="where the tables' runs are (default: runs/tables)")
    add("--device", help="passed to the runs")
    _add_trust(p)
    action = p.add_mutually_exclusive_group()
    action.add_argument("--run", action="store_true", help="first run the rows and seeds that have no result yet")
    action.add_argument("--slurm", action="store_true", help="print a Slurm job array that runs what is missing")
    form = p.add_mutually_exclusive_group()
    for name, help_text in (("md", "Markdown"), ("csv", "CSV"), ("html", "an HTML table")):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print {help_text}")
    return p


def _report() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py report", description="Write a self-contained HTML page about one or several runs.")
    add = p.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folder of a run")
    add("--output", metavar="FILE", help="the page (default: report.html in the only run's folder, else here)")
    add("--no-figures", action="store_true", help="only what is recorded; load no model and no data")
    add("--device", default="cpu", help="where figures are computed (default: cpu)")
    _add_trust(p)
    return p


def _export() -> argparse.ArgumentParser:
    p = _Parser(prog="run.py export", description="Write a run's student as safetensors with config and model card.")
    add = p.add_argument
    add("run", metavar="RUN", help="output folder of a run")
    add("--to", required=True, metavar="DIR", help="the folder to make")
    add("--checkpoint", default="best", metavar="best|last|PATH", help="which weights (default: best)")
    add("--ema", action="store_true", help="the EMA's weights")
    add("--onnx", action="store_true", help="write model.onnx as well, proved equal on onnxruntime")
    add("--opset", type=int, metavar="N", help="of ONNX (default: the exporter's)")
    _add_trust(p)
    return p


_PARSERS = {"check": _check, "list": _list, "table": _table, "report": _report, "export": _export}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors that the user can mend become one line on stderr.

    Args:
        argv: the arguments; those of the process by default, which is then expected to end with the result.

    Returns:
        The exit code: 0 done, 2 bad input, 3 the loss was not finite, 75 stopped after saving.

    Raises:
        SystemExit: from the parser, after help (0) and for arguments that do not fit (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    try:
        if command is not None and command not in _PARSERS:
            print(f"error: no command '{command}'{_nearest(command)}; to train: run.py --config C", file=sys.stderr)
            return _EXIT_BAD_INPUT
        parser = _train() if command is None else _PARSERS[command]()
        options = parser.parse_args(arguments)
        with _lasting(argv is None):
            from vkd_plugin.cli import perform  # here: only now is torch needed

        return perform(command, options)
    except BrokenPipeError:  # `run.py list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # while setting up or testing; training saves first (exit code 75)
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if argv is None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; the interpreter's end is not to be cut off


@contextmanager
def _lasting(own: bool) -> Iterator[None]:
    """For imports, which make half a million objects that stay: the garbage collector does not look through them.

    It does so neither meanwhile nor later, up to the process's end. Data loaders' workers, which are forked, then share
    them instead of copying each that their own collector has looked at.

    Args:
        own: whether the process is ours; another's collector is left as it is.
    """
    if own:
        gc.disable()
    try:
        yield
    finally:
        if own:
            gc.enable()
            gc.freeze()


def _nearest(command: str) -> str:
    """``vkd_plugin.suggest.nearest`` for commands, which cannot be imported without the rest."""
    import difflib

    close = difflib.get_close_matches(command.lower(), _PARSERS, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (choose from {', '.join(sorted(_PARSERS))})"
