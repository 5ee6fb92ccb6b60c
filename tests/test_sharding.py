"""FullyShardedDataParallel2 on the student: two processes with shards train as two with whole parameters do.

Two processes make all runs of this file, one after the other, through the command line; the tests compare what the
runs left.
"""

import contextlib
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_helper import work_together
from torch import Tensor

from vkd_plugin.cli import main
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.records import MEASURED
from vkd_plugin.engine.sharding import FSDP2 as FSDP2_KEY
from vkd_plugin.engine.sharding import refuse_unsupported
from vkd_plugin.errors import BadValue
from vkd_plugin.models import digits_vit
from vkd_plugin.models.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
VKD = "configs/digits/vkd/vit_from_cnn.yaml"
CE = "configs/digits/ce/vit.yaml"
WORLD = 2

EMA = "train.ema={decay: 0.9}"
CLIPPED = ("train.optimizer.grad_accum_step=2", "train.optimizer.max_grad_norm=0.5")
# Of hooked features alone: nothing of the loss comes from the student's output.
FEATURES_ONLY = (
    "train.criterion.kwargs.sub_terms={vkd: {criterion: {key: 'VkDLoss', kwargs: {}}, criterion_wrapper: "
    "{key: 'FeaturePair', kwargs: {student: {module: 'features.tokens'}, teacher: {module: 'final_conv', readout: "
    "'spatial_mean'}}}, weight: 1.0}}",
    "train.optimizer={key: 'SGD', kwargs: {lr: 0.5}}",
    "train.scheduler=null",
    "train.student.frozen_modules=[model.head]",
)
PROJECTORS = "train.student.auxiliary_model_wrapper.kwargs.projectors_ckpt={output}.projectors.pt"
DDP = "train.student.wrapper=DistributedDataParallel"
FSDP2 = "train.student.wrapper=FullyShardedDataParallel2"
FREED = "train.student.wrapper={key: 'FullyShardedDataParallel2', kwargs: {reshard_after_forward: True}}"


@dataclass(frozen=True)
class Job:
    """A run of the command line.

    Args:
        folder: its output.
        overrides: of the configuration.
        stop_after: steps, after which the second process gets SIGTERM.
        flags: further ones.
    """

    folder: str
    overrides: tuple[str, ...]
    stop_after: int | None = None
    flags: tuple[str, ...] = ()
    config: str = VKD


