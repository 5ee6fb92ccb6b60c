"""``run.py table --slurm``: a script that bash takes, run here as Slurm would with stand-ins for its commands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vkd_plugin.cli import main
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Run

EXPERIMENT = (Path(__file__).parent / "data" / "configs" / "supervised.yaml").read_text()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("c.yaml").write_text(EXPERIMENT)
    Path("a table.yaml").write_text(
        "title: 't $(touch title)'\nmetric: 'm'\nseeds: [0, 1]\nrows:\n  - {name: 'a', config: 'c.yaml'}\n"
        "  - {name: 'b `touch name`', config: 'c.yaml', set: ['_x=$HOME \"'''' ;']}\n"
        "  - {name: 'other', published: {value: 1, source: 's', verified: True}}\n"
    )
    return [*load_table("a table.yaml").all_runs()]


def _script(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["table", "a table.yaml", "--slurm", *flags]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def _execute(script: str, task: str, exit_code: int, folder: Path) -> tuple[int, list[list[str]]]:
    """The script's exit code, and the commands that it gave to srun and scontrol."""
    folder.mkdir()
    # What stops a run may reach the script's shell too, which has to live on.
    signals = 'kill -USR1 "$PPID"; kill -TERM "$PPID"' if exit_code == 75 else ":"
    for name, then in (("srun", f"{signals}; exit {exit_code}"), ("scontrol", "exit 0")):
        log = f'printf "%s\\0" {name} "$@" $\'\\n\' >> "{folder}/log"'
        (folder / name).write_text(f"#!/bin/bash\n{log}\n{then}\n")
        (folder / name).chmod(0o755)
    (folder / "job").write_text(script)
    slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "70", "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n"}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    # Slurm copies the script elsewhere and starts it in the folder of sbatch.
    code = subprocess.run(["bash", str(folder / "job")], env=environment, cwd="/", check=False).returncode
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    return code, [entry.split("\0")[:-1] for entry in log.split("\n\0") if entry]


def test_each_task_runs_a_row_and_seed(runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = _script(capsys, "--device", "cuda", "--trust", "some_package")
    assert re.findall("^#SBATCH --array=(.*)$", script, re.MULTILINE) == ["0-3"]
    for task, run in enumerate(runs):
        code, commands = _execute(script, str(task), 0, tmp_path / f"task{task}")
        (srun,) = (command for command in commands if command[0] == "srun")
        expected = [*run.arguments, "--device", "cuda", "--trust", "some_package", "--resume", "auto"]
        assert srun[2:] == ["-m", "vkd_plugin", *expected]
        assert os.access(srun[1], os.X_OK)
        assert code == 0
        assert ["scontrol", "requeue"] not in [command[:2] for command in commands]
    assert {path.name for path in Path.cwd().iterdir()} == {"a table.yaml", "c.yaml"}
    assert _execute(script, "4", 0, tmp_path / "task4") == (2, [])


def test_a_run_that_has_saved_comes_back_into_the_queue(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _script(capsys)
    code, commands = _execute(script, "3", 75, tmp_path / "stopped")
    assert code == 75
    assert commands[-1] == ["scontrol", "requeue", "70_3"]
    code, commands = _execute(script, "3", 3, tmp_path / "failed")
    assert code == 3
    assert commands[-1][0] == "srun"


def test_options_stand_at_the_top_and_gpus_are_asked_for_where_they_are_used(
    runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _script(capsys).splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[: lines.index(options[-1])])  # below a command they are ignored
    for option in (
        "--partition=PARTITION",
        "--requeue",
        "--signal=USR1@120",
        "--gpus-per-node=1",
        "--job-name=a-table",
    ):
        assert f"#SBATCH {option}" in options
    assert "--gpus" not in _script(capsys, "--device", "cpu")


def test_only_what_is_missing(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    for run in runs[:3]:
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text('{"m": 1, "wall_seconds": 1}')
    script = _script(capsys)
    assert "#SBATCH --array=0-0\n" in script
    assert shlex.join(runs[3].arguments) in script
    runs[3].folder.mkdir(parents=True)
    (runs[3].folder / "summary.json").write_text("{}")
    assert _script(capsys) == "#!/bin/bash\n# a table.yaml: nothing is missing.\n"


def test_a_folder_that_holds_another_experiment_is_in_the_way(
    runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1].folder / "checkpoints").mkdir(parents=True)
    (runs[1].folder / "checkpoints" / "last.pt").touch()
    (runs[1].folder / "config.yaml").write_text("train: {}")
    assert main(["table", "a table.yaml", "--slurm"]) == 2
    expected = f"error: {runs[1].folder}: another experiment than 'a' is now; move it away\n"
    assert capsys.readouterr().err == expected
