"""Runs that are killed, starved of disk and memory, tampered with and interrupted end as if nothing had happened.

Each fault is brought about from outside, or by a few lines that are executed before ``run.py`` (``before``). What is
compared is everything that decides how training goes on, to the last bit, with a run that nobody disturbed.
"""

import hashlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults_helper import ENVIRONMENT, GENEROUS, ROOT, Nursery, Run, children, until

from vkd_plugin.datasets import Digits
from vkd_plugin.engine.checkpoint import read_newest, read_run_checkpoint, save_atomically
from vkd_plugin.engine.records import MEASURED

VKD = "configs/digits/vkd/vit_from_cnn.yaml"
STEPS, EPOCHS = 12, 2  # of an epoch, and of a run
SHORT = (
    "--config", VKD, "--device", "cpu", "--set", f"train.num_epochs={EPOCHS}",
    "--set", "datasets.digits/train.init.kwargs.fraction=0.3",
    "--set", "train.train_data_loader.kwargs.batch_size=32", "--set", "train.optimizer.kwargs.lr=3.0e-3",
    "--set", "train.ema={decay: 0.9}", "--set", "train.log_freq=1",
    "--set", "datasets.digits/test.init.kwargs.split=train", "--set", "datasets.digits/test.init.kwargs.fraction=0.08",
    "--set", "train.val_data_loader.kwargs.batch_size=60",
)  # fmt: skip
NO_STUDENT = ("--set", "models.student_model.dst_ckpt=null")
EACH_STEP = ("--set", "train.checkpoint={every_steps: 1}")
CARRY_ON = ("--set", "train.checkpoint={every_steps: 1, on_error: continue}")
WORKERS = (
    "--set",
    "train.train_data_loader.kwargs.num_workers=2",
    "--set",
    "train.val_data_loader.kwargs.num_workers=1",
)
RESUME = ("--resume", "auto")
LITTLE = ("--set", "train.num_epochs=1", "--set", "datasets.digits/train.init.kwargs.fraction=0.03")

# What is executed before the run.

UNCHECKED = "import vkd_plugin.engine.run as unchecked\nunchecked.prove = lambda experiment: []\n"

AT_STEPS = """
import os, signal, sys, time
from vkd_plugin.engine.box import EngineBox
_step, _done = EngineBox.post_forward_process, [0]
def _counted(self, *args, **kwargs):
    _step(self, *args, **kwargs)
    _done[0] += 1
    now(_done[0])
EngineBox.post_forward_process = _counted
"""

TERM = "os.kill(os.getpid(), signal.SIGTERM)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WAIT = "print('here', flush=True); time.sleep(600)"
STUCK = (  # in a call that neither ends nor comes back to the interpreter
    "import ctypes; lock = ctypes.create_string_buffer(64); c = ctypes.CDLL(None); print('here', flush=True); "
    "c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)"
)
KILL_A_WORKER = "import multiprocessing as m; os.kill(m.active_children()[0].pid, signal.SIGKILL)"
QUICK_TO_NOTICE = "import torch.utils.data._utils as u; u.MP_STATUS_CHECK_INTERVAL = 0.2\n"

SLOW_EVALUATION = """
import time
from vkd_plugin.tasks.classification import Classification
_evaluate, _evaluated = Classification.evaluate, []
def _slow(self, model, loader, device, *more):
    def slowly():
        for batch in loader:
            yield batch
            if not _evaluated:
                print("evaluates", flush=True)
            _evaluated.append(time.sleep(0.8 if len(_evaluated) < 2 else 0))
    return _evaluate(self, model, slowly(), device, *more)
Classification.evaluate = _slow
"""

SLOW_TEST = f"""
import vkd_plugin.engine.run as run
_test = run._test
def _slow_test(*args):
    exec({SLOW_EVALUATION!r}, globals())
    return _test(*args)
run._test = _slow_test
"""

DISTURBED_WRITES = """
import os, pathlib, random, signal, time
_draw, _calls = random.Random({seed}), [0]
def _disturbed(function):
    def call(*args, **kwargs):
        _calls[0] += 1
        time.sleep(_draw.random() * {sleep})
        if _calls[0] == {kill} and {kill} % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if _calls[0] == {kill}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_draw.random() * {sleep})
        return result
    return call
os.fsync, os.link = _disturbed(os.fsync), _disturbed(os.link)
if {seed} % 3 == 0:  # a file system without hard links
    def _no_links(*args):
        raise PermissionError(1, "Operation not permitted")
    os.link = _no_links
pathlib.Path.replace = _disturbed(pathlib.Path.replace)
pathlib.Path.unlink = _disturbed(pathlib.Path.unlink)
"""

NOT_A_NUMBER = """
import torch
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.randomness import AddressedDataset
from vkd_plugin.losses.vkd import VkDLoss
_forward, _loss, _steps = EngineBox.forward_process, VkDLoss.forward, [0]
def _counted(self, samples, *args, **kwargs):
    _steps[0] += type(samples) is torch.Tensor  # not those of the check beforehand, which have no contents
    return _forward(self, samples, *args, **kwargs)
def _spoilt(self, *args, **kwargs):
    loss = _loss(self, *args, **kwargs)
    return loss * float("nan") if _steps[0] in {steps} else loss
EngineBox.forward_process, VkDLoss.forward = _counted, _spoilt
_items = AddressedDataset.__getitems__
def _noted(self, batch):
    with open({file!r}, "a") as file:
        print(json.dumps([len(self), batch.epoch, batch.batch, batch.indices]), file=file)
    return _items(self, batch)
import json
AddressedDataset.__getitems__ = _noted
"""

