"""Checkpoint files: whatever happens to a file or a disk, what is read is what was saved, or nothing."""

import errno
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, SequentialLR
from torchdistill.optim.registry import SCHEDULER_DICT

from vkd_plugin.config import load_experiment
from vkd_plugin.engine.build import build_model
from vkd_plugin.engine.checkpoint import (
    Checkpoints,
    SaveError,
    has_checkpoint,
    read_newest,
    read_run_checkpoint,
    save_atomically,
)
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.records import RunFolder, read_metrics
from vkd_plugin.engine.state import load_rank_state, load_training_state, rank_state, training_state
from vkd_plugin.engine.train import Trainer
from vkd_plugin.errors import UserError
from vkd_plugin.random_state import generators_state, restore_generators

ROOT = Path(__file__).parents[1]


def checkpoint(step: int) -> dict[str, Any]:
    """The least that is a checkpoint to go on from."""
    generator = torch.Generator().manual_seed(step)
    model = {
        "weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor(step),
    }
    return {
        "model": model, "projectors": {}, "optimizer": {"state": {}}, "epoch": step // 3, "batch": step % 3,
        "step": step, "ranks": [{"means": {"loss": [0.1 * step, step]}}],
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, types included; nan is nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or a != a


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# Damage.


@cache
def content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "last.pt")
        save_atomically(checkpoint(7), file)
        return file.read_bytes()


def assert_noticed_or_harmless(damaged: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "last.pt")
        file.write_bytes(damaged)
        problem = ""
        try:
            found = read_run_checkpoint(file)
        except UserError as error:
            problem = str(error)
        assert same(found, checkpoint(7)) if not problem else problem.startswith(f"{file}: ")
        assert len(problem.splitlines()) <= 1


def _entries() -> list[int]:
    """Where the central directory's entries begin: zip readers do not agree on what they look at there."""
    whole = content()
    return [place for place in range(len(whole)) if whole.startswith(b"PK\1\2", place)]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_byte_is_noticed_or_harmless(data: st.DataObject) -> None:
    anywhere = st.integers(0, len(content()) - 1)
    place = data.draw(anywhere | st.integers(_entries()[0], len(content()) - 1))
    changed = bytearray(content())
    changed[place] ^= data.draw(st.integers(1, 255))
    assert_noticed_or_harmless(bytes(changed))


@pytest.mark.parametrize(("place", "bit"), [(8, 0), (10, 3), (38, 4)], ids=["encrypted", "deflated", "folder"])
def test_a_flag_that_only_some_zip_readers_look_at(place: int, bit: int) -> None:
    for entry in _entries():
        changed = bytearray(content())
        changed[entry + place] ^= 1 << bit
        assert_noticed_or_harmless(bytes(changed))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 77, 512, 4096]), st.sampled_from([b"\0", b"\xff"]))
@example(0, 0, b"\0")
def test_a_cut_or_padded_file_is_noticed_or_harmless(length: int, more: int, filler: bytes) -> None:
    assert_noticed_or_harmless(content()[:length] + more * filler)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from([b"\0", b"\xff", b"P"]))
def test_a_lost_block_is_noticed_or_harmless(start: int, length: int, filler: bytes) -> None:
    whole = content()
    end = min(start + length, len(whole))
    assert_noticed_or_harmless(whole[:start] + max(end - start, 0) * filler + whole[end:])


@pytest.mark.parametrize("leave", ["model", "optimizer", "step", "ranks"])
def test_a_checkpoint_that_lacks_something_is_not_one(tmp_path: Path, leave: str) -> None:
    save_atomically({k: v for k, v in checkpoint(1).items() if k != leave}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"not a checkpoint to resume from: it holds no {leave}"):
        read_run_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("thing", ["missing", "folder", "empty"])
