"""``run.py table --run``: what is missing, in turn; failures, signals, and several at once."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vkd_plugin.cli import main
from vkd_plugin.engine.records import read_metrics
from vkd_plugin.results.table import load_table, running
from vkd_plugin.results.table.data import Run

ROOT = Path(__file__).parents[1]
STUB = (sys.executable, str(Path(__file__).with_name("table_helper.py")))
EXPERIMENT = (Path(__file__).parent / "data" / "configs" / "supervised.yaml").read_text()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each call of the stand-in for ``run.py``, a line each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "PROGRAM", STUB)
    for name in ("works", "fails", "dies", "waits", "early"):
        Path(f"{name}.yaml").write_text(EXPERIMENT)
    return tmp_path / "calls.txt"


def _table(*configs: str, seeds: str = "[0]") -> list[Run]:
    rows = "".join(f"  - {{name: 'row {n}', config: '{config}.yaml'}}\n" for n, config in enumerate(configs))
    Path("t.yaml").write_text(f"title: 't'\nmetric: 'm'\nseeds: {seeds}\nrows:\n{rows}")
    return [*load_table("t.yaml").all_runs()]


def _called(calls: Path) -> list[list[str]]:
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def _ran(calls: Path) -> list[str]:
    return [arguments[arguments.index("--output") + 1] for arguments in _called(calls)]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_what_is_missing_is_run_once(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = _table("works", "works", seeds="[0, 1]")
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "summary.json").write_text('{"m": 3, "wall_seconds": 60}')
    command = ["table", "t.yaml", "--run", "--device", "cpu", "--trust", "a", "--trust", "b"]
    assert main(command) == 0
    more = ["--device", "cpu", "--trust", "a", "--trust", "b"]
    assert _called(calls) == [[*run.arguments, *more] for run in (runs[0], runs[2], runs[3])]
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["[1/3] row 0, seed 0", "[2/3] row 1, seed 0", "[3/3] row 1, seed 1"]
    assert "4.00 ± 1.41" in captured.out
    assert main(command) == 0
    assert len(_called(calls)) == 3


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = _table("fails", "works", "dies", "works")
    assert main(["table", "t.yaml", "--run"]) == 2
    assert _ran(calls) == [str(run.folder) for run in runs]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: row 0, seed 0: the run ended with exit code 3",
        "error: row 2, seed 0: the run ended with SIGKILL",
    ]


def test_rows_that_do_not_fit_their_experiments_are_found_before_anything_runs(
    calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.yaml").write_text(EXPERIMENT.replace("num_epochs:", "num_epocs:"))
    Path("t.yaml").write_text(
        "title: 't'\nmetric: 'm'\nseeds: [0, 1]\nrows:\n  - {name: 'a', config: 'works.yaml'}\n"
        "  - {name: 'b', config: 'broken.yaml'}\n  - name: 'c'\n    config: 'works.yaml'\n"
        "    set: ['train.num_epochs=1', 'train.num_epocs=2']\n"
        "  - {name: 'd', config: 'works.yaml', set: ['nothing']}\n"
        "  - {name: 'e', config: 'works.yaml', set: ['train.num_epochs=x']}\n"
    )
    at = next(
        f"{number}:{line.index('num_epocs') + 1}"
        for number, line in enumerate(Path("broken.yaml").read_text().splitlines(), 1)
        if "num_epocs" in line
    )
    for action in ("--run", "--slurm"):
        assert main(["table", "t.yaml", action]) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"error: broken.yaml:{at}: train: unknown key 'num_epocs' (did you mean 'num_epochs'?)",
            "error: t.yaml:9:33: --set train.num_epocs=2: no key 'num_epocs' in train (did you mean 'num_epochs'?)",
            "error: t.yaml:10:45: --set nothing: expected PATH=VALUE, for example train.num_epochs=3",
            "error: t.yaml:11:45: --set train.num_epochs=x: "
            "train.num_epochs: expected a whole number of at least 0, got 'x'",
        ]
    assert not calls.exists()
    assert main(["table", "t.yaml"]) == 0


@pytest.mark.parametrize(("config", "saved"), [("waits", " and saved"), ("early", "")])
def test_a_signal_stops_run_and_table(calls: Path, capsys: pytest.CaptureFixture[str], config: str, saved: str) -> None:
    _table("fails", config, "works")

    def stop() -> None:
        while not Path("waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert main(["table", "t.yaml", "--run"]) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: row 0, seed 0: the run ended with exit code 3",
        f"error: row 1, seed 0: stopped{saved}; the same command goes on from there",
    ]
    assert len(_called(calls)) == 2


def test_a_signal_at_the_end_of_a_run_starts_no_other(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _table("works", "works")
    run = running._Relay.run

    def last_moment(relay: running._Relay, command: list[str]) -> int:
        code = run(relay, command)
        os.kill(os.getpid(), signal.SIGUSR1)
        return code

    monkeypatch.setattr(running._Relay, "run", last_moment)
    assert main(["table", "t.yaml", "--run"]) == 75
    assert capsys.readouterr().err.endswith("error: stopped before row 1, seed 0; the same command goes on there\n")
    assert len(_called(calls)) == 1


def test_what_another_process_runs_is_left_to_it(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = _table("works", "works", "works")
    by_table = runs[0].folder.with_name(".seed0.lock")
    by_hand = runs[1].folder / ".lock"
    with _locked(by_table), _locked(by_hand):
        assert main(["table", "t.yaml", "--run"]) == 2
    assert _ran(calls) == [str(runs[2].folder)]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: row 0, seed 0: another process was running it, and has not finished",
        "error: row 1, seed 0: another process was running it, and has not finished",
    ]
    assert main(["table", "t.yaml", "--run"]) == 0
    assert _ran(calls)[1:] == [str(run.folder) for run in runs[:2]]


def test_what_another_process_has_finished_meanwhile_is_not_run_again(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _table("works", "works")
    run = running._Relay.run

    def while_it_runs(relay: running._Relay, command: list[str]) -> int:
        subprocess.run([*STUB, *runs[1].arguments], check=True)
        return run(relay, command)

    monkeypatch.setattr(running._Relay, "run", while_it_runs)
    assert main(["table", "t.yaml", "--run"]) == 0
    assert _ran(calls) == [str(runs[1].folder), str(runs[0].folder)]


def test_a_run_that_another_process_has_begun_at_the_same_moment_is_no_failure(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = _table("works")
    is_locked, looks = running._is_locked, iter([False])
    monkeypatch.setattr(running, "_is_locked", lambda folder: next(looks, None) is None and is_locked(folder))
    with _locked(run.folder / ".lock"):
        assert main(["table", "t.yaml", "--run"]) == 2
    assert len(_called(calls)) == 1
    expected = "error: row 0, seed 0: another process was running it, and has not finished"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_two_tables_at_once_share_the_work(calls: Path) -> None:
    runs = _table(*["works"] * 4)
    fork = multiprocessing.get_context("fork")  # they are at work at the same time; two imports of torch might not be
    both = [fork.Process(target=lambda: sys.exit(main(["table", "t.yaml", "--run"]))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(_ran(calls)) == sorted(str(run.folder) for run in runs)
    assert 0 in {process.exitcode for process in both}


def test_what_is_not_to_be_trusted_is_refused_before_anything_runs(
    calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _table("works", "works")
    Path("works.yaml").write_text(EXPERIMENT.replace("'torchdistill.losses'", "'some_package'"))
    assert main(["table", "t.yaml", "--run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # two rows, one experiment
    assert line.startswith("error: works.yaml:2:16: dependencies: 'some_package' is refused")
    assert not calls.exists()
    assert main(["table", "t.yaml", "--run", "--trust", "some_package"]) == 0
    assert len(_called(calls)) == 2


def test_a_run_that_was_interrupted_goes_on_if_it_is_of_the_same_experiment(calls: Path) -> None:
    from vkd_plugin.config.experiment import Experiment, resolve

    runs = _table("works", "works", "works")
    for run, overrides in zip(runs, ([], ["train.num_epochs=17"], []), strict=True):
        (run.folder / "checkpoints").mkdir(parents=True)
        text = Experiment(run.config, resolve(run.config, overrides)[0], {}).dump()
        (run.folder / "config.yaml").write_text(text)
    for run in runs[:2]:
        (run.folder / "checkpoints" / "last.pt").touch()
    assert main(["table", "t.yaml", "--run"]) == 0
    assert [arguments[-2:] == ["--resume", "auto"] for arguments in _called(calls)] == [True, False, False]


def test_an_interrupted_table_goes_on_in_the_middle_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs" / "digits" / "ce" / "vit.yaml"
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
    assert (folder / "student.pt").is_file()
    assert not Path("runs", "digits").exists()  # where the experiment itself would put its student
