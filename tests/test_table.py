"""Tables of runs: reading, running what is missing, printing; mistakes have a line."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vkd_plugin.cli import main
from vkd_plugin.engine.records import read_metrics
from vkd_plugin.results.table import load_table

GOOD = """\
title: 'A table'
metric: 'test.student.top1'
seeds: [0, 1]
rows:
  - name: 'Plain, no teacher'
    config: '{config}'
  - name: 'With teacher'
    config: '{config}'
    set: ['train.num_epochs=1']
"""


@pytest.fixture
def table_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text("{}\n")
    file = Path("table.yaml")
    file.write_text(GOOD.format(config="experiment.yaml"))
    return file


def _finish(folder: Path, top1: float) -> None:
    folder.mkdir(parents=True)
    summary = {"test": {"student": {"top1": top1}}, "wall_seconds": 90}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_rows_without_a_run_show_their_command(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(table_file)]) == 0
    out = capsys.readouterr().out
    assert (
        "to run: python run.py --config experiment.yaml --set train.num_epochs=1 --seed 1 "
        "--output runs/tables/table/with-teacher/seed1"
    ) in out


def test_mean_and_deviation(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_table(table_file)
    _finish(table.folder(table.rows[0], 0), 90.0)
    _finish(table.folder(table.rows[0], 1), 92.0)
    _finish(table.folder(table.rows[1], 0), 95.0)
    assert main(["table", str(table_file), "--md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| Plain, no teacher | 91.00 ± 1.41 | 2 | 1.5 |"
    assert lines[3] == "| With teacher | 95.00 | 1 | 1.5 |"


def test_run_stops_at_a_row_that_fails(table_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(table_file), "--run"]) == 2
    err = capfd.readouterr().err
    assert "error: Plain, no teacher, seed 0: the run ended with exit code 2" in err


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("metric:", "metrik:", 2, "unknown key 'metrik' in a table (did you mean 'metric'?)"),
        ("title: 'A table'\n", "", 1, "a table needs 'title'"),
        (
            "config: '{config}'\n    set",
            "config: 'missing.yaml'\n    set",
            8,
            "no experiment file 'missing.yaml'",
        ),
        ("[0, 1]", "['a']", 3, "'seeds' should be a list of integers"),
        ("With teacher", "plain no teacher", 7, "two rows are named 'plain no teacher'"),
        ("['train.num_epochs=1']", "'train.num_epochs=1'", 9, "'set' should be a list of 'a.b.c=value'"),
        ("title: 'A table'", "title: 'A table", 2, ""),
    ],
)
def test_mistakes_have_a_line(
    table_file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, message: str
) -> None:
    assert old in GOOD
    table_file.write_text(GOOD.replace(old, new, 1).format(config="experiment.yaml"))
    assert main(["table", str(table_file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: table.yaml:{line}: {message}")
    assert err.count("\n") == 1


def test_a_missing_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: No such file or directory\n"


def test_an_unknown_metric(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table_file.write_text(table_file.read_text().replace("student.top1", "student.top_1"))
    table = load_table(table_file)
    _finish(table.folder(table.rows[0], 0), 90.0)
    assert main(["table", str(table_file)]) == 2
    assert "the runs' summary.json has no 'top_1' (did you mean 'top1'?)" in capsys.readouterr().err


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tabel"]) == 2
    assert capsys.readouterr().err == (
        "error: no command 'tabel' (did you mean 'table'?); to train: run.py --config C\n"
    )


def test_an_interrupted_table_goes_on_in_the_middle_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[1] / "configs" / "digits" / "ce" / "vit.yaml"
    shorter = "['train.num_epochs=6', 'datasets.digits/train.init.kwargs.fraction=0.3']"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("table.yaml").write_text(
        "title: 'A table'\nmetric: 'test.student.top1'\nseeds: [0]\n"
        f"rows:\n  - {{name: 'one', config: '{config}', set: {shorter}}}\n"
    )
    command = ["table", "table.yaml", "--run", "--device", "cpu"]
    folder = Path("runs", "tables", "table", "one", "seed0")

    def interrupt() -> None:
        while not read_metrics(folder):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert main(command) == 75
    thread.join()
    expected = "error: one, seed 0: stopped and saved; the same command goes on from there"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    done = len(read_metrics(folder))
    assert main(command) == 0
    assert done < len(read_metrics(folder)) == 6
    assert json.loads((folder / "summary.json").read_text())["resumed"] == 1
