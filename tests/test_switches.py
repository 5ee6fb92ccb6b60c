"""Switches for speed or memory: runs of a few steps with each of them, compared with the run without.

Comparisons are made in float64, where another order of summation is told from another sum: one moves weights by 1e-14,
the other by 1e-4. What a switch does with float32 is the same code.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_helper import work_together
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.engine import run as engine_run
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.ema import StudentEMA
from vkd_plugin.engine.loaders import set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.records import MEASURED
from vkd_plugin.engine.train import Trainer
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.tasks.classification import Classification

ROOT = Path(__file__).parents[1]
VKD = "configs/digits/vkd/vit_from_cnn.yaml"
CNN = "configs/digits/ce/digits_cnn.yaml"  # BatchNorm, convolutions of many channels, and augmentation
DEIT = "configs/ilsvrc2012/ce/deit_tiny.yaml"
CPU = torch.device("cpu")

BATCH, STEPS = 16, 4
LR, EPS = 2e-3, 1e-3
# float64 rounds by u = 2^-53. A gradient is a sum of at most 16 samples x 128 channels = 2048 terms, which in another
# order moves by 2048 u of their size at most, and AdamW passes that on to the weight times lr / eps.
TOLERANCE = STEPS * (LR / EPS) * BATCH * 128 * 2**-53


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def overrides_of(config: str) -> list[str]:
    """One epoch of ``STEPS`` steps on digits, and a validation on the same few images."""
    if config == DEIT:
        return []
    section, network = ("student_model", "depth=2") if config == VKD else ("model", "width=8")
    return [
        "train.num_epochs=1",
        "datasets.digits/train.init.kwargs.fraction=0.05",
        f"train.train_data_loader.kwargs={{batch_size: {BATCH}, drop_last: True}}",
        f"train.optimizer={{key: AdamW, kwargs: {{lr: {LR}, eps: {EPS}}}}}",
        "train.scheduler={key: StepLR, kwargs: {step_size: 1, gamma: 0.9}, scheduling_step: 1}",
        "train.val_data_loader.dataset_id=digits/train",
        "test.test_data_loader.dataset_id=digits/train",
        f"models.{section}.kwargs.{network}",
        f"models.{section}.dst_ckpt=null",
    ]


@dataclass(frozen=True)
class Left:
    """What a run left: its ``last.pt``, and its one line of ``metrics.jsonl``."""

    last: dict[str, Any]
    record: dict[str, Any]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(folder: Path, *switches: str, config: str = VKD, flags: tuple[str, ...] = (), expect: int = 0) -> Left:
    """A run of the command line, in float64."""
    sets = [word for override in (*overrides_of(config), *switches) for word in ("--set", override)]
    arguments = ["--config", config, "--output", str(folder), "--device", "cpu", "-student_only", *flags, *sets]
    with default_dtype(torch.float64), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(engine_run, "prove", lambda experiment: [])  # the dry run, as long as the run itself
        assert main(arguments) == expect
    return left(folder)


def left(folder: Path) -> Left:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ["{}"]
    record = {name: value for name, value in json.loads(lines[-1]).items() if name not in MEASURED}
    return Left(read_checkpoint(folder / "checkpoints" / "last.pt"), record)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The run without any switch."""
    run = train(tmp_path_factory.mktemp("plain"))
    assert run.record["step"] == STEPS
    assert {value.dtype for value in run.last["model"].values()} == {torch.float64}
    return run


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, with the way to each."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{name}.{key}")


