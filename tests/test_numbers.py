"""Figures of the steps, and what is done about those that are not finite."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import ImageFolder

from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.datasets import Digits
from vkd_plugin.engine.board import Board
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.build import build_model
from vkd_plugin.engine.guard import (
    SCALER_SKIPS_IN_A_ROW,
    NumberGuard,
    Verdict,
    diagnosis,
    explain,
    sample_paths,
    weights_are_finite,
)
from vkd_plugin.engine.loaders import build_loader, samples_of, set_position
from vkd_plugin.engine.meter import Means, Readback, StepFigures, total
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf

finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200)
any_float = st.sampled_from([0.0, 1.5, -2.0, 1e300, NAN, INF, -INF])


# Means.


@settings(deadline=None, max_examples=150)
@given(st.lists(finite, min_size=1, max_size=60))
def test_sums_are_as_exact_as_float64_allows(values: list[float]) -> None:
    """n - 1 additions, each rounded by half an ulp of what it comes to: at most (n - 1) u sum |x| (1 + O(n u))."""
    means = Means()
    for value in values:
        means.add({"loss": value})
    ((found, number),) = means.state().values()
    bound = Fraction(len(values) - 1) * Fraction(2) ** -53 * sum(abs(Fraction(value)) for value in values)
    assert abs(Fraction(found) - sum(map(Fraction, values))) <= bound * Fraction(1001, 1000)
    assert number == len(values)
    assert found == pytest.approx(math.fsum(values), rel=1e-12, abs=float(bound) * 1.01)


figures = st.dictionaries(st.sampled_from(["loss", "loss/ce", "gradient_norm"]), finite, max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.lists(figures, max_size=12), st.integers(0, 12))
def test_means_go_on_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, float]], at: int
) -> None:
    whole, first, second = Means(), Means(), Means()
    for step in steps:
        whole.add(step)
    for step in steps[:at]:
        first.add(step)
    file = tmp_path_factory.getbasetemp() / "means.pt"
    torch.save(first.state(), file)
    second.load(torch.load(file, weights_only=True))
    for step in steps[at:]:
        second.add(step)
    assert second.state() == whole.state()
    state = second.state()
    for entry in state.values():
        entry[0] = NAN  # a copy
    assert second.state() == whole.state()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(figures, max_size=5), min_size=1, max_size=4))
def test_processes_are_added_up(processes: list[list[dict[str, float]]]) -> None:
    states = []
    for steps in processes:
        means = Means()
        for step in steps:
            means.add(step)
        states.append(means.state())
    before = json.dumps(states)
    sums, together = total(states), Means()
    together.load(*states)
    assert together.state() == sums
    for name, (value, number) in sums.items():
        parts = [state[name] for state in states if name in state]
        assert number == sum(part[1] for part in parts)
        exact = math.fsum(part[0] for part in parts)
        assert abs(value - exact) <= 4 * 2**-53 * math.fsum(abs(part[0]) for part in parts)
    together.add({"loss": 1.0})
    assert json.dumps(states) == before
    together.clear()
    assert together.state() == {}


# Reading back.


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(any_float, any_float), max_size=8), st.booleans())
def test_on_a_cpu_figures_come_back_at_once_in_order(values: list[tuple[float, float]], wait: bool) -> None:
    readback = Readback()
    sent = []
    for step, (one, two) in enumerate(values):
        loss, norm = torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64)
        readback.send(StepFigures(step, 0, step), {"loss": loss, "norm": norm})
        sent.append({"loss": one, "norm": two})
        loss.fill_(7)  # a later step may use the memory again
    arrived = list(readback.arrived(wait))
    assert [figures.step for figures in arrived] == list(range(len(values)))
    assert repr([figures.values for figures in arrived]) == repr(sent)
    assert list(readback.arrived(wait=True)) == []


def test_scalars_of_all_kinds_come_back() -> None:
    readback = Readback()
    values = {
        "half": torch.tensor(0.1).half(), "brain": torch.tensor([0.1]).bfloat16(), "whole": torch.tensor(3),
        "flag": torch.tensor(True), "trained": torch.ones((), requires_grad=True) * 2,
    }  # fmt: skip
    readback.send(StepFigures(1, 0, 0, values={"before": 1.0}), values)
    (figures,) = readback.arrived()
    expected = {"before": 1.0, "half": 0.0999755859375, "brain": 0.10009765625, "whole": 3, "flag": 1, "trained": 2}
    assert figures.values == expected


# Verdicts.


def step(loss: float, norm: float | None = None, term: float = 1.0, number: int = 1) -> StepFigures:
    values = {"loss": loss, "loss/ce": term} | ({} if norm is None else {"gradient_norm": norm})
    return StepFigures(number, 0, number - 1, values=values)


class Model:
    """What the guard's docstrings promise, said once more."""

    def __init__(self, scaled: bool, allowed: int) -> None:
        self.scaled, self.allowed = scaled, allowed
        self.skipped = self.overflows = self.row = 0
        self.left_out = False  # the optimizer's step that these batches go into

    def judge(self, loss: float, norm: float | None) -> str:
        bad = not math.isfinite(loss)
        steps = norm is not None
        overflow = norm is not None and not math.isfinite(norm)
        known, self.left_out = self.left_out, self.left_out and not steps
        if known and (bad or overflow):
            return "SKIPPED_TOO"
        if self.scaled and overflow and not bad:
            self.overflows += 1
            self.row += 1
            return "SCALER" if self.row <= SCALER_SKIPS_IN_A_ROW else "STOP"
        if steps:
            self.row = 0
        if not (bad or overflow):
            return "FINE"
        if self.skipped < self.allowed:
            self.skipped += 1
            self.left_out = not steps
            return "SKIPPED"
        return "STOP"


