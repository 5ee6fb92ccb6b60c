"""The contract as somebody outside would check it: fresh random inputs, odd input, runs that are cut off."""

import copy
import json
import re
import shutil
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_helper import run_py
from torch import nn
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.nn.utils import parametrizations
from torchdistill.losses.registry import LOW_LEVEL_LOSS_DICT

from vkd_plugin import OrthogonalProjector, VkDLoss, normalize, orthogonalize
from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.engine.loaders import position_at, set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.records import RunFolder, default_output, read_metrics
from vkd_plugin.engine.train import Trainer
from vkd_plugin.errors import UserError
from vkd_plugin.models import digits_cnn, digits_vit
from vkd_plugin.readouts import READOUTS
from vkd_plugin.wrappers import ProjectedStudent

ROOT = Path(__file__).parents[1]
VKD = "configs/digits/vkd/vit_from_cnn.yaml"
MAPS = ("matrix_exp", "cayley", "householder", "cholesky_qr", "polar")
SHORT = (
    "--device", "cpu", "--set", "train.num_epochs=1", "--set", "datasets.digits/train.init.kwargs.fraction=0.1",
    "--set", "train.train_data_loader.kwargs.batch_size=32", "--set", "models.student_model.dst_ckpt=null",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def draw() -> torch.Generator:
    """Another seed at every call; a failure shows it."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


# Python.


def _reference(raw: torch.Tensor, orthogonal_map: str) -> torch.Tensor:
    tall = raw if raw.shape[0] >= raw.shape[1] else raw.mT
    if orthogonal_map == "cholesky_qr":
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal().sign()
        return q if tall is raw else q.mT
    if orthogonal_map == "polar":
        u, _, vh = torch.linalg.svd(raw, full_matrices=False)
        return u @ vh
    layer = nn.Linear(raw.shape[1], raw.shape[0], bias=False, dtype=raw.dtype)
    parametrizations.orthogonal(layer, orthogonal_map=orthogonal_map, use_trivialization=False)
    with torch.no_grad():
        layer.get_parameter("parametrizations.weight.original").copy_(raw)
    return layer.weight.detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_each_map_is_what_the_contract_says(
    draw: torch.Generator, orthogonal_map: str, dtype: torch.dtype, tolerance: float
) -> None:
    for _ in range(15):
        n, k = torch.randint(1, 25, (2,), generator=draw).tolist()
        raw = torch.randn(n, k, generator=draw, dtype=torch.float64)
        if orthogonal_map in ("cholesky_qr", "polar"):  # the difference to the reference grows with the condition
            u, _, vh = torch.linalg.svd(raw, full_matrices=False)
            raw = u * (1 + 9 * torch.rand(min(n, k), generator=draw, dtype=torch.float64)) @ vh
        raw = raw.to(dtype)
        if orthogonal_map == "householder":
            raw.diagonal().copy_(torch.randint(0, 2, (min(n, k),), generator=draw) * 2 - 1)
        weight = orthogonalize(raw, orthogonal_map)
        assert weight.dtype == dtype
        assert (weight - _reference(raw, orthogonal_map)).abs().max() <= tolerance, (n, k)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_a_projector_keeps_similarities_under_autocast_and_takes_a_weight(
    draw: torch.Generator, orthogonal_map: str
) -> None:
    projector = OrthogonalProjector(7, 18, orthogonal_map=orthogonal_map)
    x = torch.randn(4, 3, 7, generator=draw)
    assert torch.allclose(projector(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert projector.orthogonality_error() <= 1e-5
        assert projector(x).dtype == torch.bfloat16
    wanted = torch.linalg.qr(torch.randn(18, 7, generator=draw))[0]
    projector.weight = wanted
    assert (copy.deepcopy(projector).weight - wanted).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="orthonormal"):
        projector.weight = 2 * wanted


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_steps_with_weight_decay_leave_the_weight_orthonormal_and_the_student_a_gradient(
    draw: torch.Generator, orthogonal_map: str
) -> None:
    projector = OrthogonalProjector(5, 40, orthogonal_map=orthogonal_map)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2, weight_decay=0.3)
    x = torch.randn(16, 5, generator=draw, requires_grad=True)
    teacher = torch.randn(16, 40, generator=draw)
    for _ in range(4):
        x.grad = None
        VkDLoss()(projector(x), teacher).backward()
        optimizer.step()
        assert projector.orthogonality_error() <= 1e-5
        assert x.grad is not None
        assert x.grad.norm() > 1e-4


@pytest.mark.parametrize(("n", "c"), [(200, 9), (9, 200), (1, 4), (5, 5)])
def test_normalisations(draw: torch.Generator, n: int, c: int) -> None:
    x = torch.randn(n, c, generator=draw) * 3 + 7
    assert torch.equal(normalize(x, "none"), x)
    assert torch.allclose(normalize(x, "l2"), x / x.norm(dim=1, keepdim=True))
    assert torch.allclose(normalize(x, "layer_norm"), layer_norm(x, (c,)))
    for method in ("none", "l2", "layer_norm", "standardize", "whiten"):
        leaf = x.clone().requires_grad_()
        y = normalize(leaf, method)
        y.pow(3).sum().backward()
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    if n > c:
        scaled = normalize(x, "standardize")
        assert torch.allclose(scaled.mean(0), torch.zeros(c), atol=1e-5)
        assert torch.allclose(scaled.std(0), torch.ones(c), atol=1e-5)
        assert (torch.cov(normalize(x, "whiten").T) - torch.eye(c)).abs().max() <= 1e-4


def test_the_loss_and_its_registration(draw: torch.Generator) -> None:
    student = torch.randn(6, 11, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 11, generator=draw, dtype=torch.float64, requires_grad=True)
    loss = VkDLoss(normalization="layer_norm", distance="smooth_l1", normalize_student=False)(student, teacher)
    assert abs(loss - smooth_l1_loss(student, layer_norm(teacher, (11,)))) <= 1e-12
    loss.backward()
    assert teacher.grad is None
    assert LOW_LEVEL_LOSS_DICT["VkDLoss"] is VkDLoss


# The wrapper.


def _wrapped() -> ProjectedStudent:
    projector = {"in_features": 48, "out_features": 64}
    tokens = {"module": "norm", "readout": "mean_patch_tokens", "projector": projector}
    return ProjectedStudent(digits_vit(), {"tokens": tokens})


def test_a_copied_student_keeps_its_features_to_itself() -> None:
    wrapper, images, seen = _wrapped(), torch.randn(2, 1, 8, 8), []
    other = copy.deepcopy(wrapper)
    wrapper.features["tokens"].register_forward_hook(lambda module, args, output: seen.append(output))
    other(images)
    copy.deepcopy(wrapper.model)(images)  # as an average of the student does
    assert not seen
    wrapper(images)
    assert len(seen) == 1
    digits_vit().load_state_dict(wrapper.state_dict())


def test_a_wrapped_student_is_one_graph() -> None:
    assert torch._dynamo.explain(_wrapped())(torch.randn(2, 1, 8, 8)).graph_break_count == 0


def test_a_module_that_does_not_run_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.unused = nn.Identity()
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    wrapper = ProjectedStudent(model, {"f": {"module": "unused", "projector": {"in_features": 3, "out_features": 5}}})
    with pytest.raises(ValueError, match="module 'unused' does not run"):
        wrapper(torch.randn(2, 4))


@pytest.mark.parametrize("readout", ["mean_patch_tokens", "every_token"])
@pytest.mark.parametrize("prefix", [-1, 6])
def test_prefix_tokens_that_leave_something_else(readout: str, prefix: int) -> None:
    with pytest.raises(ValueError, match=f"num_prefix_tokens={prefix}"):
        READOUTS[readout](torch.zeros(2, 6, 3), prefix)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.train_data_loader.kwargs={batch_size: 5000, drop_last: true}"], "129 samples"),
        (["--set", "train.num_epochs=0"], "nothing to train"),
        (["--start_epoch", "3"], "nothing to train"),
        (["--set", "train.ema={decay: 1.0}"], "decay must lie in [0, 1), got 1"),
        (["--set", "train.compile={student: fastest}"], "'fastest'"),
        (["--set", "train.compile={student: {mode: default}}"], "train.compile.student"),
        (["--run_log", "/proc/no/such.log"], "/proc/no/such.log: cannot write"),
        (["--set", "models.student_model.dst_ckpt=/proc/no/student.pt"], "cannot save the checkpoint"),
        (["--output", ""], "the name of the folder is empty"),
        (["--output", "/proc/no"], "cannot write there"),
        (["--set", "models.student_model.kwargs.num_classes=7"], "7 outputs for the 10 classes of data set"),
        (["--set", "models.teacher_model.kwargs.num_classes=7"], "does not fit DigitsCNN"),
    ],
)
def test_odd_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", VKD, *SHORT, "--output", str(tmp_path / "run"), *arguments]) == 2
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]


def test_a_damaged_teacher(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "é.safetensors"
    bad.write_bytes((ROOT / "configs/digits/ce/digits_cnn.safetensors").read_bytes()[:1000])
    change = f"models.teacher_model.kwargs.checkpoint={bad}"
    assert main(["--config", VKD, *SHORT, "--output", str(tmp_path / "run"), "--set", change]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: --set {change}: models.teacher_model.")
    assert f": {bad}: not a readable checkpoint: " in err
    assert err.count("\n") == 1


def test_where_a_run_goes_by_default() -> None:
    assert default_output("/a/configs/x/y.yaml") == Path("runs/x/y")
    assert default_output("configs/../y.yaml") == Path("runs/y")
    assert default_output("y.yaml") == Path("runs/y")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a run of one epoch in ``~/run``."""
    home = tmp_path_factory.mktemp("home")
    arguments = ["--config", VKD, *SHORT, "--output", "~/run", "--run_log", "~/my.log"]
    (ended,) = run_py(*arguments, environment={"HOME": str(home)})
    assert ended.code == 0, ended.err
    return home


def test_the_home_folder_is_understood(finished: Path) -> None:
    assert {"summary.json", "metrics.jsonl"} <= {path.name for path in (finished / "run").iterdir()}
    assert "test student" in (finished / "my.log").read_text()
    assert not (ROOT / "~").exists()


def _resumed(folder: Path, checkpoint: str = "auto", *more: str) -> list[dict[str, Any]]:
    two = ["--set", "train.num_epochs=2", "--set", "train.scheduler.kwargs.total_steps=40"]
    arguments = ["--config", VKD, *SHORT, *two, "--output", str(folder), "--resume", checkpoint]
    arguments += ["--allow-config-change", *more]
    assert main(arguments) == 0
    return read_metrics(folder)


@pytest.mark.parametrize("damage", ["torn metrics", "no best.pt", "best.pt of another epoch"])
def test_what_a_killed_process_may_leave_behind(finished: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    best = run / "checkpoints" / "best.pt"
    if damage == "torn metrics":
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "st')
        (run / "checkpoints" / "last.pt.1.tmp").write_bytes(b"a part")
    elif damage == "no best.pt":
        best.unlink()
    else:
        torch.save({**torch.load(best), "step": 999}, best)
    assert [record["epoch"] for record in _resumed(run)] == [1, 2]
    named = json.loads((run / "summary.json").read_text())["best"]
    assert torch.load(best)["step"] == named["step"]
    assert not [*best.parent.glob("*.tmp")]


def test_resuming_elsewhere_moves_a_run_there_aside_and_brings_the_best_along(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "run", other)
    torch.save({"step": -1}, other / "checkpoints" / "best.pt")
    records = _resumed(other, str(finished / "run" / "checkpoints" / "last.pt"))
    assert [record["epoch"] for record in records] == [1, 2]
    assert torch.load(tmp_path / "other.1" / "checkpoints" / "best.pt") == {"step": -1}
    assert torch.load(other / "checkpoints" / "best.pt")["step"] > 0
    assert len(read_metrics(finished / "run")) == 1


def test_another_seed_is_said(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    _resumed(tmp_path / "run", "auto", "--seed", "3")
    assert "--seed: 0 -> 3" in capfd.readouterr().err


def test_folders_that_are_not_to_be_moved(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match="not a run's"):
        RunFolder(tmp_path / "mine").start_afresh()
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="working folder"):
        RunFolder(tmp_path / "run").start_afresh()


def test_a_link_to_an_output_folder_stays_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "link")
    folder.start_afresh()
    folder.close()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk.1" / "metrics.jsonl").exists()
    assert not (tmp_path / "disk" / "metrics.jsonl").exists()


def test_within_an_epoch_another_batch_size_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    def trainer(batch_size: int) -> Trainer:
        changes = [part for part in SHORT if "=" in part and "batch_size" not in part]
        changes.append(f"train.train_data_loader.kwargs.batch_size={batch_size}")
        experiment = load_experiment(VKD, changes)
        return Trainer(experiment, digits_cnn(), digits_vit(), Processes(0, 1, torch.device("cpu")), None, 0)

    before, after = trainer(16), trainer(32)
    loader = before.box.train_data_loader
    set_position(loader, 0)
    seen = [index for batch in islice(loader.batch_sampler, 3) for index in batch.indices]
    before.step, before.position = 3, position_at(loader, 3)
    after.resume(before.state(), tmp_path / "last.pt")
    assert (after.position.batches, after.position.samples, after.step) == (3, 48, 3)
    set_position(after.box.train_data_loader, 0, after.position)
    left = [index for batch in after.box.train_data_loader.batch_sampler for index in batch.indices]
    assert not set(seen) & set(left)
    size = len(loader.dataset)
    assert len(set(seen + left)) == len(seen) + len(left) == 48 + (size - 48) // 32 * 32  # drop_last


# Several processes.


def test_a_signal_to_one_process_stops_all_of_them_after_saving(tmp_path: Path) -> None:
    """To the one that writes nothing: the other has to hear of it before it waits for gradients."""
    before = f"""
import os, signal
from vkd_plugin.engine.box import EngineBox
step, done = EngineBox.post_forward_process, []
def stopped(self, *args, **kwargs):
    step(self, *args, **kwargs)
    done.append(0)
    if len(done) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), {int(signal.SIGTERM)})
EngineBox.post_forward_process = stopped
"""
    arguments = ["--config", VKD, *SHORT, "--set", "train.train_data_loader.kwargs.batch_size=8"]
    ended = run_py(*arguments, "--output", str(tmp_path / "run"), number=2, before=before)
    err = "".join(process.err for process in ended)
    assert err.count("error: stopped at step 4, all saved") == 1, err
    assert [process.code for process in ended] == [75, 75], err
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["batch"] == 4


def test_what_one_process_cannot_do_ends_all_of_them_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run_py("--config", VKD, *SHORT, "--output", str(tmp_path / "file" / "run"), number=2)
    err = "".join(process.err for process in ended)
    assert [process.code for process in ended] == [2, 2], err
    assert re.findall(r"^error: .*", err, re.M) == [
        f"error: --output {tmp_path}/file/run: cannot write there: Not a directory"
    ]


# Tables.


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("'t'", "2020-99-99", 1, "month must be in 1..12"),
        ("'t'", "!foo x", 1, "could not determine a constructor"),
        ("seeds: [0]", "seeds: [true]", 3, "'seeds' should be a list of integers"),
        ("seeds: [0]", "seeds: [-1]", 3, "'seeds' should be a list of integers, none negative"),
        ("seeds: [0]", "seeds: [0, 0]", 3, "'seeds' names one seed twice"),
        ("seeds: [0]", "title: 'u'", 3, "key 'title' is written twice"),
        ("seeds: [0]", "? [1]", 3, "a key of a table should be"),
        ("'a'", "''", 5, "'name' should have a letter"),
    ],
)
def test_odd_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, message: str
) -> None:
    text = f"title: 't'\nmetric: 'm'\nseeds: [0]\nrows:\n  - {{name: 'a', config: '{VKD}'}}\n"
    file = tmp_path / "table.yaml"
    file.write_text(text.replace(old, new, 1))
    assert main(["table", str(file)]) == 2
    where, said = capsys.readouterr().err.split(": ", 2)[1:]
    assert where.rpartition(":")[0] == f"{file}:{line}"
    assert said.startswith(message)


def test_a_summary_counts_for_the_experiment_that_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("")
    Path("t.yaml").write_text("title: 't'\nmetric: 'm'\nrows:\n  - {name: 'a', config: 'c.yaml', set: ['x=1']}\n")
    file = Path("runs/tables/t/a/seed0/summary.json")
    file.parent.mkdir(parents=True)
    for overrides, cell in ((["x=1"], "5.00"), (["x=2"], "-")):
        file.write_text(json.dumps({"config": "c.yaml", "overrides": overrides, "m": 5, "wall_seconds": 60}))
        assert main(["table", "t.yaml", "--md"]) == 0
        assert capsys.readouterr().out.splitlines()[2].split(" | ")[1] == cell
    for text in ("", "[]", '{"config": "c.yaml", "overrides": ["x=1"], "m": null, "wall_seconds": 60}'):
        file.write_text(text)
        assert main(["table", "t.yaml"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