NOTE_IMAGES = """
import hashlib
from vkd_plugin.engine.train import Trainer
_note_step = Trainer._step
def _noted_step(self, batch, *args):
    with open({file!r}, "a") as file:
        for image in batch[0]:
            print(self.epoch, hashlib.sha1(image.numpy().tobytes()).hexdigest(), file=file)
    return _note_step(self, batch, *args)
Trainer._step = _noted_step
"""


def at_step(*actions: tuple[int, str]) -> str:
    """Does each action when so many steps of this process are done."""
    lines = [f"    if step == {step}:\n        {action}" for step, action in actions]
    return "\n".join([AT_STEPS, "def now(step):", *lines]) + "\n"


# Starting runs.


class Runs:
    """Starts runs, and says how they have ended.

    Args:
        nursery: starts them.
        folder: where their output to the terminal goes.
    """

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery, self._folder, self._count = nursery, folder, itertools.count()
        self.started: list[Run] = []

    def start(self, output: Path, *more: str, before: str = "", checked: bool = False, **environment: str) -> Run:
        """A run of :data:`SHORT`, with the check that comes before training only if ``checked``.

        The check takes longer than the training and is over before most faults. ``whole`` and ``pair``, which the
        others are to equal, have it, and so have runs that end at any moment.
        """
        before = ("" if checked else UNCHECKED) + before
        err = self._folder / f"{next(self._count)}.err"
        dst = () if any("dst_ckpt" in part for part in more) else NO_STUDENT
        run = self._nursery.start([*SHORT, *dst, "--output", str(output), *more], err, before, environment)
        self.started.append(run)
        return run

    def __call__(
        self,
        output: Path,
        *more: str,
        before: str = "",
        checked: bool = False,
        expect: int = 0,
        **environment: str,
    ) -> str:
        """What a run says from beginning to end."""
        return ended(self.start(output, *more, before=before, checked=checked, **environment), expect)

    def together(
        self,
        output: Path,
        number: int,
        *more: str,
        before: str = "",
        checked: bool = False,
        only: int | None = None,
    ) -> list[Run]:
        """``number`` processes of one run, without a launcher; ``before`` is for rank ``only``, if given."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                output,
                *more,
                before=before if only in (None, rank) else "",
                checked=checked,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **place,
            )
            for rank in range(number)
        ]


def ended(run: Run, expect: int = 0) -> str:
    """What a run said: no traceback, and one line of an error if it has failed by itself."""
    code = run.wait()
    assert code == expect, f"{code}\n{run.err}"
    assert "Traceback" not in run.err, run.err
    assert "Logging error" not in run.err, run.err
    if expect in (2, 3, 75):
        assert len(errors(run.err)) == 1, run.err
    return run.err


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def warnings(err: str, about: str) -> list[str]:
    return [line for line in err.splitlines() if about in line and not line.startswith("error: ")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    nursery = Nursery()
    made = Runs(nursery, tmp_path_factory.mktemp("err"))
    yield made
    for run in made.started:
        run.signal(signal.SIGKILL)
        run.wait()
    nursery.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs(folder, checked=True)
    return folder


@pytest.fixture(scope="module")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped within its second epoch, with a ``previous.pt`` of the step before."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    runs(folder, *EACH_STEP, before=at_step((STEPS + 5, TERM)), expect=75)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """Of the stopped run, to be tampered with."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def draw() -> random.Random:
    """Another seed at every call; a failure shows it, and FAULTS_SEED repeats it."""
    seed = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


# Comparing them.

COMPARED = (
    "model", "projectors", "ema", "teacher", "criterion", "optimizer", "lr_scheduler", "epoch", "batch", "samples",
    "step", "stage_grad_count", "best", "best_value", "guard", "seed", "scaler",
)  # fmt: skip


