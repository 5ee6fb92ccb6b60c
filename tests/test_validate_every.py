"""``validate_every``: epochs without a validation, of which none is ever the best."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vkd_plugin.cli import main
from vkd_plugin.engine import run as engine_run
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.records import MEASURED
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.tasks.classification import Classification

ROOT = Path(__file__).parents[1]
CE = "configs/digits/ce/vit.yaml"
SHORT = (
    "train.num_epochs=5",
    "datasets.digits/train.init.kwargs.fraction=0.03",
    "train.train_data_loader.kwargs={batch_size: 32, num_workers: 0}",
    "train.val_data_loader.dataset_id=digits/train",
    "test.test_data_loader.dataset_id=digits/train",
    "models.model.kwargs.depth=1",
    "models.model.dst_ckpt=null",
)
PLATEAU = "{key: ReduceLROnPlateau, kwargs: {mode: max}}"


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine_run, "prove", lambda experiment: [])  # the dry run, as long as the run itself


def train(
    output: Path, *overrides: str, flags: tuple[str, ...] = (), expect: int = 0, config: str = CE
) -> list[dict[str, Any]]:
    sets = [word for override in (*SHORT, *overrides) for word in ("--set", override)]
    assert main(["--config", config, "--output", str(output), "--device", "cpu", *flags, *sets]) == expect
    file = output / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def validated(records: list[dict[str, Any]]) -> list[int]:
    return [record["epoch"] for record in records if any(name.startswith("val") for name in record)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the next validations come to."""
    left: list[float] = []
    evaluate = Classification.evaluate

    def as_told(self: Classification, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | ({"top1": left.pop(0)} if left else {})

    monkeypatch.setattr(Classification, "evaluate", as_told)
    yield left
    assert left == []


@pytest.mark.parametrize("every", [1, 2, 9])
def test_every_so_many_epochs_and_the_last(every: int, tmp_path: Path, figures: list[float]) -> None:
    expected = {1: [1, 2, 3, 4, 5], 2: [2, 4, 5], 9: [5]}[every]
    figures[:] = [70.0, *(10.0 + number for number in range(len(expected) - 1))]  # the first is the best
    records = train(tmp_path, f"train.validate_every={every}")
    assert validated(records) == expected
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    best = read_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert (best["epoch"], best["best_value"]) == (expected[0], 70.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best"]["epoch"], summary["last"]["epoch"]) == (expected[0], 5)


def test_the_student_is_the_same(tmp_path: Path) -> None:
    """And so is its average, which is validated with it."""
    always, seldom = (
        train(tmp_path / str(every), f"train.validate_every={every}", "train.ema={decay: 0.5}") for every in (1, 2)
    )
    assert validated(seldom) == [2, 4, 5]
    for one, two in zip(always, seldom, strict=True):
        assert two == {name: value for name, value in one.items() if name in two}
        assert {name.split("/")[0] for name in one.keys() - two.keys()} in ({"val", "val_ema"}, set())


def test_a_run_stopped_before_its_first_validation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", "train.validate_every=3")
    post_epoch, epochs = EngineBox.post_epoch_process, 0

    def stopped(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        nonlocal epochs
        post_epoch(self, *args, **kwargs)
        epochs += 1
        if epochs == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EngineBox, "post_epoch_process", stopped)
        part = train(tmp_path / "part", "train.validate_every=3", expect=75)
    assert (len(part), validated(part)) == (2, [])
    assert not (tmp_path / "part" / "checkpoints" / "best.pt").exists()
    assert train(tmp_path / "part", "train.validate_every=3", flags=("--resume", "auto")) == whole


def _refused(capfd: pytest.CaptureFixture[str], config: str, output: Path, *overrides: str) -> str:
    capfd.readouterr()
    assert train(output, *overrides, config=config, expect=2) == []
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "rror" in line or "Traceback" in line]
    return line


def test_a_scheduler_that_needs_every_validation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / CE).read_text().replace("  log_freq: 10\n", "  log_freq: 10\n  validate_every: 2\n")
    (tmp_path / "plateau.yaml").write_text(text)
    place = text.splitlines().index("  validate_every: 2") + 1
    line = _refused(capfd, str(tmp_path / "plateau.yaml"), tmp_path / "run", f"train.scheduler={PLATEAU}")
    assert f"plateau.yaml:{place}:" in line
    assert "ReduceLROnPlateau needs each epoch's validation" in line
    one = "train.num_epochs=1", f"train.scheduler={PLATEAU}", "train.validate_every=1"
    assert validated(train(tmp_path / "one", *one)) == [1]


@pytest.mark.parametrize("value", ["0", "1.5", "often"])
def test_what_is_no_number_of_epochs(value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "train.validate_every" in _refused(capfd, CE, tmp_path / "run", f"train.validate_every={value}")