numbers = st.sampled_from([1.0, 1.0, 1.0, NAN, INF, -INF])


@settings(deadline=None, max_examples=200)
@given(
    st.booleans(), st.integers(0, 4),
    st.lists(st.tuples(numbers, numbers, st.none() | numbers), max_size=25), st.integers(0, 25),
)  # fmt: skip
def test_verdicts(scaled: bool, allowed: int, steps: list[tuple[float, float, float | None]], resumed_at: int) -> None:
    guard, model = NumberGuard(scaled, allowed), Model(scaled, allowed)
    for number, (loss, term, norm) in enumerate(steps):
        if number == resumed_at:
            state = json.loads(json.dumps(guard.state()))
            guard = NumberGuard(scaled, allowed)
            guard.load(state)
        verdict = guard.judge(step(loss, norm, term, number + 1))
        assert verdict.name == model.judge(loss, norm)
        assert (guard.skipped, guard.scaler_skips) == (model.skipped, model.overflows)
        assert guard.recent[-1].step == number + 1
        if verdict is Verdict.STOP:
            break


def test_the_scaler_may_leave_out_steps_but_not_for_ever() -> None:
    guard = NumberGuard(scaled=True)
    for _ in range(2):
        for _ in range(SCALER_SKIPS_IN_A_ROW):
            assert guard.judge(step(1.0)) is Verdict.FINE  # a batch of an accumulation
            assert guard.judge(step(1.0, INF)) is Verdict.SCALER
        assert guard.judge(step(1.0, 1.0)) is Verdict.FINE
    for _ in range(SCALER_SKIPS_IN_A_ROW):
        assert guard.judge(step(1.0, NAN)) is Verdict.SCALER
    assert guard.judge(step(1.0, NAN)) is Verdict.STOP
    assert guard.scaler_skips == 3 * SCALER_SKIPS_IN_A_ROW + 1
    assert guard.skipped == 0


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (step(NAN, term=INF), "the loss is nan (ce inf)"),
        (StepFigures(1, 0, 0, values={"loss": -INF}), "the loss is -inf"),
        (step(1.5, INF), "the gradient's norm is inf at a loss of 1.5"),
    ],
)
def test_what_was_not_finite_in_half_a_line(figures: StepFigures, text: str) -> None:
    assert explain(figures) == text


# Diagnoses.


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