def differences(one: Any, two: Any, at: str = "") -> list[str]:
    """Where two nests of tensors and values differ, to the last bit."""
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        same = type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape
        return [] if same and one.numpy().tobytes() == two.numpy().tobytes() else [at]
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in {**one, **two} if key not in MEASURED]
        missing = object()
        return [d for key in keys for d in differences(one.get(key, missing), two.get(key, missing), f"{at}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [d for i, pair in enumerate(zip(one, two, strict=True)) for d in differences(*pair, at=f"{at}.{i}")]
    return [] if one == two else [f"{at}: {one!r} and {two!r}"]


def loaded(run: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def assert_same(run: Path, whole: Path) -> None:
    """Nobody can tell from what a run has left behind that it was disturbed."""
    for name in ("last.pt", "best.pt"):
        one, two = loaded(run, name), loaded(whole, name)
        assert not [d for part in COMPARED for d in differences(one.get(part), two.get(part), f"{name}.{part}")]
    assert metrics(run) == metrics(whole)
    one, two = summary(run), summary(whole)
    for part in ("best", "last", "test", "steps", "parameters", "teacher_digest", "skipped_nonfinite"):
        assert not differences(one[part], two[part], part)
    assert_tidy(run)


def assert_tidy(run: Path) -> None:
    """No half-written file, and no folder beside the run's."""
    left = [str(path) for path in run.rglob("*.tmp")]
    assert not left
    beside = [path.name for path in run.parent.iterdir() if re.fullmatch(rf"{re.escape(run.name)}\.\d+", path.name)]
    assert not beside


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    events = accumulator.EventAccumulator(str(run), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_told_alike(run: Path, whole: Path, err: str = "") -> None:
    """metrics.jsonl, TensorBoard, log.txt and the terminal (``err``) give the same figures, none of them twice."""
    records, shown = metrics(run), curves(run)
    for tag, points in shown.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), (tag, steps)
    for name, points in curves(whole).items():
        if name not in MEASURED:
            assert shown[name] == points, name
    for name in ("loss", "loss/vkd", "val/top1"):
        figures = [(record["step"], record[name]) for record in records]
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in figures]
    for text in (run / "log.txt").read_text(), err:
        for record in records:
            lines = re.findall(rf"epoch {record['epoch']}/\d+  loss (\S+)  .*val/top1 (\S+)", text)
            assert set(lines) <= {(f"{record['loss']:.4f}", f"{record['val/top1']:.2f}")}
            assert lines or text is err


# Killed.


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _wait_for_training(run: Run, folder: Path, begun: int) -> None:
    """Until the run logs, which it begins when it is set up; ``begun``: when the one before last logged."""
    until(lambda: run.ended() or _written(folder / "log.txt") > begun)


def _killed_again_and_again(
    runs: Runs, folder: Path, draw: random.Random, kills: int, choices: Sequence[tuple[str, ...]]
) -> Run:
    """``kills`` kills at random moments of attempts that each resume; then one attempt that may finish."""
    last_checkpoint = folder / "checkpoints" / "last.pt"
    for kill in range(kills):
        nearly_done = last_checkpoint.exists() and torch.load(last_checkpoint)["step"] > EPOCHS * STEPS - 8
        within = draw.random() < 0.6
        most = 3 if nearly_done else 7 if last_checkpoint.exists() else 12  # the first checkpoint is the seventh write
        call = draw.randint(1, most) if within else 0
        before = DISTURBED_WRITES.format(seed=draw.randrange(2**32), sleep=0.01, kill=call)
        begun = _written(folder / "log.txt")
        run = runs.start(folder, *EACH_STEP, *RESUME, *draw.choice(choices), before=before, checked=True)
        if not within:
            if draw.random() < 0.8:  # the rest is killed while it is set up
                _wait_for_training(run, folder, begun)
            time.sleep(draw.uniform(0.0, 0.3 if nearly_done else 0.8))
            run.signal(signal.SIGKILL)
        code = run.wait()
        assert "vkd_plugin" not in run.err.partition("Traceback")[2], run.err  # a worker's own may break off somewhere
        assert code == -signal.SIGKILL, f"kill {kill}: {code}\n{run.err}"
    last = runs.start(folder, *EACH_STEP, *RESUME)
    ended(last)
    return last


def test_twenty_kills_leave_no_trace(runs: Runs, whole: Path, tmp_path: Path, draw: random.Random) -> None:
    """At any moment, while a checkpoint is written too, with loader workers and without."""
    folder = tmp_path / "run"
    last = _killed_again_and_again(runs, folder, draw, 20, ((), (), WORKERS))
    assert_same(folder, whole)
    assert 1 <= summary(folder)["resumed"] <= 20
    assert_told_alike(folder, whole, last.err)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), WORKERS])