def largest_difference(one: Left, two: Left) -> float:
    """Between the weights of two runs, projectors included."""
    parts = ("model", "projectors")
    first, second = (dict(tensors({part: run.last[part] for part in parts})) for run in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# Nothing changes, to the last bit.

NOTHING = {
    "workers and pinned memory": ("train.train_data_loader.kwargs.num_workers=2",
                                  "train.train_data_loader.kwargs.prefetch_factor=1",
                                  "train.train_data_loader.kwargs.pin_memory=True",
                                  "train.val_data_loader.kwargs.pin_memory=True", "train.log_freq=1"),
    "ema": ("train.ema={decay: 0.5}",),
    "a limit that no gradient reaches": ("train.optimizer.max_grad_norm=1.0e+6",),
    "global_batch of one process": ("train.global_batch=True",),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_nothing_changes(name: str, plain: Left, tmp_path: Path) -> None:
    run = train(tmp_path, *NOTHING[name])
    for part in ("model", "projectors", "optimizer"):
        found, expected = dict(tensors(run.last[part])), dict(tensors(plain.last[part]))
        assert found.keys() == expected.keys()
        assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
    assert {key: value for key, value in run.record.items() if not key.startswith("val_ema/")} == plain.record


# Sums are taken in another order.

ROUNDING = {
    "fused": ("train.optimizer.kwargs.fused=True",),
    "foreach": ("train.optimizer.kwargs.foreach=True",),
    "accumulation": ("train.optimizer.grad_accum_step=4", f"train.train_data_loader.kwargs.batch_size={BATCH // 4}"),
}


def assert_rounded(run: Left, plain: Left, tolerance: float = TOLERANCE) -> None:
    assert largest_difference(run, plain) < tolerance
    assert run.record["lr"] == plain.record["lr"]
    for name, value in plain.record.items():
        if name.startswith("loss") or name == "gradient_norm":  # a step's are recorded in float32
            assert math.isclose(run.record[name], value, rel_tol=2**-23), name


@pytest.mark.parametrize("name", ROUNDING)
def test_only_rounding_changes(name: str, plain: Left, tmp_path: Path) -> None:
    assert_rounded(train(tmp_path, *ROUNDING[name]), plain)


def _compiled(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> tuple[Left, list[str]]:
    compiled = []

    def compile_module(self: nn.Module, mode: str | None, compile_it: Callable[..., None] = nn.Module.compile) -> None:
        compiled.append(type(self).__name__)
        compile_it(self, **({"mode": mode} | options), fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    torch._dynamo.reset()
    return train(folder, "train.compile={student: True, teacher: True}"), compiled


def test_compiled_models_are_one_graph_and_compute_the_same(
    plain: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, compiled = _compiled(tmp_path, monkeypatch, backend="aot_eager")
    assert compiled == ["ProjectedStudent", "DigitsCNN"]
    assert_rounded(run, plain)


@pytest.mark.slow
def test_compiled_to_code_too(plain: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_rounded(_compiled(tmp_path, monkeypatch)[0], plain)


# channels_last.

FUSED = "train.optimizer.kwargs.fused=True"
LAST = "train.channels_last=True"


def recipe(tree: Path) -> tuple[str, ...]:
    """Two steps of ImageNet's, mixing included, on 32 x 32 pixels, of a DeiT of one block and its convolutions."""
    pictures = "datasets.ilsvrc2012/{}.init.kwargs.transform.init.kwargs.transforms.{}.init.kwargs.size"
    return (
        f"datasets._root={tree}",
        *(f"datasets.ilsvrc2012/{split}.init.kwargs.num_classes=3" for split in ("train", "val")),
        f"{pictures.format('train', 0)}=32",
        f"{pictures.format('val', 1)}=32",
        "models.model.kwargs={name: deit_tiny_distilled_conv_patch16_224, img_size: 32, depth: 1, num_classes: 3}",
        "models.model.dst_ckpt=null",
        "train.num_epochs=1",
        "train.amp=null",
        "train.train_data_loader.kwargs={batch_size: 12, num_workers: 0}",
        "train.train_data_loader.collate_fn.init.kwargs.num_classes=3",
        "train.val_data_loader.kwargs={batch_size: 6, num_workers: 0}",
        "test.test_data_loader.kwargs={batch_size: 6, num_workers: 0}",
        f"train.optimizer.kwargs={{lr: {LR}, eps: {EPS}, fused: True}}",
    )


def test_channels_last(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = EngineBox.forward_process

    def watched(self: EngineBox, samples: Tensor, *args: Any) -> Tensor:
        weight = self.bare_student.get_parameter("patch_embed.proj.weight")
        seen.append([x.is_contiguous(memory_format=torch.channels_last) for x in (samples, weight)])
        return forward(self, samples, *args)

    monkeypatch.setattr(EngineBox, "forward_process", watched)
    first, last = (
        train(tmp_path / name, *recipe(sound), f"train.channels_last={name}", config=DEIT) for name in ("False", "True")
    )
    assert seen == [[False, False]] * 2 + [[True, True]] * 2
    # A gradient of the stem is a sum over images and places.
    assert_rounded(last, first, tolerance=2 * (LR / EPS) * 12 * 16**2 * 2**-53)


@pytest.mark.parametrize("given", [{"teacher": True}, {"student": True}, {"student": True, "teacher": True}])
def test_channels_last_of_one_side_alone(given: dict[str, bool]) -> None:
    experiment = load_experiment("tests/data/configs/distill.yaml", [f"train.channels_last={json.dumps(given)}"])
    models = dict(zip(("teacher", "student"), model_sections(experiment), strict=True))
    built = {side: build_model(experiment, section, CPU, False) for side, section in models.items() if section}
    seen = {}
    for side, model in built.items():  # 16 x 16 pixels and 64 channels: here the two orders are told apart

        def look(module: nn.Module, inputs: Any, out: Tensor, side: str = side) -> None:
            seen[side] = out.is_contiguous(memory_format=torch.channels_last)

        model.get_submodule("layer1").register_forward_hook(look)
    run = Trainer(experiment, built["teacher"], built["student"], Processes(0, 1, CPU), None, 0)
    loader = run._train_loader()
    run.box.pre_epoch_process(epoch=0)
    set_position(loader, 0)
    run._step(next(iter(loader)), loader, False)
    assert seen == {side: given.get(side, False) for side in built}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return train(tmp_path_factory.mktemp("cnn"), FUSED, config=CNN)


def is_channels_last(run: Left) -> bool:
    return run.last["model"]["middle.0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("before", [True, False])
def test_a_fused_optimizer_goes_on_in_another_layout(
    before: bool, cnn: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused kernels go through memory: moments in the order of before would be taken for other weights'."""
    step = EngineBox.post_forward_process

    def stopped(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self.optimizer_steps == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EngineBox, "post_forward_process", stopped)
        train(tmp_path, FUSED, f"train.channels_last={before}", config=CNN, expect=75)
    flags = ("--resume", "auto", "--allow-config-change")
    run = train(tmp_path, FUSED, f"train.channels_last={not before}", config=CNN, flags=flags)
    assert run.last["step"] == STEPS
    assert is_channels_last(run) is not before
    assert largest_difference(run, cnn) < TOLERANCE


# Accumulation: k batches of B / k are one of B where a loss is a mean over samples, and where they are not.


def trainer(config: str, *switches: str) -> Trainer:
    experiment = load_experiment(config, [*overrides_of(config), *switches])
    torch.manual_seed(0)
    teacher, student = (
        section and build_model(experiment, section, CPU, False) for section in model_sections(experiment)
    )
    return Trainer(experiment, teacher or None, student, Processes(0, 1, CPU), None, 0)


def batch_of(box: EngineBox) -> tuple[Tensor, Tensor]:
    set_position(box.train_data_loader, 0)
    images, labels, _ = next(iter(box.train_data_loader))
    return images, labels


def one_step(box: EngineBox, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss, and the gradient: a step of SGD with learning rate 1."""
    before = {name: p.detach().clone() for name, p in box.student.named_parameters()}
    losses = []
    for images, labels in batches:
        loss = box.forward_process(images, labels, {})
        losses.append(loss.item())
        box.post_forward_process(loss=loss)
    return sum(losses) / len(losses), {name: before[name] - p.detach() for name, p in box.student.named_parameters()}


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, per norm of the second."""
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    return float(difference.norm() / torch.cat([value.flatten() for value in expected.values()]).norm())


SGD = "train.optimizer={key: SGD, kwargs: {lr: 1.0, weight_decay: 0.0}, grad_accum_step: 2}"
LOSS = "train.criterion.kwargs.sub_terms.vkd.criterion.kwargs"
ACCUMULATED = {
    "layer_norm, smooth_l1": (VKD, True, ()),
    "l2, cosine": (VKD, True, (f"{LOSS}={{normalization: l2, distance: cosine}}",)),
    "standardize": (VKD, False, (f"{LOSS}={{normalization: standardize, normalize_student: True}}",)),
    "whiten": (VKD, False, (f"{LOSS}={{normalization: whiten}}",)),
    "log_sum": (VKD, False, (f"{LOSS}={{distance: log_sum}}",)),
    "BatchNorm in the student": (CNN, False, ()),
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_what_accumulation_is_the_same_for(name: str) -> None:
    config, same, overrides = ACCUMULATED[name]
    with default_dtype(torch.float64):
        box = trainer(config, SGD, *overrides).box
        images, labels = batch_of(box)
        whole = box.forward_process(images, labels, {})
        parameters = dict(box.student.named_parameters())
        expected = dict(zip(parameters, torch.autograd.grad(whole, list(parameters.values())), strict=True))
        halves = list(zip(images.chunk(2), labels.chunk(2), strict=True))
        loss, gradient = one_step(box, halves)
    assert math.isclose(loss, whole.item(), rel_tol=1e-13) is same
    if same:
        assert relative(gradient, expected) < BATCH * 128 * 2**-53
    else:
        assert relative(gradient, expected) > 1e-6


# Mixed precision.

# Matrix products in a row, from the images to the loss: patches, four in each of two blocks, and the projector.
PRODUCTS = 1 + 2 * 4 + 1
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def in_precision(dtype: str | None, *switches: str) -> EngineBox:
    box = trainer(VKD, *switches, *([] if dtype is None else [f"train.amp={{dtype: {dtype}}}"])).box
    if box.precision.scaler.is_enabled():  # with the factor that a run begins with the scaler leaves this step out
        box.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return box


@pytest.mark.parametrize("dtype", UNITS)
def test_mixed_precision_is_as_exact_as_its_type(dtype: str) -> None:
    """Each product's rounding errs by a unit at most, there and back, and errors add up as random ones do.

    A loss is a mean over samples, in which they cancel.
    """
    full, low = (in_precision(kind, SGD.replace("step: 2", "step: 1")) for kind in (None, dtype))
    expected_loss, expected = one_step(full, [batch_of(full)])
    loss, gradient = one_step(low, [batch_of(low)])
    assert abs(loss - expected_loss) < UNITS[dtype] * expected_loss
    assert UNITS[dtype] / 8 < relative(gradient, expected) < math.sqrt(2 * PRODUCTS) * UNITS[dtype]


@pytest.mark.parametrize("dtype", UNITS)
def test_what_stays_in_float32(dtype: str) -> None:
    box = in_precision(dtype)
    projector = box.wrapper.features["tokens"].projector
    terms = {name: term for name, (term, _) in box.criterion.term_dict.items()}
    seen: dict[str, Any] = {}
    projector.register_forward_hook(lambda module, args, output: seen.update(features=output, weight=module.weight))
    for name, term in (*terms.items(), ("normalized", terms["vkd"].criterion.normalization)):
        term.register_forward_hook(lambda module, args, value, name=name: seen.update({name: value}))
    loss = box.forward_process(*batch_of(box), {})
    box.post_forward_process(loss=loss)
    assert seen.pop("features").dtype == getattr(torch, dtype)
    assert seen.keys() == {"ce", "kl", "vkd", "normalized", "weight"}
    assert {value.dtype for value in (loss, *seen.values())} == {torch.float32}
    gram = seen["weight"].double().mT @ seen["weight"].double()
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-6
    state = [value for _, value in tensors(box.optimizer.state_dict()["state"])]
    assert state
    assert {value.dtype for value in (*box.student.parameters(), *state)} == {torch.float32}


def test_a_first_step_that_the_scaler_leaves_out(recwarn: pytest.WarningsRecorder) -> None:
    """torch would say that the scheduler was called before the optimizer."""
    box = trainer(VKD, "train.amp={dtype: float16}").box
    box.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    _, step = one_step(box, [batch_of(box)])
    assert not any(value.any() for value in step.values())
    assert box.precision.scaler.get_scale() == 2.0**29
    assert box.lr_scheduler.last_epoch == 1
    assert [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)] == []


@pytest.mark.parametrize("dtype", [None, *UNITS])
def test_what_is_clipped_is_the_accumulated_gradient_without_the_scalers_factor(dtype: str | None) -> None:
    box = in_precision(dtype, SGD.replace("step: 2", "step: 2, max_grad_norm: 0.5"))
    images, labels = batch_of(box)
    _, step = one_step(box, list(zip(images.chunk(2), labels.chunk(2), strict=True)))
    norm = torch.cat([value.flatten() for value in step.values()]).norm()
    assert box.gradient_norm > 1  # before clipping
    assert math.isclose(norm, 0.5, rel_tol=1e-4)


# EMA.


class Indexed(nn.Module):
    """Has what Swin transformers have: a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("index", torch.arange(1000))
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.9999])
def test_an_average_keeps_whole_numbers_whole(decay: float) -> None:
    model = Indexed()
    ema = StudentEMA(model, decay)
    for step in range(4):
        model.weight.data.fill_(step)
        ema.update(model)
        model.index += 1
    assert torch.equal(ema.model.index, model.index - 1)
    assert torch.equal(ema.model.mask, model.mask)


def test_a_step_that_was_left_out_is_not_averaged() -> None:
    model = Indexed()
    ema = StudentEMA(model, 0.7)
    for step, left_out in enumerate((False, True, False)):
        before = {name: value.clone() for name, value in ema.averaged.state_dict().items()}
        model.weight.data += 1 / 3
        model.index += 1
        ema.update(model, torch.tensor(left_out))
        equal = {name: torch.equal(value, before[name]) for name, value in ema.averaged.state_dict().items()}
        expected = {"n_averaged": left_out, "module.weight": left_out, "module.index": left_out, "module.mask": True}
        assert equal == expected, step


def test_the_ema_is_timms_once_a_step_and_what_is_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's documented formula, w_0 being what training begins with. In a student with BatchNorm."""
    averages: list[ModelEmaV3] = []
    step, setup = EngineBox.post_forward_process, EngineBox.setup

    def set_up(self: EngineBox, *args: Any) -> None:
        setup(self, *args)
        averages.append(ModelEmaV3(self.bare_student, decay=0.7))

    def averaged(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        before = self.optimizer_steps
        step(self, *args, **kwargs)
        if self.optimizer_steps > before:
            averages[0].update(self.bare_student)

    monkeypatch.setattr(EngineBox, "setup", set_up)
    monkeypatch.setattr(EngineBox, "post_forward_process", averaged)
    run = train(tmp_path, "train.ema={decay: 0.7}", "train.optimizer.grad_accum_step=2", config=CNN)
    assert len(averages) == 1
    found = {name.removeprefix("module."): value for name, value in run.last["ema"].items()}
    assert found.pop("n_averaged") == STEPS // 2
    expected = averages[0].module.state_dict()
    assert found.keys() == expected.keys() == run.last["model"].keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
    assert any(not torch.equal(value, run.last["model"][name]) for name, value in found.items())
    best = read_checkpoint(tmp_path / "checkpoints" / "best.pt")["model"]
    assert [name for name, value in best.items() if not torch.equal(value, expected[name])] == []
    with default_dtype(torch.float64):
        loader = trainer(CNN).box.val_data_loader
        figures = Classification().evaluate(averages[0].module, loader, CPU)
    assert {name: run.record[f"val_ema/{name}"] for name in figures} == figures
    assert run.record["val/loss"] != run.record["val_ema/loss"]


@pytest.mark.gpu
def test_the_ema_waits_for_nothing() -> None:
    model = Indexed().cuda()
    ema = StudentEMA(model, 0.9)
    left_out = torch.tensor(False).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(model)
        ema.update(model, left_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Two processes.

WORLD = 2
JOBS = {
    "global batch": ("train.global_batch=True",),
    "half the batch": (f"train.train_data_loader.kwargs.batch_size={BATCH // 2}",),
    "accumulation": (
        f"train.train_data_loader.kwargs.batch_size={BATCH // 2}",
        "train.global_batch=True",
        "train.optimizer.grad_accum_step=2",
    ),
}


def _work(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    averagings = 0
    set_up = EngineBox._average_gradients

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal averagings
        averagings += bucket.is_last()
        return allreduce_hook(None, bucket)

    def counting(self: EngineBox) -> None:
        set_up(self)
        self.student.register_comm_hook(None, count)

    EngineBox._average_gradients = counting  # type: ignore[method-assign]
    for name, switches in JOBS.items():
        averagings = 0
        train(path / name, *switches, flags=("--dist_url", f"file://{path / name}.meet"))
        (path / f"{name} {rank}.json").write_text(json.dumps(averagings))


@dataclass(frozen=True)
class Pairs:
    """What two processes left, and how often each of them averaged gradients."""

    runs: dict[str, Left]
    averagings: dict[str, list[int]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    path = tmp_path_factory.mktemp("pairs")
    work_together(_work, (path,), WORLD)
    counts = {name: [json.loads((path / f"{name} {rank}.json").read_text()) for rank in range(WORLD)] for name in JOBS}
    return Pairs({name: left(path / name) for name in JOBS}, counts)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_take_the_steps_of_one(pairs: Pairs, name: str, plain: Left) -> None:
    assert_rounded(pairs.runs[name], plain)


def test_a_global_batch_is_the_batch_of_each_process_times_their_number(pairs: Pairs) -> None:
    assert largest_difference(pairs.runs["global batch"], pairs.runs["half the batch"]) == 0


def test_gradients_are_averaged_once_a_step(pairs: Pairs) -> None:
    assert pairs.runs["accumulation"].record["step"] == 2 * STEPS
    assert pairs.averagings == dict.fromkeys(JOBS, [STEPS] * WORLD)
