"""End to end through the command line, on real digits: what a run writes, repeats, distributes and refuses."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_helper import run_py

import vkd_plugin
from vkd_plugin.cli import main
from vkd_plugin.datasets import coco_shapes
from vkd_plugin.datasets.tiny_imagenet import write_tree
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.records import MEASURED
from vkd_plugin.engine.train import Trainer
from vkd_plugin.models import digits_vit
from vkd_plugin.models.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
VKD = "configs/digits/vkd/vit_from_cnn.yaml"
SHORT = (
    "--set", "train.num_epochs=2", "--set", "datasets.digits/train.init.kwargs.fraction=0.3",
    "--set", "train.train_data_loader.kwargs.batch_size=32", "--set", "train.optimizer.kwargs.lr=3.0e-3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _run(config: str, output: Path, *more: str, expect: int = 0) -> list[dict[str, Any]]:
    arguments = ["--config", config, *SHORT, "--output", str(output), "--device", "cpu", *_dst(output, config), *more]
    assert main(arguments) == expect
    return _metrics(output)


def _dst(output: Path, config: str = VKD) -> list[str]:
    section = "model" if "/ce/" in config else "student_model"
    return ["--set", f"models.{section}.dst_ckpt={output}-student.pt"]


def _metrics(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def _made(folder: Path, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _run(VKD, folder, *more)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of :data:`VKD`, to be read; its student is beside it."""
    return _made(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of one epoch."""
    return _made(tmp_path_factory.mktemp("one_epoch") / "run", "--set", "train.num_epochs=1")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A copy of ``plain``, to be run into."""
    return Path(shutil.copytree(plain, tmp_path / "run"))


def test_a_run_writes_what_the_documentation_says(plain: Path) -> None:
    records, folder = _metrics(plain), plain
    assert {"config.yaml", "metrics.jsonl", "summary.json", "log.txt", "checkpoints"} <= {
        p.name for p in folder.iterdir()
    }
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    assert [r["epoch"] for r in records] == [1, 2]
    assert {"step", "lr", "loss", "loss/ce", "loss/kl", "loss/vkd", "val/top1"} <= records[0].keys()
    assert records[0]["orthogonality_error/tokens"] < 1e-5
    weighted = sum(weight * records[1][f"loss/{name}"] for name, weight in (("ce", 1), ("kl", 1), ("vkd", 4)))
    assert math.isclose(records[1]["loss"], weighted, rel_tol=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last"]["epoch"] == 2
    assert summary["seed"] == 0
    assert summary["device"] == "cpu"
    assert summary["test"]["teacher"]["top1"] > 95
    assert summary["parameters"]["student"] == sum(p.numel() for p in digits_vit().parameters())
    assert summary["parameters"]["projectors"] == 48 * 128
    assert summary["teacher_digest"]
    assert summary["versions"]["torch"] == torch.__version__


def test_the_student_is_saved_under_its_own_names_and_the_projectors_apart(plain: Path) -> None:
    for name in ("last.pt", "best.pt"):
        state = read_checkpoint(plain / "checkpoints" / name)
        digits_vit().load_state_dict(state["model"])
        (key,) = [k for k in state["projectors"] if k.endswith("raw_weight")]
        assert key == "tokens.projector.raw_weight"
    digits_vit().load_state_dict(torch.load(f"{plain}-student.pt", weights_only=True)["model"])


def test_the_resolved_config_repeats_the_run(plain: Path, tmp_path: Path) -> None:
    again = ["--config", str(plain / "config.yaml"), "--output", str(tmp_path / "b"), "--device", "cpu"]
    assert main([*again, *_dst(tmp_path / "b")]) == 0
    assert _metrics(tmp_path / "b") == _metrics(plain)


@pytest.mark.parametrize("config", [VKD, "configs/digits/ce/digits_cnn.yaml"])
def test_one_seed_gives_identical_figures_whatever_the_number_of_workers(tmp_path: Path, config: str) -> None:
    """The second configuration augments its images."""
    first = _run(config, tmp_path / "a", "--seed", "3")
    again = _run(config, tmp_path / "b", "--seed", "3", "--set", "train.train_data_loader.kwargs.num_workers=2")
    other = _run(config, tmp_path / "c", "--seed", "4")
    assert first == again
    assert first != other


def test_a_stage_starts_from_its_own_checkpoint(one_epoch: Path, tmp_path: Path) -> None:
    still = ["--set", "train.optimizer.kwargs={lr: 0.0, weight_decay: 0.0}", "--set", "train.scheduler="]
    best = Path("checkpoints", "best.pt")
    _run(VKD, tmp_path / "more", "--set", f"train.student.src_ckpt={one_epoch / best}", *still)
    before, after = (torch.load(run / best)["model"] for run in (one_epoch, tmp_path / "more"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_start_epoch_counts_on_with_the_optimizer_of_src_ckpt(plain: Path, one_epoch: Path, tmp_path: Path) -> None:
    whole = _metrics(plain)
    assert whole[:1] == _metrics(one_epoch)
    last = one_epoch / "checkpoints" / "last.pt"
    more = _run(VKD, tmp_path / "more", "--start_epoch", "1", "--set", f"models.student_model.src_ckpt={last}")
    assert [record["epoch"] for record in more] == [2]
    assert more[0]["lr"] == whole[1]["lr"]


EMA_AND_WORKER = ("--set", "train.ema={decay: 0.9}", "--set", "train.train_data_loader.kwargs.num_workers=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with :data:`EMA_AND_WORKER` that nothing stops."""
    return _made(tmp_path_factory.mktemp("whole") / "run", *EMA_AND_WORKER)


@pytest.mark.parametrize("after", [7, 13])
def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_had_happened(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], after: int
) -> None:
    """Stopped within the first epoch of twelve steps, or the second; figures and weights are equal to the last bit."""
    more = EMA_AND_WORKER
    steps = 0
    step = EngineBox.post_forward_process

    def counted(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        step(self, *args, **kwargs)
        steps += 1
        if steps == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EngineBox, "post_forward_process", counted)
    _run(VKD, tmp_path / "part", *more, expect=75)
    assert f"stopped at step {after}, all saved" in capfd.readouterr().err
    assert len(_metrics(tmp_path / "part")) == after // 12
    _run(VKD, tmp_path / "part", *more, "--resume", "auto")
    assert steps == 24
    assert _metrics(tmp_path / "part") == _metrics(whole)
    for name in ("last.pt", "best.pt"):
        one, two = (read_checkpoint(run / "checkpoints" / name) for run in (whole, tmp_path / "part"))
        for part in ("model", "projectors", "ema"):
            assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())


def test_gradients_that_wait_for_the_next_epoch_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve batches an epoch, five a step; stopped at the end of the first epoch, in the middle of an accumulation."""
    more = ["--set", "train.optimizer.grad_accum_step=5"]
    whole = _run(VKD, tmp_path / "whole", *more)
    post_epoch = EngineBox.post_epoch_process

    def stopped(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        post_epoch(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(EngineBox, "post_epoch_process", stopped)
        _run(VKD, tmp_path / "part", *more, expect=75)
    waiting = read_checkpoint(tmp_path / "part" / "checkpoints" / "last.pt")["ranks"][0]["gradients"]
    assert any(gradient.abs().sum() > 0 for gradient in waiting)
    _run(VKD, tmp_path / "part", *more, "--resume", "auto")
    assert _metrics(tmp_path / "part") == whole


def test_checkpoints_every_so_many_steps_and_epochs(tmp_path: Path) -> None:
    _run(VKD, tmp_path / "run", "--set", "train.checkpoint={every_steps: 5, keep: 1}", "--set", "train.num_epochs=1")
    folder = tmp_path / "run" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"last.pt", "previous.pt", "best.pt", "epoch1.pt"}
    steps = {name: read_checkpoint(folder / f"{name}.pt")["step"] for name in ("last", "previous", "epoch1")}
    assert steps == {"last": 12, "previous": 10, "epoch1": 12}


def test_resuming_a_finished_run_trains_nothing_more(copy: Path) -> None:
    first = _metrics(copy)
    assert _run(VKD, copy, "--resume") == first


def test_an_earlier_run_in_the_folder_is_moved_aside(copy: Path) -> None:
    before = (copy / "summary.json").read_text()
    _run(VKD, copy, "--seed", "1")
    assert (copy.parent / "run.1" / "summary.json").read_text() == before
    assert (copy / "summary.json").read_text() != before


def test_test_only_reports_the_saved_student(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    capfd.readouterr()
    _run(VKD, copy, "-test_only", "-student_only")
    err = capfd.readouterr().err
    assert f"test student: top1 {summary['test']['student']['top1']:.4g}" in err
    assert "test teacher" not in err
    assert json.loads((copy / "summary.json").read_text()) == summary


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_keeps_the_projector_orthonormal(tmp_path: Path, dtype: str) -> None:
    fewer = [  # convolutions of half precision are slow on CPUs
        "--set", "datasets.digits/train.init.kwargs.fraction=0.15",
        "--set", "datasets.digits/test.init.kwargs.split=train",
        "--set", "datasets.digits/test.init.kwargs.fraction=0.08",
    ]  # fmt: skip
    records = _run(VKD, tmp_path / "run", "--set", f"train.amp={{dtype: {dtype}}}", *fewer)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["orthogonality_error/tokens"] < 1e-5


def test_ema_accumulation_and_clipping(tmp_path: Path) -> None:
    records = _run(
        VKD, tmp_path / "run", "--set", "train.ema={decay: 0.9}", "--set", "train.optimizer.grad_accum_step=2",
        "--set", "train.optimizer.max_grad_norm=1.0",
    )  # fmt: skip
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["val_ema/top1"] >= 0


@pytest.mark.slow
def test_compiled_models_train_like_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = _run(VKD, tmp_path / "eager")
    compiled_modules = []
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: (compiled_modules.append(self), compile_module(self, **kw))
    )
    compiled = _run(VKD, tmp_path / "compiled", "--set", "train.compile={student: true, teacher: true}")
    assert [type(module).__name__ for module in compiled_modules] == ["ProjectedStudent", "DigitsCNN"]
    for one, two in zip(eager, compiled, strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-3)
    assert compiled[-1]["orthogonality_error/tokens"] < 1e-5


@pytest.mark.parametrize("method", ["kd", "linear", "mlp"])
def test_the_other_distillation_configs_train(tmp_path: Path, method: str) -> None:
    records = _run(f"configs/digits/{method}/vit_from_cnn.yaml", tmp_path / method)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("name", ["vit", "digits_cnn"])
def test_training_without_a_teacher(tmp_path: Path, name: str) -> None:
    records = _run(f"configs/digits/ce/{name}.yaml", tmp_path / name)
    assert records[-1]["loss"] < records[0]["loss"]
    assert "teacher" not in json.loads((tmp_path / name / "summary.json").read_text())["test"]


@pytest.mark.parametrize("orthogonal_map", ["householder", "matrix_exp", "cayley", "cholesky_qr", "polar"])
def test_every_map_lives_through_training_with_weight_decay(tmp_path: Path, orthogonal_map: str) -> None:
    projector = "train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector"
    records = _run(VKD, tmp_path / "run", "--set", f"{projector}.orthogonal_map={orthogonal_map}")
    assert records[-1]["loss/vkd"] < records[0]["loss/vkd"]
    assert records[-1]["orthogonality_error/tokens"] < 1e-5


# Several processes.


def _run_as_two(output: Path, *more: str) -> list[dict[str, Any]]:
    arguments = ["--config", VKD, *SHORT, "--output", str(output), "--device", "cpu", *_dst(output), *more]
    for ended in run_py(*arguments, number=2):
        assert ended.code == 0, ended.err[-3000:]
    return _metrics(output)


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Two with batch 16 against one with batch 32: the same images per step, averaged gradients, exact accuracy.

    The standardised loss needs the statistics of the global batch to agree.
    """
    more = [
        "--set", "train.criterion.kwargs.sub_terms.vkd.criterion.kwargs.normalization=standardize",
        "--set", "train.optimizer={key: SGD, kwargs: {lr: 0.05}}",
    ]  # fmt: skip
    one = _run(VKD, tmp_path / "one", *more, "--set", "train.train_data_loader.kwargs.batch_size=32")
    two = _run_as_two(tmp_path / "two", *more, "--set", "train.train_data_loader.kwargs.batch_size=16")
    assert len(one) == len(two)
    for alone, shared in zip(one, two, strict=True):
        for name in ("loss", "loss/ce", "loss/kl", "loss/vkd", "val/loss"):
            assert math.isclose(alone[name], shared[name], rel_tol=1e-4), name
        assert alone["val/top1"] == shared["val/top1"]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2


# Bad input: exit code 2, one line, nothing lost.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", VKD, "--sed", "1"], "--sed"),
        (["--config", VKD, "--seed", "-1"], "-1"),
        (["--config", VKD, "--seed", "x"], "--seed"),
        (["--config", VKD, "--device", "gpu"], "--device gpu"),
        (["--config", VKD, "--set", "train.num_epocs=3"], "did you mean 'num_epochs'?"),
        (["--config", VKD, "--set", "train.num_epochs=ten"], "num_epochs"),
        (["--config", VKD, "--resume", "nowhere.pt"], "--resume nowhere.pt: no such file"),
        (["--config", VKD, "--set", "models.teacher_model.src_ckpt=nowhere.pt"], "nowhere.pt"),
        (["--config", VKD, "--set", "models.teacher_model.kwargs.checkpoint=nowhere.pt"], "nowhere.pt"),
        (["--config", VKD, "--set", "train.teacher.forward_hook.output=[final_cnv]"], "did you mean 'final_conv'?"),
        (["--config", VKD, "--set", "train.student.forward_hook.output=[features.tokns]"],
         "did you mean 'features.tokens'?"),
        (["--config", VKD, "--set", "train.student.auxiliary_model_wrapper.kwargs.features.tokens.module=nrm"],
         "did you mean 'norm'?"),
        (["--config", VKD, "--set", "train.criterion.kwargs.sub_terms.vkd.criterion.kwargs.distance=smoth_l1"],
         "did you mean 'smooth_l1'?"),
        (["--config", VKD, "--set",
          "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.teacher.readout=spatial_men"],
         "did you mean 'spatial_mean'?"),
        (["--config", VKD, "--set", "train.amp={dtype: float61}"], "float61"),
        (["--config", VKD, "--set", "train.train_data_loader.kwargs.batch_size=0"], "batch_size"),
        (["--config", VKD, "--set", "train.optimizer.kwargs.momentum=0.9"], "momentum"),
        (["--config", VKD, "--set", "train.scheduler.kwargs.T_max=0"], "train"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if arguments:
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    err = capfd.readouterr().err
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Traceback" not in err


def test_a_readout_that_does_not_fit_is_blamed_at_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "experiment.yaml"
    text = Path(VKD).read_text()
    file.write_text(text.replace("readout: 'spatial_mean'", "readout: 'class_token'"))
    line = 1 + text[: text.index("readout: 'spatial_mean'")].count("\n")
    projector = "train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector"
    _run(str(file), tmp_path / "run", "--set", f"{projector}.out_features=128", expect=2)
    err = capfd.readouterr().err
    assert err.startswith(f"error: {file}:{line}:")
    assert "output of module 'final_conv' of the teacher: readout 'class_token' reads tokens (B, T, C)" in err


def test_bad_input_leaves_an_earlier_run_where_it_is(copy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (copy / "checkpoints").iterdir()}
    _run(VKD, copy, "--set", "train.num_epocs=3", expect=2)
    _run(VKD, copy, "--set", "train.student.forward_hook.output=[features.tokns]", expect=2)
    assert before == {p: p.stat().st_mtime_ns for p in (copy / "checkpoints").iterdir()}


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    _run(VKD, tmp_path / "run", "--resume", str(bad), expect=2)
    assert f"{bad}: not a readable checkpoint" in capfd.readouterr().err
    _run(VKD, tmp_path / "run", "--set", f"models.student_model.src_ckpt={bad}", expect=2)
    assert f"{bad}: not a readable checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("kd", "error: training stopped: the loss is nan (ce nan, kl nan) in epoch 1 at step"),
        ("vkd", "error: training stopped: "),
    ],
)
def test_a_loss_that_is_not_finite_ends_with_exit_code_3(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], config: str, message: str
) -> None:
    file = f"configs/digits/{config}/vit_from_cnn.yaml"
    _run(file, tmp_path / "run", "--set", "train.scheduler.kwargs.max_lr=1.0e+35", expect=3)
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_a_projector_whose_weight_runs_away_ends_with_exit_code_3(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Finite, but beyond what its map is defined for: no mistake of the configuration's line."""
    _run(VKD, tmp_path / "run", "--set", "train.scheduler.kwargs.max_lr=1.0e+35", expect=3)
    assert re.search("error: training stopped: .* in epoch 1 at step [0-9]+", capfd.readouterr().err)


def test_a_teacher_that_moves_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchdistill leaves it: in training mode, with BatchNorm statistics that move."""
    monkeypatch.setattr(vkd_plugin.host, "keep_in_eval", lambda teacher, runs: runs.register_forward_hook(_nothing))
    _run(VKD, tmp_path / "run", expect=2)
    assert "error: the frozen teacher changed during training" in capfd.readouterr().err


def _nothing(*args: object) -> None:
    pass


def test_two_runs_cannot_share_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from vkd_plugin.engine.records import RunFolder

    held = RunFolder(tmp_path / "run")
    _run(VKD, tmp_path / "run", expect=2)
    assert "another run is writing there" in capfd.readouterr().err
    held.close()


def test_an_output_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    _run(VKD, tmp_path / "file" / "run", expect=2)
    assert f"error: --output {tmp_path}/file/run: cannot write there" in capfd.readouterr().err


def test_shipped_configs_load_with_torchdistills_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdistill.common.yaml_util import load_yaml_file

    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "datasets" / "ilsvrc2012", classes=1000, train=1, val=1)
    for name in ("coco2017", "coco_shapes"):
        coco_shapes.write_tree(tmp_path / "datasets" / name, train=2, val=2, size=64)
    for file in sorted(Path("configs").rglob("*.yaml")):
        if "tables" not in file.parts:
            config = load_yaml_file(str(file))
            assert {"datasets", "models", "train", "test"} <= config.keys(), file
    assert shutil.which(sys.executable)


def test_a_projector_that_is_not_orthonormal_stops_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vkd_plugin.OrthogonalProjector, "orthogonality_error", lambda self: torch.tensor(2e-3))
    _run(VKD, tmp_path / "run", expect=3)
    expected = "the projector of feature 'tokens' is not orthonormal, max |W^T W - I| is 2.0e-03 (limit 1e-03)"
    assert expected in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["null", "{dtype: bfloat16}", "{dtype: float16}"])
def test_on_a_gpu(tmp_path: Path, amp: str) -> None:
    arguments = [
        "--config",
        VKD,
        *SHORT,
        "--output",
        str(tmp_path / "run"),
        "--device",
        "cuda",
        *_dst(tmp_path / "run"),
    ]
    assert main([*arguments, "--set", f"train.amp={amp}", "--set", "train.channels_last=true"]) == 0
    records = _metrics(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["orthogonality_error/tokens"] < 1e-5


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str, expect: int, *more: str) -> list[dict[str, Any]]:
        arguments = ["--config", VKD, *SHORT, "--output", str(tmp_path / folder), "--device", "cuda"]
        arguments += ["--set", "train.deterministic=true", *_dst(tmp_path / folder), *more]
        assert main(arguments) == expect
        return _metrics(tmp_path / folder)

    whole = run("whole", 0)
    step, steps = EngineBox.post_forward_process, []

    def counted(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        steps.append(0)
        if len(steps) == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EngineBox, "post_forward_process", counted)
    run("part", 75)
    assert run("part", 0, "--resume", "auto") == whole
    one, two = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "part"))
    for part in ("model", "projectors"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [(), ("--set", "train.skip_nonfinite=1", "--set", "train.optimizer.kwargs.fused=true")]
)
def test_a_healthy_step_on_a_gpu_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    step, steps = Trainer._step, []

    def watched(self: Trainer, *args: Any) -> None:
        steps.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 3 else "default")  # libraries make handles at first
        try:
            step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    arguments = ["--config", VKD, *SHORT, "--output", str(tmp_path / "run"), "--device", "cuda"]
    assert main([*arguments, *_dst(tmp_path / "run"), "--set", "train.log_freq=1", *more]) == 0
    assert len(steps) == 24
