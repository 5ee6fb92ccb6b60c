"""What starting costs: help and wrong arguments import nothing beyond the standard library, a check what it needs.

Python itself says what was imported (``PYTHONPROFILEIMPORTTIME``), in the commands as they are typed.
"""

import argparse
import configparser
import dataclasses
import functools
import gc
import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import vkd_cli
import vkd_plugin.cli
from vkd_plugin.engine.run import Options

ROOT = Path(__file__).parent.parent
COMMANDS = ("check", "list", "table", "report", "export")
EXPERIMENT = "configs/fashion_mnist/ce/vit.yaml"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: what it said, and how often it and the processes below it imported each module."""

    code: int
    out: str
    err: str
    imported: Counter[str]

    @property
    def foreign(self) -> set[str]:
        """Packages that are neither Python's nor imported by every Python here."""
        packages = {name.partition(".")[0] for name in self.imported}
        return packages - {name.partition(".")[0] for name in bare().imported} - sys.stdlib_module_names


def ended(*arguments: str) -> Ended:
    """Python with these arguments, in the repository's folder."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines(keepends=True)
    imported = Counter(line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:"))
    assert imported["site"] == 1, "python does not say what it imports"
    said = "".join(line for line in lines if not line.startswith("import time:"))
    return Ended(done.returncode, done.stdout, said, imported)


@functools.cache
def bare() -> Ended:
    return ended("-c", "pass")


def installed() -> tuple[str, ...]:
    """What the installed ``vkd`` executes, by setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "vkd"
    assert module in config["options"]["py_modules"].split(), "the module would not be installed"
    return "-c", f"import sys; from {module} import {function}; sys.exit({function}())"


@pytest.mark.parametrize("program", [("run.py",), installed()], ids=["run.py", "vkd"])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_the_standard_library_alone(program: tuple[str, ...], command: str | None) -> None:
    words = [] if command is None else [command]
    shown = ended(*program, *words, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(" ".join(["usage: run.py", *words, "[-h]"]))
    assert shown.foreign == {"vkd_cli"}


WRONG = {
    "": "the following arguments are required: --config (see run.py --help)",
    "--confg c": "the following arguments are required: --config (see run.py --help)",
    "--config c --sed 1": "unrecognized arguments: --sed 1 (see run.py --help)",
    "--config c --seed -1": "argument --seed: -1 is not between 0 and 2**63 - 1 (see run.py --help)",
    "--config c --start_epoch -1": "argument --start_epoch: -1 is negative (see run.py --help)",
    "--config": "argument --config: expected one argument (see run.py --help)",
    "check": "the following arguments are required: CONFIG (see run.py check --help)",
    "list --nothing": "unrecognized arguments: --nothing (see run.py list --help)",
    "table t --run --slurm": "argument --slurm: not allowed with argument --run (see run.py table --help)",
    "report": "the following arguments are required: RUN (see run.py report --help)",
    "export r": "the following arguments are required: --to (see run.py export --help)",
    "tabel t": "no command 'tabel' (did you mean 'table'?); to train: run.py --config C",
    "train": "no command 'train' (choose from check, export, list, report, table); to train: run.py --config C",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_said_with_the_standard_library_alone(arguments: str) -> None:
    stopped = ended("run.py", *arguments.split())
    assert (stopped.code, stopped.out, stopped.err) == (2, "", f"error: {WRONG[arguments]}\n")
    assert stopped.foreign == {"vkd_cli"}


def test_the_version() -> None:
    shown = ended("run.py", "--version")
    assert shown.foreign == {"vkd_cli"}
    try:
        metadata.version("vkd-plugin")
    except metadata.PackageNotFoundError:
        assert (shown.code, shown.out) == (2, "")
        assert shown.err.startswith("error: vkd_plugin is not installed")
    else:
        assert (shown.code, shown.out) == (0, f"vkd_plugin {vkd_plugin.__version__}\n")


def test_a_check_imports_torch_once_and_nothing_for_other_experiments() -> None:
    """That ``imported`` would know is seen here too."""
    checked = ended("run.py", "check", EXPERIMENT)
    assert checked.code == 0, checked.err
    assert checked.imported["torch"] == checked.imported["vkd_plugin"] == 1
    assert {"torch", "torchdistill", "vkd_plugin", "vkd_cli"} <= checked.foreign
    needless = {"faster_coco_eval", "matplotlib", "onnx", "onnxruntime", "pandas", "plotly", "pycocotools", "scipy"}
    assert checked.foreign.isdisjoint(needless | {"sklearn", "tensorboard", "tensorflow"})


def test_what_is_imported_is_left_alone_by_the_garbage_collector() -> None:
    code = "import gc, vkd_cli; done = vkd_cli.main(); print(done, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    shown = ended("-c", code, "list", "projectors")
    assert shown.out.splitlines()[-1] == "0 True True"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_of_others_is_theirs(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vkd_cli, "gc", None)  # no function of it is called
    (gc.enable if enabled else gc.disable)()
    try:
        assert vkd_cli.main(["list", "projectors"]) == 0
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_arguments_reach_what_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str | None, dict[str, Any]]] = []

    def note(command: str | None, options: argparse.Namespace) -> int:
        given.append((command, vars(options)))
        return 75

    monkeypatch.setattr(vkd_plugin.cli, "perform", note)
    assert vkd_cli.main(["--config", "c", "--set", "a=1", "--set", "b=-1", "--resume", "-test_only"]) == 75
    assert vkd_cli.main(["check", "x", "y", "--trust", "p"]) == 75
    (train, options), check = given
    assert train is None
    assert (options["config"], options["overrides"], options["resume"]) == ("c", ["a=1", "b=-1"], "auto")
    assert (options["test_only"], options["seed"]) == (True, 0)
    assert options.keys() - {"world_size"} <= {field.name for field in dataclasses.fields(Options)}
    assert check == ("check", {"configs": ["x", "y"], "overrides": [], "trust": ["p"], "data": False, "json": False})


def test_each_command_has_a_parser_and_does_something() -> None:
    assert vkd_cli._PARSERS.keys() == vkd_plugin.cli._COMMANDS.keys() == set(COMMANDS)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(vkd_plugin.cli, "perform", interrupted)
    assert vkd_cli.main(["list"]) == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