index = st.integers(0, 9) | st.integers(0, 9).map(np.int64) | st.integers(0, 9).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(["loss/a", "gradient_norm"]), any_float), st.lists(index, max_size=4), st.data())
def test_a_diagnosis_is_json_and_keeps_what_kind_of_bad_it_was(
    values: dict[str, float], samples: list[Any], data: st.DataObject
) -> None:
    loss = data.draw(any_float)
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(data.draw(any_float.filter(lambda value: abs(value) != 1e300)))
    norms = torch.tensor([data.draw(any_float), 1.0], dtype=torch.float64)
    figures = StepFigures(3, 1, 2, values={"loss": loss, **values}, gradients=(list(layer.parameters()), norms))
    recent = [step(NAN, number=2), figures, step(INF, number=4)]
    found = diagnosis(figures, recent, samples, ["a.png"], dict(layer.named_parameters()), rank=1)
    read = _strict(json.dumps(found, allow_nan=False))
    assert (read["step"], read["epoch"], read["batch"], read["rank"]) == (3, 2, 2, 1)
    assert read["samples"] == [int(sample) for sample in samples]
    for name, value in figures.values.items():
        assert repr(float(read["values"][name])) == repr(value)
    assert set(read["not_finite"]) == {name for name, value in figures.values.items() if not math.isfinite(value)}
    assert read["gradient_norms"].keys() == read["weight_norms"].keys() == {"weight", "bias"}
    assert [entry["step"] for entry in read["recent"]] == [2, 3]


def test_the_worst_parameters_come_first_and_not_all_of_thousands() -> None:
    layers = nn.ModuleDict({f"l{i}": nn.Linear(1, 1, bias=False) for i in range(200)})
    with torch.no_grad():
        for place, parameter in enumerate(layers.parameters()):
            parameter.fill_(float(place))
        dict(layers.named_parameters())["l7.weight"].fill_(NAN)
    found = diagnosis(step(NAN), [], None, None, dict(layers.named_parameters()), 0)["weight_norms"]
    assert list(found)[:3] == ["l7.weight", "l199.weight", "l198.weight"]
    assert found["l7.weight"] == "nan"
    assert len(found) < 200


def test_the_files_of_a_batch(tmp_path: Path) -> None:
    for place in range(6):
        (tmp_path / "ab"[place % 2]).mkdir(exist_ok=True)
        Image.new("L", (2, 2), place).save(tmp_path / "ab"[place % 2] / f"{place}.png")
    images = ImageFolder(str(tmp_path), transform=lambda image: np.asarray(image)[0, 0, 0].item())
    for supplement in (False, True):
        config = {"requires_supp": supplement, "kwargs": {"batch_size": 4}}
        loader = build_loader(images, config, train=True, seed=1)
        set_position(loader, 2)
        for batch, (pixels, *_) in enumerate(loader):
            samples = samples_of(loader, batch)
            paths = sample_paths(loader.dataset, samples or [])
            assert paths is not None
            assert [int(Path(path).stem) for path in paths] == pixels.tolist()


@pytest.mark.parametrize("samples", [None, 3, [], torch.zeros(4, 2), np.zeros((4, 2)), [torch.zeros(3)], [1]])
def test_other_data_sets_have_no_files(samples: Any) -> None:
    class Data(torch.utils.data.Dataset[Any]):
        pass

    dataset = Data()
    dataset.samples = samples  # type: ignore[attr-defined]
    assert sample_paths(dataset, [0]) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_one_bad_weight_is_found(sizes: list[int], data: st.DataObject) -> None:
    tensors = [torch.zeros(size, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16]))) for size in sizes]
    tensors.append(torch.ones(3, dtype=torch.int64))
    assert weights_are_finite(iter(tensors))
    full = [tensor for tensor in tensors[:-1] if len(tensor)]
    if full:
        tensor = data.draw(st.sampled_from(full))
        tensor[data.draw(st.integers(0, len(tensor) - 1))] = data.draw(st.sampled_from([NAN, INF, -INF]))
        assert not weights_are_finite(iter(tensors))


# Steps that are left out.


def box_of(optimizer: str, *more: str) -> EngineBox:
    sections = [f"train.optimizer={optimizer}", "train.train_data_loader.kwargs.batch_size=16", *more]
    experiment = load_experiment(str(ROOT / "configs/digits/ce/digits_cnn.yaml"), sections)
    torch.manual_seed(0)
    return Trainer(experiment, None, build_model(experiment, "model", CPU, False), Processes(0, 1, CPU), None, 0).box


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        images = torch.randn(8, 1, 8, 8, generator=generator)
        yield images, torch.randint(10, (8,), generator=generator)


def take(box: EngineBox, images: Tensor, labels: Tensor, offset: float = 0.0) -> Tensor:
    loss = box.forward_process(images, labels, {})
    box.post_forward_process(loss=loss + offset)
    return loss