@dataclass
class Runs:
    """What the runs left.

    Args:
        path: above the folders.
        codes: exit codes of a folder's jobs, by rank.
        errors: lines on stderr that begin with ``error:``, of a folder's jobs.
    """

    path: Path
    codes: dict[str, list[list[int]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def last(self, folder: str) -> dict[str, Any]:
        return read_checkpoint(self.path / folder / "checkpoints" / "last.pt")

    def metrics(self, folder: str) -> list[dict[str, Any]]:
        lines = (self.path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


REFUSED = {
    "the first FSDP": (
        ["train.student.wrapper=FullyShardedDataParallel"],
        "FullyShardedDataParallel is not supported, FullyShardedDataParallel2 is",
    ),
    "a teacher": (["train.teacher.wrapper=FullyShardedDataParallel2"], "the teacher stays whole"),
    "optimizer": (
        [FSDP2, "train.optimizer={key: Adafactor, kwargs: {lr: 0.01}}"],
        "Adafactor cannot be combined with FullyShardedDataParallel2",
    ),
    "options": (
        ["train.student.wrapper={key: FullyShardedDataParallel2, kwargs: {mesh: 1}}"],
        "'mesh' is not supported, reshard_after_forward is",
    ),
    "a wrapper with parts that are wrapped": (
        [
            FSDP2,
            "train.student.auxiliary_model_wrapper={key: 'Student4FactorTransfer', kwargs: "
            "{input_module_path: 'student_model.patch_embed.proj', "
            "translator_kwargs: {num_input_channels: 48, num_output_channels: 128}}}",
            "train.student.forward_hook.output=[student_model.patch_embed.proj, translator]",
            "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.student="
            "{module: translator, readout: spatial_mean}",
        ],
        "cannot be combined with Student4FactorTransfer, take DistributedDataParallel",
    ),
}

JOBS = [
    Job("ddp", (DDP, EMA, PROJECTORS)),
    Job("fsdp", (FSDP2, EMA, PROJECTORS)),
    Job("stopped", (FSDP2, EMA), stop_after=6),
    Job("stopped", (FSDP2, EMA), flags=("--resume", "auto")),
    Job("for one", (FSDP2, EMA), stop_after=1),
    Job("ddp clipped", (DDP, *CLIPPED)),
    Job("fsdp clipped", (FSDP2, *CLIPPED)),
    Job("features", (FREED, *FEATURES_ONLY)),
    Job("not finite", (FSDP2.replace("student", "model"), "train.scheduler.kwargs.max_lr=1.0e+35"), config=CE),
    *(Job(name, tuple(overrides)) for name, (overrides, _) in REFUSED.items()),
]


def command(job: Job, path: Path, batch_size: int) -> list[str]:
    section = "model" if "/ce/" in job.config else "student_model"
    overrides = (
        "train.num_epochs=2",
        "datasets.digits/train.init.kwargs.fraction=0.12",
        f"train.train_data_loader.kwargs.batch_size={batch_size}",
        f"models.{section}.dst_ckpt={path / job.folder}.pt",
        *(override.replace("{output}", str(path / job.folder)) for override in job.overrides),
    )
    sets = [word for override in overrides for word in ("--set", override)]
    return ["--config", job.config, "--output", str(path / job.folder), "--device", "cpu", *sets, *job.flags]


def _work(rank: int, path: Path, jobs: list[Job]) -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    step = EngineBox.post_forward_process
    codes = []
    for number, job in enumerate(jobs):
        steps = 0

        def counted(self: EngineBox, *args: Any, job: Job = job, **kwargs: Any) -> None:
            nonlocal steps
            step(self, *args, **kwargs)
            steps += 1
            if rank == 1 and steps == job.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        EngineBox.post_forward_process = counted  # type: ignore[method-assign]
        meet = path / f"meet {number}"
        with (path / f"{rank} {number}.err").open("w") as file, contextlib.redirect_stderr(file):
            codes.append(main([*command(job, path, batch_size=16), "--dist_url", f"file://{meet}"]))
    (path / f"codes {rank}.json").write_text(json.dumps(codes))


def make_runs(path: Path, jobs: list[Job]) -> Runs:
    work_together(_work, (path, jobs), WORLD, seconds=60 * len(jobs))
    runs = Runs(path)
    by_rank = [json.loads((path / f"codes {rank}.json").read_text()) for rank in range(WORLD)]
    for number, (job, *codes) in enumerate(zip(jobs, *by_rank, strict=True)):
        runs.codes.setdefault(job.folder, []).append(codes)
        for rank in range(WORLD):
            lines = (path / f"{rank} {number}.err").read_text().splitlines(keepends=True)
            errors = "".join(line for line in lines if line.startswith("error:") or "Traceback" in line)
            runs.errors[job.folder] = runs.errors.get(job.folder, "") + errors
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"), JOBS)


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, with the way to each."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors(value, f"{name}.{key}")


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    for part in ("model", "projectors", "ema", "optimizer", "lr_scheduler", "epoch", "step"):
        found, expected = dict(tensors(one[part], part)), dict(tensors(two[part], part))
        assert found.keys() == expected.keys()
        assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
        if not found:
            assert one[part] == two[part]


def test_shards_train_bit_for_bit_like_whole_parameters(runs: Runs) -> None:
    """Gradients of two processes are averaged exactly: a sum of halves rounds once, whoever adds first."""
    assert runs.codes["fsdp"] == runs.codes["ddp"] == [[0, 0]]
    assert_equal(runs.last("fsdp"), runs.last("ddp"))
    for shards, whole in zip(runs.metrics("fsdp"), runs.metrics("ddp"), strict=True):
        norm, expected = shards.pop("gradient_norm"), whole.pop("gradient_norm")
        assert math.isclose(norm, expected, rel_tol=1e-6)
        assert shards == whole
    results = [json.loads((runs.path / name / "summary.json").read_text())["test"] for name in ("fsdp", "ddp")]
    assert results[0] == results[1]


def test_what_is_saved_is_whole(runs: Runs) -> None:
    state = runs.last("fsdp")
    assert {type(value) for _, value in tensors(state)} == {Tensor}
    student = digits_vit()
    student.load_state_dict(state["model"])
    student.load_state_dict(read_checkpoint(runs.path / "fsdp.pt")["model"])
    projectors = [torch.load(runs.path / f"{name}.projectors.pt", weights_only=True) for name in ("fsdp", "ddp")]
    torch.testing.assert_close(*projectors, rtol=0, atol=0)


def test_weight_decay_leaves_the_projector_alone(runs: Runs) -> None:
    groups = runs.last("fsdp")["optimizer"]["param_groups"]
    assert [(group["weight_decay"], len(group["params"])) for group in groups][1:] == [(0.0, 1)]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(runs: Runs) -> None:
    assert runs.codes["stopped"] == [[75, 75], [0, 0]]
    assert_equal(runs.last("stopped"), runs.last("fsdp"))
    assert runs.metrics("stopped") == runs.metrics("fsdp")


def test_one_process_goes_on_from_shards(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert runs.codes["for one"] == [[75, 75]]
    before = runs.last("for one")
    assert before["epoch"] == 0
    assert 1 <= before["step"] <= 2  # the others hear of it one step later
    job = Job("for one", (FSDP2, EMA), flags=("--resume", "auto", "--allow-config-change"))
    assert main(command(job, runs.path, batch_size=32)) == 0
    assert runs.last("for one")["epoch"] == 2
    for name, value in runs.metrics("for one")[0].items():
        if name.startswith(("val/", "val_ema/", "orthogonality")):
            assert math.isclose(value, runs.metrics("fsdp")[0][name], rel_tol=1e-3, abs_tol=1e-5), name


def test_clipping_and_accumulation(runs: Runs) -> None:
    """The norm is summed in another order, and so rounds differently."""
    assert runs.codes["fsdp clipped"] == runs.codes["ddp clipped"] == [[0, 0]]
    assert all(record["gradient_norm"] > 0.5 for record in runs.metrics("fsdp clipped"))
    shards, whole = runs.last("fsdp clipped"), runs.last("ddp clipped")
    for name, value in tensors(shards["model"]):
        expected = dict(tensors(whole["model"]))[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_features_alone_trains(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in one process with the same images per step, although torch starts its averaging at the output."""
    monkeypatch.chdir(ROOT)
    assert runs.codes["features"] == [[0, 0]]
    job = Job("features of one", (DDP, *FEATURES_ONLY))
    assert main(command(job, runs.path, batch_size=32)) == 0
    shards, whole = runs.metrics("features"), runs.metrics("features of one")
    assert shards[1]["loss"] < 0.99 * shards[0]["loss"]
    for one, two in zip(shards, whole, strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4)
    model, alone = runs.last("features")["model"], runs.last("features of one")["model"]
    for name, value in model.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_all_processes(runs: Runs) -> None:
    assert runs.codes["not finite"] == [[3, 3]]
    (line,) = runs.errors["not finite"].splitlines()
    assert "training stopped" in line
    assert not (runs.path / "not finite" / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_one_line_with_its_place(runs: Runs, name: str) -> None:
    _, message = REFUSED[name]
    assert runs.codes[name] == [[2, 2]]
    (line,) = runs.errors[name].splitlines()
    assert message in line
    assert line.startswith("error: ")
    assert not (runs.path / name / "metrics.jsonl").exists()


def test_stages_cannot_be_sharded() -> None:
    whole, shards = ({"student": {"wrapper": wrapper}} for wrapper in ("DistributedDataParallel", FSDP2_KEY))
    refuse_unsupported({"stage1": whole, "stage2": whole})
    refuse_unsupported(shards)
    with pytest.raises(BadValue, match="cannot be combined with stages"):
        refuse_unsupported({"stage1": whole, "stage2": shards})


# Everything else that may be combined with shards, each against whole parameters.

ACCUMULATED = ("train.optimizer.grad_accum_step=3", EMA)
OPTIONS = {
    "bfloat16": ("train.amp={dtype: bfloat16}",),
    "float16": ("train.amp={dtype: float16}",),
    "float16 that leaves out": ("train.amp={dtype: float16}", "train.skip_nonfinite=2"),
    "a fused optimizer that leaves out": ("train.skip_nonfinite=2", "train.optimizer.kwargs.fused=True"),
    "channels_last": ("train.channels_last=True",),
    "frozen modules": ("train.student.frozen_modules=[patch_embed]",),
    "only the projector trains": ("train.student.frozen_modules=[model]",),
    "accumulation over the epoch's end": ACCUMULATED,
    "compiled": ("train.compile={student: True, teacher: True}",),
}


@pytest.fixture(scope="module")
def option_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    jobs = [Job(f"{name} {kind[-4:]}", (kind, *more)) for name, more in OPTIONS.items() for kind in (DDP, FSDP2)]
    jobs += [
        Job("stopped", (FSDP2, *ACCUMULATED), stop_after=1),
        Job("stopped", (FSDP2, *ACCUMULATED), flags=("--resume", "auto")),
    ]
    jobs += [Job(f"ce {kind[-4:]}", (kind.replace("student", "model"),), config=CE) for kind in (DDP, FSDP2)]
    return make_runs(tmp_path_factory.mktemp("options"), jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIONS, "ce"])
def test_options_with_shards(option_runs: Runs, name: str) -> None:
    shards, whole = f"{name} {FSDP2[-4:]}", f"{name} {DDP[-4:]}"
    assert option_runs.codes[whole] == [[0, 0]], option_runs.errors[whole]
    assert option_runs.codes[shards] == [[0, 0]], option_runs.errors[shards]
    model, expected = option_runs.last(shards)["model"], option_runs.last(whole)["model"]
    for key, value in model.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stop_within_an_accumulation(option_runs: Runs) -> None:
    assert option_runs.codes["stopped"] == [[75, 75], [0, 0]]
    name = "accumulation over the epoch's end"
    assert_equal(option_runs.last("stopped"), option_runs.last(f"{name} {FSDP2[-4:]}"))
