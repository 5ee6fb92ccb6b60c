"""run.py check: what it says of sound experiments, against figures found otherwise; and that it leaves no trace."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from vkd_plugin.check import dry, examine, prove, standin
from vkd_plugin.check.facts import Facts
from vkd_plugin.check.fake import SavedBytes
from vkd_plugin.check.page import curve
from vkd_plugin.check.schedule import learning_rates, optimizer_state_factor
from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.models.small import digits_cnn
from vkd_plugin.random_state import generators_state, restore_generators

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if not {"tables", "coco2017", "coco_shapes"} & set(path.parts)
)  # those of detectors need weights from files: see test_coco_configs.py and test_coco_shapes_experiment.py
VKD = ROOT / "configs" / "digits" / "vkd" / "vit_from_cnn.yaml"
IMAGENET = Path(__file__).parent / "data" / "check" / "imagenet.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# Sound experiments.


def test_all_shipped_experiments_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert SHIPPED
    assert main(["check", *map(str, SHIPPED)]) == 0
    out, err = capsys.readouterr()
    absent = ": nothing is at '", "fashion_mnist/crd/", "its data set is not here"  # whose wrapper reads the labels
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert all(absent[0] in line or all(part in line for part in absent[1:]) for line in err.splitlines())
    assert [line.split()[0] for line in out.splitlines() if line.endswith("  ok")] == [str(path) for path in SHIPPED]


def test_the_page_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(VKD)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "models teacher digits_cnn 131,178 parameters 5.94 MFLOPs a sample",
        "data digits/train Digits 1,297 samples of 1 x 8 x 8",
        "teacher final_conv 64 x 128 x 4 x 4",
        "student features.tokens 64 x 128 OrthogonalProjector 48 -> 128, matrix_exp",
        "4 x vkd VkDLoss",
        "optimizer AdamW lr 0.002 weight decay 0.05 56 tensors, 114,778 numbers",
        "training 40 epochs x 20 steps x 64 samples, per process",
    ):
        assert line in lines


def test_json_is_one_object_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    ce = ROOT / "configs" / "digits" / "ce" / "vit.yaml"
    assert main(["check", str(VKD), str(ce), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["path"] for one in found] == [str(VKD), str(ce)]
    (stage,) = found[0]["stages"]
    assert [(term["name"], term["weight"], term["has_gradient"]) for term in stage["terms"]] == [
        ("ce", 1.0, True),
        ("kl", 1.0, True),
        ("vkd", 4.0, True),
    ]
    assert stage["steps_per_epoch"] == 1297 // 64
    assert found[0]["problems"] == []
    (model,) = found[1]["models"]
    assert (model["role"], model["name"], model["parameters"], model["trainable"]) == (
        "model",
        "digits_vit",
        114778,
        114778,
    )


def test_problems_as_json_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    hook = "train.teacher.forward_hook.output.0=final_cnov"
    assert main(["check", str(VKD), str(SHIPPED[0]), "--json", "--set", hook]) == 2
    out, err = capsys.readouterr()
    first, second = (json.loads(line)["problems"] for line in out.splitlines())
    assert [problem["message"].endswith("(did you mean 'final_conv'?)") for problem in first] == [True]
    assert first[0]["file"].startswith("--set ")
    assert first[0]["line"] is None
    assert [problem["message"].startswith("no key 'teacher' in train") for problem in second] == [True]
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == len(first) + len(second)


def test_a_problem_has_its_line_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    text = VKD.read_text().replace("output: ['final_conv']", "output: ['final_cnov', 'haed']")
    file.write_text(text)
    line = next(i for i, line in enumerate(text.splitlines(), 1) if "final_cnov" in line)
    column = text.splitlines()[line - 1].index("'final_cnov'") + 1
    assert main(["check", str(file), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(p["file"], p["line"]) for p in problems] == [(str(file), line), (str(file), line)]
    assert problems[0]["column"] == column
    assert "'final_cnov' (did you mean 'final_conv'?)" in problems[0]["message"]
    assert "'haed'" in problems[1]["message"]


# Neither data nor weights nor network.


def test_an_experiment_whose_data_and_weights_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refused)
    facts = examine(IMAGENET)
    assert facts.problems == []
    assert [warning.split(": ", 1)[1] for warning in facts.warnings] == [
        "datasets.ilsvrc2012/train.init.kwargs.root: nothing is at 'absent/ilsvrc2012/train'",
        "datasets.ilsvrc2012/val.init.kwargs.root: nothing is at 'absent/ilsvrc2012/val'",
    ]
    (stage,) = facts.stages
    assert stage.steps_per_epoch == 1_281_167 // 512
    shapes = {(feature.side, feature.path): feature.shape for feature in stage.features}
    assert shapes["teacher", "final_conv"] == [512, 3024, 7, 7]
    assert shapes["student", "features.tokens"] == [512, 3024]
    teacher = facts.models[0]
    assert teacher.flops is not None
    assert 30e9 < teacher.flops < 33e9  # 15.9 G multiplications with addition, as timm lists them
    assert stage.schedule is not None
    middle = 5e-6 + (5e-4 - 5e-6) / 2
    assert stage.schedule[0] == 5e-4
    assert min(stage.schedule, key=lambda rate: abs(rate - middle)) == pytest.approx(middle, rel=0.05)
    assert stage.schedule[-1] == pytest.approx(5e-6, rel=1e-8)  # 2e-15 above it


def test_data_that_have_to_be_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(IMAGENET), "--data"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert all("No such file or directory" in line and line.startswith(f"error: {IMAGENET}:") for line in err)


def test_stand_ins_go_through_the_transform_and_know_published_sizes() -> None:
    def shape(image: Any) -> tuple[int, ...]:
        return image.size if hasattr(image, "size") else ()

    from torchvision.datasets import CIFAR10, MNIST, ImageFolder

    assert standin.build(CIFAR10, [], {"root": "x", "train": False, "transform": shape})[0] == ((32, 32), 0)
    assert len(standin.build(CIFAR10, [], {"root": "x", "train": False})) == 10_000
    assert standin.build(MNIST, ["x"], {})[1][0].mode == "L"
    folder = standin.build(ImageFolder, ["x"], {})
    assert standin.length_of(folder, "mine") is None
    assert standin.length_of(folder, "ilsvrc2012/val") == 50_000
    split = standin.build(torch.utils.data.random_split, [folder, [1, 2]], {})
    assert split[1] is folder


# Figures, against other ways to find them.


def test_bytes_kept_for_backward_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(8, 10)
    saved = SavedBytes(model)
    with saved.counting():
        model(x)
    # Linear keeps its input, ReLU its output, which is the next Linear's input.
    assert saved.total == 4 * (8 * 10 + 8 * 20)


def test_a_model_without_contents_gives_the_same_figures() -> None:
    experiment = load_experiment(VKD)
    figures = []
    for real in (False, True):
        attempt = dry.Attempt(experiment, Facts("x"), real)
        attempt.run()
        (stage,) = attempt.facts.stages
        figures.append((attempt.facts.models, stage.terms, stage.groups, [f.shape[1:] for f in stage.features]))
        assert stage.memory is not None
        figures[-1] += (stage.memory.weights, stage.memory.gradients, stage.memory.optimizer)
    assert figures[0] == figures[1]


def test_flops_are_two_for_each_multiplication_with_addition() -> None:
    model = digits_cnn()
    expected = 0

    def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal expected
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        expected += 2 * output.numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 1, 8, 8))
    assert examine(VKD).models[0].flops == expected


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"key": "AdamW", "kwargs": {"lr": 1e-3}}, 2.0),
        ({"key": "AdamW", "kwargs": {"lr": 1e-3, "amsgrad": True}}, 3.0),
        ({"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}}, 1.0),
        ({"key": "SGD", "kwargs": {"lr": 1e-3}}, 0.0),
    ],
)
def test_what_an_optimizer_keeps(config: dict[str, Any], factor: float) -> None:
    assert optimizer_state_factor(config) == factor


def scheduler(kind: str, steps: int) -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    if kind == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-3)
    if kind == "one cycle":
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / 1000))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("kind", ["cosine", "one cycle", "lambda"])
def test_a_long_course_is_that_of_all_its_steps(kind: str) -> None:
    steps = 25_000
    found = learning_rates(scheduler(kind, steps), steps)
    stepped = scheduler(kind, steps)
    rates = [stepped.get_last_lr()[0]]
    for _ in range(steps - 1):
        stepped.step()
        rates.append(stepped.get_last_lr()[0])
    assert found is not None
    at = sorted({round(i * (steps - 1) / (len(found) - 1)) for i in range(len(found))})
    assert found == pytest.approx([rates[i] for i in at], rel=1e-6)


def test_a_course_as_bars() -> None:
    assert curve([0.0, 0.5, 1.0]) == "▁▅█"
    assert curve([0.0]) == "▁"


# No trace.


def test_the_experiment_and_the_generators_are_as_before() -> None:
    experiment = load_experiment(VKD)
    before = copy.deepcopy(experiment.data["train"]), experiment.digest()

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    state = generators_state()
    expected = draw()
    restore_generators(state)
    assert prove(experiment) == []
    assert draw() == expected
    assert str((experiment.data["train"], experiment.digest())) == str(before)


def files(folder: Path) -> list[tuple[Path, int]]:
    """Files and when they were written, but the lock."""
    return sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_run_is_checked_before_it_touches_an_earlier_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    short = ["--set", "train.num_epochs=1", "--set", "datasets.digits/train.init.kwargs.fraction=0.1"]
    command = ["--config", str(VKD), "--output", str(tmp_path / "run"), "--device", "cpu", *short]
    assert main(command) == 0
    before = files(tmp_path)
    capfd.readouterr()
    wrong = "train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector.out_features=127"
    assert main([*command, "--set", wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {VKD}:")
    assert "train.criterion.kwargs.sub_terms.vkd" in err
    assert err.count("\n") == 1
    assert files(tmp_path) == before


def test_a_model_that_needs_a_gpu_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this kernel takes CUDA tensors")

    monkeypatch.setattr(type(digits_cnn()), "forward", forward)
    facts = examine(VKD)
    assert facts.problems == []
    (warning,) = facts.warnings
    assert "train: the rest of the step is not checked, it needs a GPU: this kernel takes CUDA tensors" in warning


def test_what_the_loss_does_not_reach_is_named_by_its_module(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    text = VKD.read_text()
    terms = text[text.index("        ce:\n") : text.index("        vkd:\n")]
    file.write_text(text.replace(terms, ""))
    line = text[: text.index("  student:\n    forward_proc")].count("\n") + 1
    (problem,) = examine(file).problems
    assert str(problem) == (
        f"{file}:{line}:3: train.student: the loss sends no gradient to 'model.head': "
        "use it in a term, or name it under frozen_modules"
    )


def test_a_hook_that_nothing_reads_is_a_warning() -> None:
    facts = examine(VKD, ["train.student.forward_hook.output=[features.tokens, model.head]"])
    assert facts.problems == []
    (warning,) = facts.warnings
    assert warning.endswith(
        "train.student.forward_hook.output.1: 'model.head' is hooked and no term of the loss reads it"
    )


def test_what_fails_in_a_model_names_the_module() -> None:
    (problem,) = examine(VKD, ["models.student_model.kwargs.in_chans=3"]).problems
    assert str(problem).endswith("to have 3 channels, but got 1 channels instead (in module 'patch_embed.proj')")
    assert "models.student_model: RuntimeError" in str(problem)


def test_a_file_that_forgets_the_plugin_is_warned(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(VKD.read_text().replace("dependencies: ['vkd_plugin']\n", ""))
    facts = examine(file)
    assert facts.problems == []
    (warning,) = facts.warnings
    assert warning.endswith("is this plugin's: torchdistill's own scripts need dependencies: ['vkd_plugin']")


@pytest.mark.parametrize("place", ["train.teacher.src_ckpt", "models.student_model.src_ckpt"])
def test_weights_to_be_downloaded_are_not_asked_for(place: str) -> None:
    assert examine(VKD, [f"{place}=https://example.org/x.pt"]).problems == []


def test_a_teachers_weights_to_be_downloaded_are_not_asked_for() -> None:
    teacher = "models.teacher_model.kwargs={name: regnety_160.deit_in1k, checkpoint: 'https://example.org/x.pt'}"
    assert examine(IMAGENET, [teacher]).problems == []


@pytest.mark.parametrize(
    "before",
    [
        "          tokens:\n",
        "            module: 'norm'\n",
        "        vkd:\n",
        "          weight: 4.0\n",
        "        ce:\n",
    ],
)
def test_a_private_key_is_nowhere_an_error(before: str, tmp_path: Path) -> None:
    text = VKD.read_text()
    assert before in text
    file = tmp_path / "x.yaml"
    indent = " " * (len(before) - len(before.lstrip()))
    file.write_text(text.replace(before, f"{indent}_why: &why [1e-4]\n{before}", 1))
    facts = examine(file)
    assert (facts.problems, facts.warnings) == ([], [])


def test_a_private_key_in_a_mapping_of_arguments_is_nowhere_an_error(tmp_path: Path) -> None:
    text = VKD.read_text()
    for old in ("{module: 'features.tokens'}", "{key: 'OrthogonalProjector', ", "{mean: [0.3]"):
        assert old in text
        text = text.replace(old, "{_why: 1, " + old[1:], 1)
    file = tmp_path / "x.yaml"
    file.write_text(text)
    assert examine(file).problems == []