def snapshot(box: EngineBox) -> dict[str, Tensor]:
    flat = {f"model.{name}": tensor.clone() for name, tensor in box.bare_student.state_dict().items()}
    for place, state in box.optimizer.state_dict()["state"].items():
        flat |= {
            f"{place}.{name}": torch.as_tensor(value).clone() for name, value in state.items() if value is not None
        }
    return flat


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if bits(one[name]) != bits(two[name])] == []


OPTIMIZERS = [
    "{lr: 0.05, momentum: 0.9}", "{lr: 0.05, momentum: 0.9, fused: true}", "{lr: 1.0e-2}",
    "{lr: 1.0e-2, fused: true}", "{lr: 1.0e-2, amsgrad: true, fused: true}", "{lr: 1.0e-2, foreach: true}",
]  # fmt: skip


def _optimizer(kwargs: str, *more: str) -> str:
    key = "SGD" if "momentum" in kwargs else "AdamW"
    return f"{{{', '.join([f'key: {key}', f'kwargs: {kwargs}', *more])}}}"


@pytest.mark.parametrize("kwargs", OPTIMIZERS)
@pytest.mark.parametrize(("accumulated", "clipped"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("bad", ["images", "loss"])
@pytest.mark.parametrize("clean_before", [0, 2])
def test_a_step_that_is_left_out_changes_nothing(
    kwargs: str, accumulated: int, clipped: bool, bad: str, clean_before: int
) -> None:
    """Nan images spoil BatchNorm's statistics as well; an infinite loss may have finite gradients."""
    more = [f"grad_accum_step: {accumulated}"] + ["max_grad_norm: 0.5"] * clipped
    spoilt, clean = (box_of(_optimizer(kwargs, *more), "train.skip_nonfinite=9") for _ in range(2))
    steps = [list(batches(accumulated)) for _ in range(clean_before + 2)]
    for batch in [batch for step in steps[:clean_before] for batch in step]:
        for box in (spoilt, clean):
            take(box, *batch)
    before = snapshot(spoilt)
    for place in range(accumulated):  # whichever of its batches is bad
        torch.empty(200_000).fill_(NAN)  # what memory may hold that nobody has written to
        for number, (images, labels) in enumerate(steps[clean_before]):
            poison = number == place
            images = torch.full_like(images, NAN) if poison and bad == "images" else images
            take(spoilt, images, labels, INF if poison and bad == "loss" else 0.0)
        after = snapshot(spoilt)
        if clean_before:
            assert_equal(after, before)
        else:  # state may have been made; what it holds shows in the next step
            assert_equal({name: after[name] for name in before}, before)
    for batch in steps[-1]:
        for box in (spoilt, clean):
            take(box, *batch)
    assert_equal(snapshot(spoilt), snapshot(clean))


@pytest.mark.parametrize("bad", ["images", "loss"])
def test_with_float16_too(bad: str) -> None:
    box = box_of("{key: AdamW, kwargs: {lr: 1.0e-2}}", "train.amp={dtype: float16}", "train.skip_nonfinite=9")
    box.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for batch in batches(2):
        take(box, *batch)
    before = snapshot(box)
    (images, labels), *_ = batches(1)
    take(box, torch.full_like(images, NAN) if bad == "images" else images, labels, INF if bad == "loss" else 0.0)
    assert_equal(snapshot(box), before)
    take(box, images, labels)
    assert weights_are_finite(box.student.parameters())
    after = snapshot(box)
    assert all(bits(after[name]) != bits(tensor) for name, tensor in before.items() if name.endswith("weight"))


def test_without_permission_nothing_is_put_back() -> None:
    box = box_of("{key: SGD, kwargs: {lr: 0.1}}")
    (images, labels), *_ = batches(1)
    take(box, torch.full_like(images, NAN), labels)
    assert not weights_are_finite(box.student.parameters())


BAD = 7  # an image


@pytest.fixture
def _one_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    item = Digits.__getitem__

    def spoilt(self: Digits, place: int) -> Any:
        image, label = item(self, place)
        return (torch.full_like(image, NAN) if place == BAD and len(self) < 500 else image), label

    monkeypatch.setattr(Digits, "__getitem__", spoilt)
    monkeypatch.chdir(ROOT)


def _train(folder: Path, *more: str) -> int:
    sections = [
        "train.num_epochs=2", "datasets.digits/train.init.kwargs.fraction=0.1", "models.model.dst_ckpt=null",
        "train.train_data_loader.kwargs={batch_size: 16}", *more,
    ]  # fmt: skip
    config = ["--config", "configs/digits/ce/digits_cnn.yaml", "--output", str(folder), "--device", "cpu"]
    return main(config + [argument for section in sections for argument in ("--set", section)])


@pytest.mark.usefixtures("_one_bad_image")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_leaves_out_what_it_is_allowed_to_and_says_which_samples(tmp_path: Path, accumulated: int) -> None:
    every = f"train.optimizer.grad_accum_step={accumulated}"
    assert _train(tmp_path / "allowed", "train.skip_nonfinite=2", every) == 0
    records = [json.loads(line) for line in (tmp_path / "allowed" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_nonfinite"] for record in records] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in records)
    files = sorted((tmp_path / "allowed").glob("nonfinite-*.json"))
    assert len(files) == 2
    for file in files:
        found = _strict(file.read_text())
        assert BAD in found["samples"]
        assert found["values"]["loss"] == "nan"
    assert _train(tmp_path / "once", "train.skip_nonfinite=1", every) == 3
    assert _train(tmp_path / "never", every) == 3
    told = [_strict(file.read_text()) for file in (tmp_path / "never").glob("nonfinite-*.json")]
    assert BAD in min(told, key=lambda found: found["step"])["samples"]
    assert not (tmp_path / "never" / "checkpoints" / "last.pt").exists()


# Gradient norm and clipping, against torch's own.


@pytest.mark.parametrize("max_norm", [None, 0.3, 100.0])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradients_norm_and_its_clipping_are_torchs(max_norm: float | None, accumulated: int) -> None:
    more = [f"grad_accum_step: {accumulated}"] + ([] if max_norm is None else [f"max_grad_norm: {max_norm}"])
    box = box_of(_optimizer("{lr: 0.05, momentum: 0.9}", *more))
    reference = box_of(_optimizer("{lr: 0.05, momentum: 0.9}")).bare_student
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    box.pre_epoch_process(epoch=0)
    for number, (images, labels) in enumerate(batches(4 * accumulated), 1):
        take(box, images, labels)
        (F.cross_entropy(reference(images), labels) / accumulated).backward()
        if number % accumulated:
            assert box.gradient_norm is None
            continue
        gradients = {p: p.grad for p in reference.parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        assert box.gradient_norm is not None
        assert box.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert box.gradient_norms is not None
        assert box.gradient_norms[1].tolist() == pytest.approx([g.norm().item() for g in gradients.values()], rel=1e-5)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        for name, tensor in box.bare_student.state_dict().items():
            torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-6, atol=1e-7)


# TensorBoard.


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the plugin warned of."""
    monkeypatch.setattr(logging.getLogger("vkd_plugin"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["__init__", "add_scalar", "close"])
def test_a_board_that_cannot_be_written_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]], where: str
) -> None:
    hook = threading.excepthook
    monkeypatch.setattr(SummaryWriter, where, _full)
    board = Board(tmp_path)
    for number in range(5):
        board.add({"loss": 1.0, "loss/ce": 2.0}, number)
    board.close()
    board.close()
    assert said() == ["TensorBoard events cannot be written any more: [Errno 28] No space left on device"]
    assert threading.excepthook is hook


def test_a_full_disk_under_tensorboards_own_thread_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", _full)
    for number in range(50):
        board.add({"loss": 1.0, "loss/ce": 2.0}, number)
    board.close()
    assert len(said()) == 1
    assert "Traceback" not in capfd.readouterr().err


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(0, 9))
def test_what_an_interrupted_run_drew_of_later_steps_is_hidden(
    tmp_path_factory: pytest.TempPathFactory, first: int, resumed_at: int
) -> None:
    folder = tmp_path_factory.mktemp("board")
    resumed_at = min(resumed_at, first)
    board = Board(folder)
    for number in range(1, first + 1):
        board.add({"loss": 1.0, "bad": NAN, "text": "x", "none": None}, number, prefix="step/")
    board.close()
    (events,) = folder.iterdir()
    events.rename(folder / "events.out.tfevents.1")  # its name says when: long ago
    board = Board(folder, resumed_at)
    for number in range(resumed_at + 1, 12):
        board.add({"loss": 2.0}, number, prefix="step/")
    board.close()
    assert _curve(folder, "step/loss") == [(number, 1.0 if number <= resumed_at else 2.0) for number in range(1, 12)]