def test_what_is_no_file(tmp_path: Path, thing: str) -> None:
    file = tmp_path / "last.pt"
    if thing == "folder":
        file.mkdir()
    elif thing == "empty":
        file.touch()
    with pytest.raises(UserError, match=r"last\.pt: "):
        read_run_checkpoint(file)


# Which one is gone on from.


def _save(folder: Path, **steps: int) -> None:
    for name, step in steps.items():
        save_atomically(checkpoint(step), folder / f"{name}.pt")


def _damage(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from(["previous", "epoch1", "epoch2", "epoch10"]), st.booleans()),
    st.sampled_from(["fine", "damaged", "missing"]),
    st.booleans(),
)
@example({"previous": True, "epoch10": True}, "damaged", False)
@example({"previous": True, "epoch10": True}, "missing", True)
def test_the_newest_readable_checkpoint_is_found(others: dict[str, bool], last: str, late: bool) -> None:
    """``others``: whether each is readable. previous.pt is of before the newest epoch's end, or of after it."""
    steps = {"epoch1": 3, "epoch2": 6, "epoch10": 30, "last": 31, "previous": 30 if late else 29}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readable = others | ({} if last == "missing" else {"last": last == "fine"})
        for file, fine in readable.items():
            _save(folder, **{file: steps[file]})
            if not fine:
                _damage(folder / f"{file}.pt")
        assert has_checkpoint(folder / "last.pt") == bool(readable)
        newest = max((steps[file] for file, fine in readable.items() if fine), default=None)
        if newest is None:
            with pytest.raises(UserError) as caught:
                read_newest(folder / "last.pt")
            assert len(str(caught.value).splitlines()) == 1
        else:
            found, state = read_newest(folder / "last.pt")
            assert state["step"] == newest == steps[found.stem]
            assert same(state, checkpoint(newest))


def test_a_checkpoint_that_was_asked_for_by_its_name_has_no_substitute(tmp_path: Path) -> None:
    _save(tmp_path, last=3, previous=2, epoch1=1)
    _damage(tmp_path / "epoch1.pt")
    with pytest.raises(UserError, match=r"epoch1\.pt"):
        read_newest(tmp_path / "epoch1.pt")
    assert not has_checkpoint(tmp_path / "other.pt")


def test_files_that_only_look_like_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name in ("epoch.pt", "epochs.pt", "epoch2.pt.123.tmp", "epoch-1.pt", "best.pt"):
        (tmp_path / name).write_bytes(content())
    assert not has_checkpoint(tmp_path / "last.pt")


# Saving.