def test_sixty_kills_leave_no_trace(
    runs: Runs, whole: Path, tmp_path: Path, draw: random.Random, more: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    last = _killed_again_and_again(runs, folder, draw, 60, (more,))
    assert_same(folder, whole)
    assert_told_alike(folder, whole, last.err)


def test_killed_before_the_first_checkpoint(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in (4, 7):
        runs(folder, *RESUME, before=at_step((step, KILL)), expect=-signal.SIGKILL)
    runs(folder, *RESUME)
    assert_same(folder, whole)
    assert summary(folder)["resumed"] == 0
    assert_told_alike(folder, whole)


def test_killed_after_an_epoch_nothing_of_it_is_lost_to_tensorboard(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs(folder, before=at_step((STEPS + 3, KILL)), expect=-signal.SIGKILL)
    err = runs(folder, *RESUME)
    assert_same(folder, whole)
    assert summary(folder)["resumed"] == 1
    assert_told_alike(folder, whole, err)


def test_killed_between_the_names_of_a_checkpoint(tmp_path: Path) -> None:
    """When ``previous.pt`` is the ``last.pt`` already and the new one has no name yet."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_atomically({"step": 1}, last, previous)
    os.link(last, previous)
    save_atomically({"step": 2}, last, previous)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert [torch.load(path)["step"] for path in (last, previous)] == [2, 1]


@pytest.mark.parametrize(
    "when", [pytest.param("while testing", marks=pytest.mark.slow), "before the student is written"]
)
def test_killed_after_training(runs: Runs, whole: Path, tmp_path: Path, when: str) -> None:
    folder, student = tmp_path / "run", tmp_path / "student.pt"
    dst = ("--set", f"models.student_model.dst_ckpt={student}")
    name = "_test" if when == "while testing" else "_write_student"
    before = f"import os, vkd_plugin.engine.run as r\nr.{name} = lambda *a: os.kill(os.getpid(), 9)\n"
    runs(folder, *dst, before=before, expect=-signal.SIGKILL)
    runs(folder, *dst, *RESUME)
    assert_same(folder, whole)
    assert student.exists()
    assert not differences(torch.load(student)["model"], loaded(whole, "best.pt")["model"])


# Damaged files.


def _save_two(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A ``last.pt`` and a ``previous.pt``, small ones of the same kind."""
    last = folder / "last.pt"
    states = [
        {
            "model": {f"layer{k}": torch.randn(5) for k in range(6)},
            "projectors": {},
            "optimizer": {"state": {0: {"exp_avg": torch.randn(3, 2)}}},
            "epoch": 1,
            "batch": step,
            "step": step,
            "ranks": [{"means": {"loss": [1.5, step]}}],
        }
        for step in (3, 4)
    ]
    for state in states:
        save_atomically(state, last, folder / "previous.pt")
    return last, states[1], states[0]


def _assert_last_or_previous(last: Path, newer: dict[str, Any], older: dict[str, Any], what: object) -> bool:
    """Whether ``last.pt`` was read."""
    try:
        source, state = read_newest(last)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert not differences(state, newer if source == last else older), what
    return source == last


def test_no_flipped_bit_is_loaded(tmp_path: Path, draw: random.Random) -> None:
    """Any of a thousand; where it does not matter, what is loaded is what was saved."""
    last, newer, older = _save_two(tmp_path)
    content = last.read_bytes()
    for bit in draw.sample(range(8 * len(content)), 1000):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        last.write_bytes(flipped)
        _assert_last_or_previous(last, newer, older, f"byte {bit // 8}, bit {bit % 8} of {len(content)}")


def test_no_flipped_bit_of_the_table_of_contents_is_loaded(tmp_path: Path) -> None:
    """That of the zip file, where checksums say nothing: method, flags, attributes, sizes and places."""
    last, newer, older = _save_two(tmp_path)
    content = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        (begin,) = [archive.start_dir]
        entry = next(k for k, item in enumerate(archive.infolist()) if item.filename.endswith("data/1"))
    for _ in range(entry):
        begin = content.index(b"PK\x01\x02", begin + 1)
    found = []
    for bit in range(8 * begin, 8 * (begin + 46)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        last.write_bytes(flipped)
        try:
            _assert_last_or_previous(last, newer, older, f"byte {bit // 8 - begin} of the entry, bit {bit % 8}")
        except AssertionError as error:
            found.append(str(error))
    assert not found


def test_truncated_at_any_length(tmp_path: Path, draw: random.Random) -> None:
    last, newer, older = _save_two(tmp_path)
    content = last.read_bytes()
    lengths = {0, 1, 22, len(content) - 1, len(content) - 22, *draw.sample(range(len(content)), 150)}
    for length in lengths:
        last.write_bytes(content[:length])
        read = _assert_last_or_previous(last, newer, older, length)
        assert not read or length > len(content) - 100, length  # of the digest itself, which comes last


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": lambda file: _flip(file, file.stat().st_size // 2),
    "missing": lambda file: file.unlink(),
    "garbage": lambda file: file.write_bytes(b"\x80\x02}" + bytes(range(256)) * 99),
    "of another kind": lambda file: torch.save({"model": {}}, file),
    "a list": lambda file: torch.save([1, 2], file),
}


@pytest.mark.parametrize("damage", [*(pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES), "half"])
def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(
    runs: Runs, whole: Path, copy: Path, damage: str
) -> None:
    last = copy / "checkpoints" / "last.pt"
    DAMAGES[damage](last)
    err = runs(copy, *EACH_STEP, *RESUME)
    (line,) = warnings(err, "going on from")
    assert str(last) in line
    assert str(last.with_name("previous.pt")) in line
    assert_same(copy, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_found(copy: Path, damage: str) -> None:
    last, previous = (copy / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    DAMAGES[damage](last)
    source, state = read_newest(last)
    assert source == previous
    assert state["step"] == STEPS + 4


def test_nothing_is_lost_when_both_are_damaged(runs: Runs, copy: Path, draw: random.Random) -> None:
    last, previous = (copy / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    DAMAGES[draw.choice(["empty", "half", "flipped", "garbage"])](last)
    DAMAGES[draw.choice(["empty", "half", "flipped", "garbage"])](previous)
    before = _contents(copy)
    (line,) = errors(runs(copy, *EACH_STEP, *RESUME, expect=2))
    assert str(last) in line
    assert str(previous) in line
    assert _contents(copy) == before
    assert_tidy(copy)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_flipped_bit_of_the_best_student_is_not_tested(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """A weight's exponent: the student's accuracy would be another one, and nobody would know why."""
    shutil.copytree(whole, tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    with zipfile.ZipFile(best) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    with best.open("rb") as file:
        content = file.read()
    _flip(best, content.index(largest.filename.encode()) + 4096)
    (line,) = errors(runs(tmp_path / "run", "-test_only", expect=2))
    assert str(best) in line


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_lost_metrics_are_missed(runs: Runs, whole: Path, copy: Path, damage: str) -> None:
    """An epoch that the checkpoint knows of does not vanish without a word."""
    file = copy / "metrics.jsonl"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40] + b"\0" * 99)
    err = runs(copy, *EACH_STEP, *RESUME)
    assert metrics(copy) == metrics(whole) or warnings(err, "metrics.jsonl")


# No room, no permission.


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at ``folder``; skips where it is not allowed to be."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if shutil.which("mount") is None or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of nine megabytes, which a run's files (1.5 MB a checkpoint) fit on."""
    with mounted(tmp_path / "disk", "size=9m") as folder:
        yield folder


def fill(disk: Path) -> str:
    """The action that leaves no room on ``disk``."""
    return (
        f"f = open({str(disk / 'ballast')!r}, 'wb', buffering=0)\n"
        "        try:\n"
        "            while f.write(bytes(4096)): pass\n"
        "        except OSError: pass\n"
        "        f.close()"
    )


def free(disk: Path) -> str:
    return f"os.unlink({str(disk / 'ballast')!r})"


def test_a_full_disk_stops_the_run_and_loses_nothing(runs: Runs, whole: Path, disk: Path) -> None:
    folder = disk / "run"
    (line,) = errors(runs(folder, *EACH_STEP, before=at_step((STEPS + 5, fill(disk))), expect=2))
    assert str(folder) in line
    assert "No space left on device" in line
    assert read_run_checkpoint(folder / "checkpoints" / "last.pt")["step"] == STEPS + 4
    assert_tidy(folder)
    (line,) = errors(runs(folder, *EACH_STEP, *RESUME, expect=2))  # still full
    assert "No space left on device" in line
    assert_tidy(folder)
    (disk / "ballast").unlink()
    err = runs(folder, *EACH_STEP, *RESUME)
    assert_same(folder, whole)
    assert summary(folder)["resumed"] == 1
    assert_told_alike(folder, whole, err)


def test_a_disk_that_is_full_for_a_while(runs: Runs, whole: Path, disk: Path) -> None:
    """From the middle of one epoch to the middle of the next."""
    folder = disk / "run"
    before = at_step((5, fill(disk)), (STEPS + 5, free(disk)))
    err = runs(folder, *CARRY_ON, before=before)
    assert warnings(err, "the run goes on")
    assert_same(folder, whole)


def test_a_disk_that_stays_full(runs: Runs, whole: Path, disk: Path) -> None:
    folder = disk / "run"
    err = runs(folder, *CARRY_ON, before=at_step((STEPS - 1, fill(disk))), expect=2)
    assert "No space left on device" in errors(err)[0]
    assert read_run_checkpoint(folder / "checkpoints" / "last.pt")["step"] == STEPS - 2
    assert_tidy(folder)
    (disk / "ballast").unlink()
    runs(folder, *CARRY_ON, *RESUME)
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [0, 4, 12, 100, 600, 1600, 2100, 3100])
def test_any_room_that_is_left(runs: Runs, whole: Path, disk: Path, kilobytes: int) -> None:
    """So that sometimes the log, the metrics, the best or the last checkpoint is the first not to fit."""
    folder = disk / "run"
    spare = disk / "spare"
    spare.write_bytes(bytes(1024 * kilobytes))
    before = at_step((STEPS - 2, fill(disk) + f"; os.unlink({str(spare)!r})"))
    runs(folder, "--set", "train.checkpoint={keep: 1}", before=before, expect=2)
    assert_tidy(folder)
    (disk / "ballast").unlink()
    runs(folder, "--set", "train.checkpoint={keep: 1}", *RESUME)
    assert_same(folder, whole)


def test_the_student_does_not_fit_on_its_disk(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """The run says so, and writes it when there is room."""
    with mounted(tmp_path / "small", "size=64k") as small:
        dst = ("--set", f"models.student_model.dst_ckpt={small}/student.pt")
        assert "student.pt" in errors(runs(tmp_path / "run", *dst, expect=2))[0]
        assert not list(small.iterdir())
    student = tmp_path / "student.pt"
    runs(tmp_path / "run", "--set", f"models.student_model.dst_ckpt={student}", *RESUME)
    assert student.exists()
    assert_same(tmp_path / "run", whole)


def test_a_read_only_folder(runs: Runs, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as folder:
        for output in (folder, folder / "run"):
            (line,) = errors(runs(output, expect=2))
            assert f"--output {output}: cannot write there: Read-only file system" in line


def test_a_folder_that_becomes_read_only(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """As when the kernel remounts a failing disk."""
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    with mounted(tmp_path / "probe", "size=1m"):
        pass  # skips where nothing can be mounted
    over = f"os.system('mount -t tmpfs -o ro none {checkpoints}')"
    try:
        (line,) = errors(runs(folder, *EACH_STEP, before=at_step((STEPS + 3, over)), expect=2))
    finally:
        subprocess.run(["umount", "--lazy", str(checkpoints)], check=True)
    assert str(checkpoints) in line
    assert "Read-only file system" in line
    assert loaded(folder)["step"] == STEPS + 2
    runs(folder, *EACH_STEP, *RESUME)
    assert_same(folder, whole)


@pytest.mark.parametrize("name", [".lock", "checkpoints", "metrics.jsonl", "log.txt", "config.yaml", "summary.json"])
def test_something_in_the_way(runs: Runs, tmp_path: Path, name: str) -> None:
    """A folder where a file is to be, or the other way round; also at the end of a run, before its summary."""
    folder = tmp_path / "run"
    folder.mkdir()
    if name == "checkpoints":
        (folder / name).write_text("mine")
    else:
        (folder / name).mkdir()
    (line,) = errors(runs(folder, *LITTLE, expect=2))
    assert str(folder) in line
    assert (folder / name).exists()
    assert_tidy(folder)


# Workers of data loaders.


def test_a_worker_that_is_killed(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = QUICK_TO_NOTICE + at_step((4, KILL_A_WORKER), (STEPS + 2, KILL_A_WORKER), (2 * STEPS, KILL_A_WORKER))
    err = runs(folder, *WORKERS, before=before)
    assert warnings(err, "New workers go on at batch")
    assert_same(folder, whole)
    assert_told_alike(folder, whole, err)


def test_workers_that_are_killed_again_and_again(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = QUICK_TO_NOTICE + AT_STEPS + f"def now(step):\n    {KILL_A_WORKER}\n"
    err = runs(folder, "--set", "train.train_data_loader.kwargs={batch_size: 4, num_workers: 2, prefetch_factor: 1}",
               before=before, expect=2)  # fmt: skip
    assert "data loader workers keep dying" in errors(err)[0]
    assert len(warnings(err, "New workers go on at batch")) == 3


@pytest.mark.slow
def test_a_worker_of_the_validation_that_is_killed(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loader = "--set", "train.val_data_loader.kwargs={batch_size: 50, num_workers: 2}"
    run = runs.start(folder, *loader, before=QUICK_TO_NOTICE + SLOW_EVALUATION)
    run.says("evaluates")
    os.kill(run.children()[0], signal.SIGKILL)
    err = ended(run)
    assert warnings(err, "New workers go on at batch")
    # Another batch size for the same images, so sums round differently.
    assert [record["val/top1"] for record in metrics(folder)] == [record["val/top1"] for record in metrics(whole)]


# Several processes.


@pytest.fixture(scope="module")
def pair(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    for run in runs.together(folder, 2, *HALF_BATCH, checked=True):
        ended(run)
    return folder


HALF_BATCH = ("--set", "train.train_data_loader.kwargs.batch_size=16")
JOB = ("--set", "train.checkpoint={every_steps: 1}", *HALF_BATCH)


def test_a_signal_to_one_of_two_processes(runs: Runs, pair: Path, tmp_path: Path, draw: random.Random) -> None:
    """To any of them after any step, the last one of the last epoch included."""
    folder, rank, step = tmp_path / "run", draw.randrange(2), draw.randint(1, EPOCHS * STEPS)
    both = runs.together(folder, 2, *HALF_BATCH, before=at_step((step, TERM)), only=rank)
    assert [run.wait() for run in both] == [75, 75], step
    assert sum(len(errors(run.err)) for run in both) == 1
    assert step <= loaded(folder)["step"] <= step + 1  # all processes have heard of it one step later
    for run in runs.together(folder, 2, *HALF_BATCH, *RESUME, *WORKERS[:2]):
        ended(run)
    assert_same(folder, pair)


@pytest.mark.slow
def test_two_processes_that_are_killed(runs: Runs, pair: Path, tmp_path: Path, draw: random.Random) -> None:
    """The one that is left ends by itself; together they go on from the last checkpoint."""
    folder, rank = tmp_path / "run", draw.randrange(2)
    both = runs.together(folder, 2, *JOB, before=at_step((STEPS + 5, KILL)), only=rank)
    assert both[rank].wait() == -signal.SIGKILL
    assert both[1 - rank].wait() == 2
    assert errors(both[1 - rank].err) == ["error: another process of this run has ended"]
    for run in runs.together(folder, 2, *JOB, *RESUME):
        ended(run)
    assert_same(folder, pair)


@pytest.mark.parametrize(("number", "workers"), [pytest.param(1, 0, marks=pytest.mark.slow), (3, 2)])
def test_each_sample_once_whatever_the_number_of_processes(
    runs: Runs, tmp_path: Path, number: int, workers: int
) -> None:
    """Half an epoch on two processes, the other half on one or three, some of them with loader workers."""
    folder, file = tmp_path / "run", tmp_path / "images"
    fraction = 0.1481
    size = len(Digits("train", fraction=fraction))
    assert size == 192  # 6 steps of 2 * 8 and 4 of 3 * 8, or 6 of 16
    more = (
        "--set", f"datasets.digits/train.init.kwargs.fraction={fraction}", "--set", "train.num_epochs=1",
        "--set", "train.train_data_loader.kwargs.batch_size=8",
    )  # fmt: skip
    note = NOTE_IMAGES.format(file=str(file))
    both = runs.together(folder, 2, *more, before=at_step((5, TERM)) + note)
    assert [run.wait() for run in both] == [75, 75]
    assert loaded(folder)["samples"] == 96
    resumed = ("--set", f"train.train_data_loader.kwargs.num_workers={workers}", *RESUME)
    for run in runs.together(folder, number, *more, *resumed, before=note):
        ended(run)
    seen = Counter(file.read_text().splitlines())
    assert sum(seen.values()) == size
    images = Digits("train", transform=_as_trained, fraction=fraction)
    expected = Counter(f"0 {hashlib.sha1(images[k][0].numpy().tobytes()).hexdigest()}" for k in range(size))
    assert seen == expected


def _as_trained(image: Any) -> torch.Tensor:
    from torchvision.transforms import Compose, Normalize, ToTensor

    return Compose([ToTensor(), Normalize([0.3], [0.37])])(image)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_in_one_of_two_processes(runs: Runs, tmp_path: Path, draw: random.Random) -> None:
    folder, rank, bad = tmp_path / "run", draw.randrange(2), STEPS + 4
    spoil = NOT_A_NUMBER.format(steps=[bad], file=str(tmp_path / "batches"))
    both = runs.together(folder, 2, *JOB, before=spoil, only=rank)
    assert [run.wait() for run in both] == [3, 3]
    (line,) = [line for run in both for line in errors(run.err)]
    assert "vkd nan" in line
    assert f"nonfinite-step{bad}-rank{rank}.json" in line
    told = json.loads((folder / f"nonfinite-step{bad}-rank{rank}.json").read_text())
    given = [json.loads(text) for text in (tmp_path / "batches").read_text().splitlines()]
    (samples,) = [indices for size, epoch, batch, indices in given if size == 389 and (epoch, batch) == (1, 3)]
    assert told["samples"] == samples
    assert loaded(folder)["step"] == bad - 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at a checkpoint", "at the end"])
def test_a_full_disk_under_two_processes(runs: Runs, pair: Path, disk: Path, when: str) -> None:
    folder, more = disk / "run", (*(JOB if when == "at a checkpoint" else CARRY_ON), *HALF_BATCH)
    both = runs.together(folder, 2, *more, before=at_step((STEPS + 4, fill(disk))), only=0)
    assert [run.wait() for run in both] == [2, 2]
    (line,) = [line for run in both for line in errors(run.err)]
    assert "No space left on device" in line
    (disk / "ballast").unlink()
    for run in runs.together(folder, 2, *more, *RESUME):
        ended(run)
    assert_same(folder, pair)


def torchrun(output: Path, *more: str, restarts: int = 0, program: str = "run.py") -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        f"--max-restarts={restarts}", "--monitor-interval=0.1", program, *SHORT, *NO_STUDENT, *HALF_BATCH,
        "--output", str(output), *more,
    ]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def program(folder: Path, before: str) -> str:
    """A file that is ``run.py`` after ``before``."""
    file = folder / "program.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{before}\n{(ROOT / 'run.py').read_text()}")
    return str(file)


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_its_launcher(pair: Path, tmp_path: Path, draw: random.Random) -> None:
    """And the job goes on without being told to; what the folder held before is another matter."""
    rank = draw.randrange(2)
    file = program(
        tmp_path,
        at_step(
            (
                STEPS + 5,
                f"os.environ['RANK'] == '{rank}' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and {KILL}",
            )
        ),
    )
    job = torchrun(tmp_path / "run", *JOB[:2], restarts=3, program=file)
    _, err = job.communicate(timeout=GENEROUS)
    assert job.returncode == 0, err
    assert f"resumed from {tmp_path}/run/checkpoints/last.pt" in err
    assert_same(tmp_path / "run", pair)
    assert summary(tmp_path / "run")["resumed"] == 1


def test_a_job_that_is_started_again_does_not_take_an_earlier_run_for_its_own(
    runs: Runs, whole: Path, tmp_path: Path
) -> None:
    """A process has died before the first attempt came to move the earlier run aside."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    job = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "another job"}
    err = ended(runs.start(folder, *LITTLE, "--seed", "5", **job))
    assert "this run is finished" not in err
    assert (tmp_path / "run.1" / "summary.json").exists()
    assert summary(folder)["seed"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank", "all of them"])
def test_a_signal_under_a_launcher(pair: Path, tmp_path: Path, whom: str) -> None:
    """Some schedulers tell the launcher, others every process that there is."""
    folder = tmp_path / "run"
    file = program(tmp_path, AT_STEPS + "def now(step):\n    time.sleep(0.1)\n")
    job = torchrun(folder, "--set", "train.checkpoint={every_steps: 3}", program=file)
    until((folder / "checkpoints" / "last.pt").exists)
    ranks = children(job.pid)
    assert len(ranks) == 2
    for pid in {"launcher": [job.pid], "rank": ranks[1:], "all of them": [job.pid, *ranks]}[whom]:
        os.kill(pid, signal.SIGTERM)
    _, err = job.communicate(timeout=GENEROUS)
    assert "all saved" in err, err
    if whom == "rank":
        assert "75" in re.findall(r"exitcode +: (\d+)", err)
    again = torchrun(folder, "--set", "train.checkpoint={every_steps: 3}", *RESUME)
    _, err = again.communicate(timeout=GENEROUS)
    assert again.returncode == 0, err
    assert_same(folder, pair)


# Two runs, one folder.


def test_the_folder_is_free_as_soon_as_its_run_is_killed(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """While the workers that the killed run leaves behind are still there."""
    folder = tmp_path / "run"
    first = runs.start(folder, *EACH_STEP, *WORKERS, before=at_step((STEPS + 3, WAIT)))
    first.says("here")
    before = _contents(folder)
    (line,) = errors(runs(folder, *EACH_STEP, *RESUME, expect=2))
    assert line == f"error: --output {folder}: another run is writing there"
    assert _contents(folder) == before
    workers = first.children()
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that they do not notice before it is tested
    first.signal(signal.SIGKILL)
    first.wait()
    runs(folder, *EACH_STEP, *RESUME)
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    assert_same(folder, whole)
    until(lambda: not any(_alive(worker) for worker in workers))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


# Signals.


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize(
    "order", [None, *(pytest.param(order, marks=pytest.mark.slow) for order in itertools.permutations(SIGNALS))]
)
def test_signals_stop_after_saving(
    runs: Runs, whole: Path, tmp_path: Path, draw: random.Random, order: tuple[signal.Signals, ...] | None
) -> None:
    """One while it trains, another one while it validates, the third one while it tests what it has trained."""
    first, second, third = order or draw.sample(SIGNALS, 3)
    folder, step = tmp_path / "run", draw.randint(1, STEPS)
    runs(folder, before=at_step((step, f"os.kill(os.getpid(), {int(first)})")), expect=75)
    assert loaded(folder)["step"] == step
    run = runs.start(folder, *RESUME, before=SLOW_EVALUATION)
    run.says("evaluates")
    run.signal(second)
    assert "before the validation of epoch 1, all saved" in ended(run, 75)
    run = runs.start(folder, *RESUME, before=SLOW_TEST)
    run.says("evaluates")
    run.signal(third)
    assert "training is finished and saved" in ended(run, 75)
    err = runs(folder, *RESUME)
    assert_same(folder, whole)
    assert_told_alike(folder, whole, err)
    assert summary(folder)["resumed"] == 3


@pytest.mark.parametrize("signals", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_signals_at_any_moment(runs: Runs, whole: Path, tmp_path: Path, draw: random.Random, signals: int) -> None:
    """While it sets up, trains, saves, validates, tests or ends."""
    folder = tmp_path / "run"
    for _ in range(signals):
        number = draw.choice(SIGNALS)
        before = DISTURBED_WRITES.format(seed=draw.randrange(2**32), sleep=0.005, kill=0)
        more = draw.choice([(), EACH_STEP, WORKERS])
        run = runs.start(folder, *RESUME, *more, before=before, checked=True)
        time.sleep(draw.uniform(0.0, 2.0))
        run.signal(number)
        code = run.wait()
        assert code in (0, 75, -number, 130), f"{code}\n{run.err}"
        if code:  # else it may have interrupted the interpreter's own end
            assert "Traceback" not in run.err, run.err
        assert len(errors(run.err)) == (1 if code in (75, 130) else 0), run.err
        assert (code == 75) == ("--resume auto" in run.err)
    runs(folder, *RESUME)
    assert_same(folder, whole)


def test_a_second_signal_ends_at_once(runs: Runs, tmp_path: Path) -> None:
    """In the middle of a step that does not end."""
    run = runs.start(tmp_path / "run", *EACH_STEP, before=at_step((5, STUCK)))
    run.says("here")
    run.signal(signal.SIGTERM)
    time.sleep(1.5)  # within a second of each other, several signals may be one request
    assert not run.ended()
    begun = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 10
    assert loaded(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_workers_too(runs: Runs, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C, systemd and some schedulers others: to each process. It counts once."""
    folder = tmp_path / "run"
    slow = (
        QUICK_TO_NOTICE
        + AT_STEPS
        + "def now(step):\n    step == 5 and print('here', flush=True)\n    time.sleep(0.1)\n"
    )
    run = runs.start(folder, *WORKERS, before=slow)
    run.says("here")
    run.signal_group(number)
    assert "all saved" in ended(run, 75)
    runs(folder, *RESUME)
    assert_same(folder, whole)


# Another experiment.


def test_another_experiment_is_refused(runs: Runs, copy: Path) -> None:
    before = _contents(copy)
    change = ("--set", "train.optimizer.kwargs.lr=1.0e-3", "--set", "train.ema.decay=0.8")
    (line,) = errors(runs(copy, *EACH_STEP, *change, *RESUME, expect=2))
    assert "train.optimizer.kwargs.lr: 0.003 -> 0.001" in line
    assert "train.ema.decay: 0.9 -> 0.8" in line
    (line,) = errors(runs(copy, *EACH_STEP, "--seed", "1", *RESUME, expect=2))
    assert "--seed: 0 -> 1" in line
    assert _contents(copy) == before
    err = runs(copy, *EACH_STEP, *change, *RESUME, "--allow-config-change", checked=True)
    assert "train.optimizer.kwargs.lr: 0.003 -> 0.001" in err
    assert len(metrics(copy)) == EPOCHS


def test_changes_that_change_nothing(runs: Runs, whole: Path, copy: Path, tmp_path: Path) -> None:
    student = tmp_path / "other.pt"
    more = ("--set", "train.log_freq=3", "--set", f"models.student_model.dst_ckpt={student}", *WORKERS)
    runs(copy, *more, *RESUME)
    assert_same(copy, whole)
    assert student.exists()


def test_a_finished_run_stays_as_it_is(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = _contents(folder)
    assert "this run is finished" in runs(folder, *RESUME)
    assert _contents(folder) == before


# Numbers that are not finite.


def test_a_loss_that_is_not_a_number(runs: Runs, whole: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "batches"
    bad = STEPS + 4
    spoil = NOT_A_NUMBER.format(steps=[bad], file=str(file))
    err = runs(folder, *EACH_STEP, before=spoil, checked=True, expect=3)
    assert "the loss is nan (ce " in errors(err)[0]
    assert "vkd nan" in errors(err)[0]
    (found,) = folder.glob("nonfinite-step*.json")
    assert found.name == f"nonfinite-step{bad}.json"
    told = json.loads(found.read_text())
    given = [json.loads(line) for line in file.read_text().splitlines()]
    (samples,) = [indices for size, epoch, batch, indices in given if size == 389 and (epoch, batch) == (1, 3)]
    assert told["samples"] == samples
    assert (told["step"], told["epoch"], told["batch"]) == (bad, 2, 3)
    assert "loss/vkd" in told["not_finite"]
    assert told["values"]["loss/vkd"] == "nan"
    assert isinstance(told["values"]["loss/ce"], float)
    assert told["weight_norms"]
    state = loaded(folder)
    assert state["step"] == bad - 1
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())
    runs(folder, *EACH_STEP, *RESUME)
    assert_same(folder, whole)


def test_steps_that_are_left_out(runs: Runs, tmp_path: Path) -> None:
    """Two are allowed; the third ends the run."""
    folder, skip = tmp_path / "run", ("--set", "train.skip_nonfinite=2", *EACH_STEP)
    record = (
        "import shutil, vkd_plugin.engine.checkpoint as c\n_save = c.Checkpoints.save_last\n"
        "def _kept(self, state):\n    _save(self, state)\n"
        "    shutil.copy(self.last, self.last.with_name('step%d.keep' % state['step']))\n"
        "c.Checkpoints.save_last = _kept\n"
    )
    spoil = NOT_A_NUMBER.format(steps=[3, 4, 9], file=str(tmp_path / "batches"))
    err = runs(folder, *skip, before=spoil + record, expect=3)
    assert re.findall(r"step (\d+) left out: the loss is nan .*\((\d) more allowed\)", err) == [("3", "1"), ("4", "0")]
    assert {path.name for path in folder.glob("nonfinite-*")} == {f"nonfinite-step{step}.json" for step in (3, 4, 9)}
    before, third, fourth, fifth = (loaded(folder, f"step{step}.keep") for step in (2, 3, 4, 5))
    for part in ("model", "projectors", "ema"):
        assert not differences(before[part], third[part], part)
        assert not differences(before[part], fourth[part], part)
    assert not differences(before["optimizer"]["state"], fourth["optimizer"]["state"])
    assert differences(fourth["model"], fifth["model"])
    assert loaded(folder)["step"] == 8
    runs(folder, *skip, *RESUME)
    assert summary(folder)["skipped_nonfinite"] == 2
    assert metrics(folder)[0]["skipped_nonfinite"] == 2


def test_what_the_scaler_leaves_out_is_counted(runs: Runs, tmp_path: Path) -> None:
    """Its factor begins far too large; a run that is stopped meanwhile goes on with it."""
    folder = tmp_path / "run"
    amp = (
        "--set", "train.amp={dtype: float16}",
        "--set", "datasets.digits/train.init.kwargs.fraction=0.1",
        "--set", "train.train_data_loader.kwargs.batch_size=8",
    )  # fmt: skip
    large = (
        "import torch\n_init = torch.amp.GradScaler.__init__\n"
        "def _large(self, *a, **k):\n    _init(self, *a, **{**k, 'init_scale': 2.0**26})\n"
        "torch.amp.GradScaler.__init__ = _large\n"
    )
    runs(tmp_path / "other", *amp, before=large)
    assert summary(tmp_path / "other")["scaler_skips"] > 3
    runs(folder, *amp, before=large + at_step((3, TERM)), expect=75)
    runs(folder, *amp, *RESUME)
    assert_same(folder, tmp_path / "other")
    assert metrics(folder)[-1]["scaler_skips"] == summary(folder)["scaler_skips"]