def _no_links(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("links", [True, False])
def test_previous_is_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    saving = Checkpoints(tmp_path / "checkpoints")
    for step in range(1, 5):
        saving.save_best(checkpoint(100 + step))
        saving.save_last(checkpoint(step))
        assert same(read_run_checkpoint(saving.last), checkpoint(step))
        assert same(read_run_checkpoint(saving.best), checkpoint(100 + step))
        if step > 1:
            assert same(read_run_checkpoint(saving.last.with_name("previous.pt")), checkpoint(step - 1))
    assert {file.name for file in saving.last.parent.iterdir()} == {"last.pt", "previous.pt", "best.pt"}


class Disk:
    """Lets an operation on files fail from its n-th call on (counted from 0) with 'No space left on device'."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.operation, self.calls = "", 0
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "mkdir"), (Path, "stat")):
            monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))
        self._open = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode="r", **kwargs: self._opened(path, mode, **kwargs))

    def fail(self, operation: str, calls: int = 0) -> None:
        self.full, self.operation, self.calls = True, operation, calls

    def _call(self, operation: str) -> None:
        if self.full and operation == self.operation:
            self.calls -= 1
            if self.calls < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._call(name)
            return function(*args, **kwargs)

        return watched

    def _opened(self, path: Path, mode: str, **kwargs: Any) -> Any:
        self._call("open" if "w" in mode else "reopen")
        file = self._open(path, mode, **kwargs)
        if "w" in mode and "b" in mode:
            write = file.write
            disk = self

            class Writer:
                def __enter__(self) -> "Writer":
                    return self

                def __exit__(self, *args: object) -> None:
                    file.close()

                def write(self, data: Any) -> Any:
                    if disk.full and disk.operation == "write":
                        write(bytes(data)[: len(data) // 2])
                        disk._call("write")
                    if disk.full and disk.operation == "rot":
                        data = bytearray(data)
                        data[len(data) // 3] ^= 1
                    return write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Writer()
        return file


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


FAILURES = [
    ("mkdir", 0), ("open", 0), ("write", 0), ("fsync", 0), ("rot", 0), ("reopen", 0), ("replace", 0), ("replace", 1),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "calls"), FAILURES)
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, disk: Disk, operation: str, calls: int) -> None:
    saving = Checkpoints(tmp_path)
    saving.save_last(checkpoint(1))
    saving.save_last(checkpoint(2))
    disk.fail(operation, calls)
    with pytest.raises(SaveError, match=r"cannot save the checkpoint: .*; what was saved before is intact") as caught:
        saving.save_last(checkpoint(3))
    assert str(caught.value).startswith(f"{saving.last}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert ("No space left on device" in str(caught.value)) == (operation != "rot")
    disk.full = False
    assert same(read_newest(saving.last)[1], checkpoint(2))
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    again = Checkpoints(tmp_path)
    again.save_last(checkpoint(4))
    again.save_last(checkpoint(5))
    assert same(read_run_checkpoint(saving.last), checkpoint(5))
    assert same(read_run_checkpoint(tmp_path / "previous.pt"), checkpoint(4))
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


@pytest.mark.parametrize("calls", [0, 1])
def test_without_links_a_failed_renaming_leaves_one_that_is_found(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    saving = Checkpoints(tmp_path)
    saving.save_last(checkpoint(1))
    saving.save_last(checkpoint(2))
    disk.fail("replace", calls)
    with pytest.raises(SaveError):
        saving.save_last(checkpoint(3))
    disk.full = False
    assert has_checkpoint(saving.last)
    assert same(read_newest(saving.last)[1], checkpoint(2))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_knows_no_fsync_is_no_obstacle(tmp_path: Path, disk: Disk) -> None:
    disk.fail("fsync", 1)
    save_atomically(checkpoint(1), tmp_path / "last.pt")
    assert same(read_run_checkpoint(tmp_path / "last.pt"), checkpoint(1))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_could_not_be_read_again_is_refused_whenever_it_comes(tmp_path: Path, before: int) -> None:
    """A schedule that computes with numpy makes the learning rate numpy's, from its first step on."""
    saving = Checkpoints(tmp_path)
    for step in range(before):
        saving.save_last(checkpoint(step))
    try:
        saving.save_last(checkpoint(before) | {"lr": np.float64(0.1)})
    except UserError:
        assert saving.last.exists() == (before > 0)
    else:
        assert read_run_checkpoint(saving.last)["lr"] == 0.1
    if before:
        assert read_run_checkpoint(saving.last)["step"] in (before - 1, before)


# A disk that is full for a while.


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["last", "best", "epoch"]), st.booleans()), min_size=1, max_size=10))
def test_what_could_not_be_written_is_written_with_the_next(saves: list[tuple[str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        folder = Path(name)
        disk = Disk(monkeypatch)
        saving = Checkpoints(folder, carry_on=True)
        newest: dict[str, int] = {}
        written: dict[str, int] = {}
        for step, (kind, full) in enumerate(saves):
            disk.fail("fsync") if full else setattr(disk, "full", False)
            file = {"last": "last.pt", "best": "best.pt", "epoch": f"epoch{step}.pt"}[kind]
            newest[file] = step
            if kind == "last":
                saving.save_last(checkpoint(step))
            elif kind == "best":
                saving.save_best(checkpoint(step))
            else:
                saving.save_epoch(checkpoint(step), step)
            if not full:
                if "last.pt" in written and written["last.pt"] != newest["last.pt"]:
                    written["previous.pt"] = written["last.pt"]
                written |= newest
            on_disk = {path.name: read_run_checkpoint(path)["step"] for path in folder.iterdir()}
            assert on_disk == written
        disk.full = False
        saving.finish()
        on_disk = {path.name: read_run_checkpoint(path)["step"] for path in folder.iterdir()}
        assert on_disk.items() >= newest.items()
        disk.fail("fsync")
        with pytest.raises(SaveError):  # after the end there is no next one
            saving.save_last(checkpoint(99))


def test_at_the_end_a_full_disk_is_an_error(tmp_path: Path, disk: Disk) -> None:
    saving = Checkpoints(tmp_path, carry_on=True)
    disk.fail("open")
    saving.save_best(checkpoint(1))
    saving.save_last(checkpoint(2))
    with pytest.raises(SaveError, match=r"best\.pt"):
        saving.finish()
    disk.full = False
    saving.finish()
    assert {file.name for file in tmp_path.iterdir()} == {"best.pt", "last.pt"}


def test_the_best_is_written_before_the_last_that_knows_of_it(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Checkpoints(tmp_path, carry_on=True)
    disk.fail("open")
    saving.save_last(checkpoint(1))
    saving.save_best(checkpoint(2))
    disk.full = False
    names: list[str] = []
    replace = Path.replace

    def noted(path: Path, to: Path) -> Path:
        names.append(to.name)
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", noted)
    saving.save_last(checkpoint(2))
    assert names == ["best.pt", "last.pt"]


# Generators.


def _draws() -> list[Any]:
    numpy = np.random
    return [
        random.gauss(0, 1), random.random(), numpy.normal(), numpy.rand(3).tolist(), torch.randn(5).tolist(),
        torch.randperm(20).tolist(), random.gauss(0, 1), numpy.normal(), torch.rand(3).double().tolist(),
    ]  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 700))
def test_generators_go_on_from_a_file(seed: int, normals: int, numbers: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    for _ in range(normals):  # an odd number leaves half a pair behind
        random.gauss(0, 1), np.random.normal(), torch.randn(1)  # noqa: NPY002
    random.getrandbits(32 * numbers or 1), np.random.bytes(4 * numbers), torch.rand(numbers)  # noqa: NPY002
    with tempfile.TemporaryDirectory() as folder:
        torch.save(generators_state(), Path(folder, "state.pt"))
        expected = _draws()
        _draws()
        restore_generators(torch.load(Path(folder, "state.pt"), weights_only=True))
    assert _draws() == expected


# Training's state.

LABELS = torch.arange(8)

SCHEDULES = {
    "SGD": ("{lr: 0.1, momentum: 0.9, nesterov: true}", "MultiStepLR", "{milestones: [1, 3], gamma: 0.5}"),
    "AdamW": ("{lr: 1.0e-3, amsgrad: true}", "OneCycleLR", "{max_lr: 0.01, total_steps: 20}"),
    "Adam": ("{lr: 1.0e-3, fused: true}", "CosineAnnealingLR", "{T_max: 10}"),
    "RMSprop": ("{lr: 1.0e-3, momentum: 0.5, centered: true}", "ReduceLROnPlateau", "{patience: 0}"),
    "NAdam": ("{lr: 1.0e-3}", "CosineAnnealingWarmRestarts", "{T_0: 3}"),
    "Adagrad": ("{lr: 1.0e-2}", "poly_lr_scheduler", "{num_iterations: 1, num_epochs: 10}"),
    "Adamax": ("{lr: 1.0e-3}", "warm_up_then_cosine", "{}"),
    "Adadelta": ("{lr: 0.5}", "CyclicLR", "{base_lr: 0.01, max_lr: 0.1, step_size_up: 3, cycle_momentum: false}"),
    "RAdam": ("{lr: 1.0e-3}", "ExponentialLR", "{gamma: 0.9}"),
    "ASGD": ("{lr: 1.0e-2}", "LinearLR", "{total_iters: 4}"),
}


def warm_up_then_cosine(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """torch's SequentialLR takes built schedulers, which a YAML file cannot hold; a function of one's own can."""
    parts: list[LRScheduler] = [ConstantLR(optimizer, 0.1, 3), CosineAnnealingLR(optimizer, 10)]
    return SequentialLR(optimizer, parts, milestones=[3])


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(SCHEDULER_DICT, "warm_up_then_cosine", warm_up_then_cosine)


def trainer(optimizer: str, kwargs: str, scheduler: str | None = None, schedule: str = "{}", *more: str) -> Trainer:
    sections = [f"train.optimizer={{key: {optimizer}, kwargs: {kwargs}}}"]
    sections += [f"train.scheduler={{key: {scheduler}, kwargs: {schedule}}}" if scheduler else "train.scheduler=null"]
    sections += ["train.train_data_loader.kwargs.batch_size=16", *more]
    experiment = load_experiment("configs/digits/ce/digits_cnn.yaml", sections)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    return Trainer(experiment, None, build_model(experiment, "model", cpu, False), Processes(0, 1, cpu), None, 0)


def steps(trained: Trainer, epochs: int = 2) -> None:
    """A step each epoch, and what torchdistill does at its end."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for epoch in range(epochs):
        trained.box.pre_epoch_process(epoch=epoch)
        trained.box.post_forward_process(loss=trained.box.forward_process(images, LABELS, {}))
        trained.box.post_epoch_process(metrics=1.0)


@pytest.mark.parametrize("optimizer", SCHEDULES)
def test_a_state_is_the_same_from_a_file_and_goes_on(tmp_path: Path, optimizer: str) -> None:
    first = trainer(optimizer, *SCHEDULES[optimizer])
    steps(first)
    saved = first.state()
    save_atomically(saved, tmp_path / "last.pt")
    loaded = read_run_checkpoint(tmp_path / "last.pt")
    assert same(loaded["model"], dict(saved["model"]))
    second = trainer(optimizer, *SCHEDULES[optimizer])
    second.resume(loaded, tmp_path / "last.pt")
    for again in (first, second):
        steps(again, 3)
    one, two = training_state(first.box), training_state(second.box)
    assert same(one.pop("lr_scheduler").get("last_epoch"), two.pop("lr_scheduler").get("last_epoch"))
    assert same(one, two)


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        ("CosineAnnealingLR", "{T_max: 20}"),
        ("MultiStepLR", "{milestones: [2, 5], gamma: 0.3}"),
        ("StepLR", "{step_size: 2, gamma: 0.3}"),
        ("ExponentialLR", "{gamma: 0.7}"),
        ("LinearLR", "{total_iters: 6}"),
        ("OneCycleLR", "{max_lr: 0.02, total_steps: 30}"),
        ("poly_lr_scheduler", "{num_iterations: 1, num_epochs: 30}"),
        ("warm_up_then_cosine", "{}"),
        (None, "{}"),
    ],
)
@pytest.mark.parametrize("before", ["CosineAnnealingLR", "OneCycleLR"])
def test_a_changed_schedule_is_followed_from_the_beginning(before: str, scheduler: str | None, schedule: str) -> None:
    kwargs = "{lr: 1.0e-2}"
    old = trainer("AdamW", kwargs, before, "{T_max: 12}" if before[0] == "C" else "{max_lr: 0.1, total_steps: 12}")
    steps(old, 4)
    new, fresh = (trainer("AdamW", kwargs, scheduler, schedule) for _ in range(2))
    load_training_state(new.box, training_state(old.box), changed=("scheduler",))
    steps(fresh, 4)
    for _ in range(4):
        groups, expected = new.box.optimizer.param_groups, fresh.box.optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx([group["lr"] for group in expected], rel=1e-9)
        steps(new, 1)
        steps(fresh, 1)


def test_changed_options_of_an_optimizer_count_and_its_moments_stay() -> None:
    old = trainer("AdamW", "{lr: 1.0e-3, weight_decay: 0.1}", "CosineAnnealingLR", "{T_max: 10}")
    steps(old, 3)
    new, fresh = (
        trainer("AdamW", "{lr: 5.0e-3, weight_decay: 0.3, eps: 1.0e-6}", "CosineAnnealingLR", "{T_max: 10}")
        for _ in range(2)
    )
    load_training_state(new.box, training_state(old.box), changed=("optimizer",))
    steps(fresh, 3)
    (group,), (expected,) = new.box.optimizer.param_groups, fresh.box.optimizer.param_groups
    assert group["weight_decay"] == 0.3
    assert group["eps"] == 1e-6
    assert group["lr"] == pytest.approx(expected["lr"], rel=1e-9)
    assert same(new.box.optimizer.state_dict()["state"], old.box.optimizer.state_dict()["state"])


def test_another_optimizer_starts_anew_and_says_so() -> None:
    old = trainer("AdamW", "{lr: 1.0e-3}", "CosineAnnealingLR", "{T_max: 10}")
    steps(old, 3)
    new, fresh = (trainer("SGD", "{lr: 0.1, momentum: 0.9}", "CosineAnnealingLR", "{T_max: 10}") for _ in range(2))
    notes = load_training_state(new.box, training_state(old.box), changed=("optimizer",))
    assert "SGD starts anew: the checkpoint's optimizer is AdamW" in notes
    assert new.box.optimizer.state_dict()["state"] == {}
    steps(fresh, 3)
    assert new.box.optimizer.param_groups[0]["lr"] == pytest.approx(fresh.box.optimizer.param_groups[0]["lr"])
    steps(new, 1)


def test_gradients_that_wait_for_more_batches_are_kept(tmp_path: Path) -> None:
    """An epoch may end within an accumulation; BatchNorm's statistics of before it are then still needed."""
    arguments = ("SGD", "{lr: 0.1, momentum: 0.9}", None, "{}", "train.optimizer.grad_accum_step=2")
    first = trainer(*arguments, "train.skip_nonfinite=1")
    steps(first, 3)
    save_atomically(first.state(), tmp_path / "last.pt")
    second = trainer(*arguments, "train.skip_nonfinite=1")
    second.resume(read_run_checkpoint(tmp_path / "last.pt"), tmp_path / "last.pt")
    for again in (first, second):
        steps(again, 2)
    assert same(training_state(first.box), training_state(second.box))


def test_a_bad_batch_that_waits_is_put_back_after_resuming_too(tmp_path: Path) -> None:
    arguments = ("SGD", "{lr: 0.1, momentum: 0.9}", None, "{}", "train.optimizer.grad_accum_step=2")
    first = trainer(*arguments, "train.skip_nonfinite=1")
    steps(first, 2)
    first.box.post_forward_process(loss=first.box.forward_process(torch.full((8, 1, 8, 8), math.nan), LABELS, {}))
    save_atomically(first.state(), tmp_path / "last.pt")
    second = trainer(*arguments, "train.skip_nonfinite=1")
    second.resume(read_run_checkpoint(tmp_path / "last.pt"), tmp_path / "last.pt")
    for again in (first, second):
        steps(again, 1)
        assert all(bool(tensor.isfinite().all()) for tensor in again.box.bare_student.state_dict().values())
    assert same(training_state(first.box), training_state(second.box))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_waiting_gradients_of_processes_are_what_they_would_have_been_at_the_step(world_size: int) -> None:
    """DistributedDataParallel counts a gradient that a process lacks as zero."""
    arguments = ("SGD", "{lr: 0.1}", None, "{}", "train.optimizer.grad_accum_step=2")
    saved = trainer(*arguments)
    steps(saved, 1)
    one, two = rank_state(saved.box), rank_state(saved.box)
    two["gradients"] = [3 * gradient for gradient in two["gradients"]]
    one["gradients"][0] = two["gradients"][1] = None
    whole = [sum(g for g in pair if g is not None) / 2 for pair in zip(one["gradients"], two["gradients"], strict=True)]
    loaded: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        box = trainer(*arguments).box
        load_rank_state(box, [one, two], rank, world_size)
        parameters = [p for group in box.optimizer.param_groups for p in group["params"]]
        loaded.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for expected, *found in zip(whole, *loaded, strict=True):
        torch.testing.assert_close(sum(found) / world_size, expected)


# The folder.


def _run_in(folder: Path, *checkpoints: str) -> RunFolder:
    run = RunFolder(folder)
    (folder / "config.yaml").write_text("")
    (folder / "log.txt").write_text("")
    run.write_metrics([{"epoch": 1}])
    for name in checkpoints:
        (folder / "checkpoints" / name).write_bytes(content())
    return run


def test_a_run_cut_off_before_its_first_checkpoint_is_written_over(tmp_path: Path) -> None:
    run = _run_in(tmp_path / "run", "best.pt", "last.pt.7.tmp")
    run.start_afresh(in_place=True)
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError, match="another run is writing there"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    ("names", "in_place"), [(["last.pt"], True), (["previous.pt"], True), (["epoch3.pt"], True), ([], False)]
)
def test_a_run_that_could_be_gone_on_with_is_moved_aside(tmp_path: Path, names: list[str], in_place: bool) -> None:
    run = _run_in(tmp_path / "run", *names)
    run.start_afresh(in_place=in_place)
    assert {file.name for file in (tmp_path / "run.1" / "checkpoints").iterdir()} == set(names)
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    run.write_metrics([{"epoch": 5}])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"epoch": 5}\n'
    with pytest.raises(UserError, match="another run is writing there"):
        RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "run.1").close()  # nobody's any more


def test_a_finished_run_is_moved_aside(tmp_path: Path) -> None:
    run = _run_in(tmp_path / "run")
    run.write_summary({})
    run.start_afresh(in_place=True)
    assert (tmp_path / "run.1" / "summary.json").exists()


def test_a_damaged_last_does_not_become_the_previous_one(tmp_path: Path) -> None:
    run = _run_in(tmp_path / "run", "last.pt", "previous.pt", "last.pt.7.tmp")
    _damage(run.last)
    damaged = run.last.read_bytes()
    previous, _ = read_newest(run.last)
    run.write_metrics([{"epoch": 1}, {"epoch": 2}, {"epoch": 3}])
    run.go_on(previous, [{"epoch": 1}, {"epoch": 2}])
    assert [record["epoch"] for record in read_metrics(run.path)] == [1, 2]
    assert not run.last.exists()
    assert damaged in [file.read_bytes() for file in run.last.parent.iterdir()]  # set aside, not thrown away
    run.checkpoints.save_last(checkpoint(9))
    assert previous.read_bytes() == content()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_lock_ends_with_the_run_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        with pytest.raises(UserError, match="another run is writing there"):
            RunFolder(tmp_path)  # the child closes its copy; the run's is held all the same
        run.close()
        RunFolder(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_what_a_run_left_that_was_cut_off_in_its_first_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    own = [tmp_path / "config.yaml.7.tmp", tmp_path / "checkpoints" / "probe.7.tmp"]
    others = [tmp_path / "notes.tmp", tmp_path / "config.yaml.tmp.txt"]
    for file in (*own, *others):
        file.write_text("x")
    folder = RunFolder(tmp_path)
    folder.start_afresh()
    folder.close()
    assert not any(file.exists() for file in own)
    assert all(file.exists() for file in others)
