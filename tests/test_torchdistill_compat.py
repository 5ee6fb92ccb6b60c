"""Experiments written for torchdistill run under ``run.py``, and ours run under torchdistill's own scripts."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
from processes_helper import run_py
from torch import Tensor, nn
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, load_ckpt, save_ckpt, set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.models.registry import get_model
from torchvision.models import resnet18

from vkd_plugin.cli import main
from vkd_plugin.engine.train import Trainer
from vkd_plugin.models import digits_cnn, digits_vit
from vkd_plugin.models.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/digits/vkd/vit_from_cnn.yaml"

State = dict[str, Tensor]


# --- experiments in torchdistill's style, on digits -----------------------------------------------------------

DATA = """
dependencies: ['vkd_plugin'{more}]
datasets:
  &train digits/train: !import_call
    key: 'vkd_plugin.datasets.Digits'
    init:
      kwargs:
        split: 'train'
        fraction: 0.1
        transform: &to_tensor !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call
                  key: 'torchvision.transforms.Grayscale'
                  init:
                    kwargs: {{num_output_channels: {channels}}}
                - !import_call
                  key: 'torchvision.transforms.ToTensor'
                  init:
  &test digits/test: !import_call
    key: 'vkd_plugin.datasets.Digits'
    init:
      kwargs: {{split: 'test', transform: *to_tensor}}
"""

MODELS = """
models:
  teacher_model:
    key: 'digits_cnn'
    kwargs: {width: 8}
  student_model:
    key: 'digits_cnn'
    kwargs: {width: 4}
    dst_ckpt: 'OUTPUT/student.pt'
"""

LOADERS = """
train_data_loader:
  dataset_id: *train
  sampler:
    class_or_func: !import_get
      key: 'torch.utils.data.RandomSampler'
    kwargs:
  kwargs: {batch_size: 32, num_workers: 0, drop_last: True}
  cache_output:
val_data_loader:
  dataset_id: *test
  sampler: &in_order
    class_or_func: !import_get
      key: 'torch.utils.data.SequentialSampler'
    kwargs:
  kwargs: {batch_size: 250, num_workers: 0}
"""

TEST = """
test:
  test_data_loader:
    dataset_id: *test
    sampler: *in_order
    kwargs: {batch_size: 250, num_workers: 0}
"""

CE = """
ce:
  criterion: {key: 'CrossEntropyLoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: False, module_path: '.', io: 'output'}
      target: {uses_label: True}
  weight: 1.0
"""

KD = """
kd:
  criterion:
    key: 'KDLoss'
    kwargs:
      student_module_path: '.'
      student_module_io: 'output'
      teacher_module_path: '.'
      teacher_module_io: 'output'
      temperature: 4.0
      alpha: 0.5
      reduction: 'batchmean'
  weight: 1.0
"""

FROZEN_TEACHER = "teacher: {forward_proc: 'forward_batch_only', sequential: [], wrapper: , requires_grad: False}"
PLAIN_STUDENT = """
student:
  forward_proc: 'forward_batch_only'
  adaptations:
  sequential: []
  frozen_modules: []
  wrapper: 'DistributedDataParallel'
  requires_grad: True
"""


def experiment(*train: str, models: str = MODELS, more: str = "", channels: int = 1) -> str:
    """A file with the pieces ``train`` under that key; ``more`` dependencies."""
    data = DATA.format(more=more, channels=channels)
    return "".join([data, models, "train:\n", _below(_joined(train), 2), TEST])


def criterion(*terms: str) -> str:
    return "criterion:\n  key: 'WeightedSumLoss'\n  kwargs:\n    sub_terms:\n" + _below(_joined(terms), 6)


def sgd(lr: float = 0.05) -> str:
    return f"optimizer: {{key: 'SGD', kwargs: {{lr: {lr}, momentum: 0.9, weight_decay: 0.0005}}}}"


def stage(number: int, *pieces: str) -> str:
    return f"stage{number}:\n" + _below(_joined(pieces), 2)


def _joined(pieces: Iterable[str]) -> str:
    return "".join(piece.strip("\n") + "\n" for piece in pieces)


def _below(text: str, depth: int) -> str:
    return indent(text.strip("\n") + "\n", depth * " ")


# --- running them ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run did.

    Args:
        students: state of the bare student at the beginning and after each epoch.
        teachers: likewise of the bare teacher.
        wrapped: what the student's side holds beside the student (an auxiliary wrapper's layers), likewise.
        output: the folder.
    """

    output: Path
    students: list[State] = field(default_factory=list)
    teachers: list[State] = field(default_factory=list)
    wrapped: list[State] = field(default_factory=list)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def test_of_the_student(self) -> dict[str, float]:
        return json.loads((self.output / "summary.json").read_text())["test"]["student"]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs an experiment by the command line to its end and watches the models while it does."""

    def note(run: Run, trainer: Trainer) -> None:
        box = trainer.box
        run.students.append(_state(box.bare_student))
        run.teachers.append(_state(trainer.teacher))
        run.wrapped.append({} if box.wrapper is None else _state(box.wrapper))

    def train(text: str) -> Run:
        run = Run(tmp_path / "run")
        whole, after_epoch = Trainer.train, Trainer._post_epoch

        def watched(self: Trainer) -> Any:
            note(run, self)
            return whole(self)

        def watched_epoch(self: Trainer, *args: Any) -> None:
            note(run, self)
            after_epoch(self, *args)

        monkeypatch.setattr(Trainer, "train", watched)
        monkeypatch.setattr(Trainer, "_post_epoch", watched_epoch)
        path = tmp_path / "experiment.yaml"
        path.write_text(text.replace("OUTPUT", str(tmp_path)))
        trust = ["--trust", "extension_of_a_user"]
        assert main(["--config", str(path), "--output", str(run.output), "--device", "cpu", *trust]) == 0
        assert run.test_of_the_student()["top1"] >= 0
        return run

    return train


def _state(model: nn.Module | None) -> State:
    return {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: State, after: State, prefix: str = "") -> set[str]:
    """Names below ``prefix`` (cut off) whose values differ."""
    assert before.keys() == after.keys()
    names = [name for name in before if name.startswith(prefix)]
    assert names, f"nothing below '{prefix}'"
    return {name.removeprefix(prefix) for name in names if not torch.equal(before[name], after[name])}


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def everything(state: State) -> set[str]:
    return set(state)


# --- torchdistill's methods under run.py ----------------------------------------------------------------------


def test_kd(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(experiment("num_epochs: 2", LOADERS, FROZEN_TEACHER, PLAIN_STUDENT, sgd(), criterion(KD)))
    assert changed(run.students[0], run.students[-1]) == everything(run.students[0])
    assert changed(run.teachers[0], run.teachers[-1]) == set()
    digits_cnn(width=4).load_state_dict(read_checkpoint(tmp_path / "student.pt")["model"])
    assert run.metrics()[-1]["loss/kd"] < run.metrics()[0]["loss/kd"]


SRD = """
{side}:
  forward_proc: 'forward_batch_only'
  auxiliary_model_wrapper:
    key: 'SRDModelWrapper'
    kwargs:
      input_module: {{path: 'model.final_conv', io: 'output'}}
      norm_kwargs: {{num_features: 32, eps: 0.0001, affine: False}}
      {linear}
  sequential: []
  forward_hook: {{input: [], output: ['model.final_conv', 'norm_layer']}}
  wrapper:
  requires_grad: {trains}
"""

SRD_TERM = """
srd:
  criterion:
    key: 'SRDLoss'
    kwargs:
      student_feature_module_path: 'norm_layer'
      student_feature_module_io: 'output'
      teacher_feature_module_path: 'norm_layer'
      teacher_feature_module_io: 'output'
      student_linear_module_path: '.'
      student_linear_module_io: 'output'
      teacher_linear_module_path: '.'
      teacher_linear_module_io: 'output'
      exponent: 4.0
      temperature: 1.0
      reduction: 'batchmean'
  weight: 1.0
"""


def test_srd_with_a_wrapper_around_either_model(train: Callable[..., Run], tmp_path: Path) -> None:
    """The teacher's own BatchNorm stands still; the one that the wrapper adds at its side normalises the batch."""
    linear = "linear_kwargs: {in_features: 16, out_features: 32}"
    text = experiment(
        "num_epochs: 2",
        LOADERS,
        SRD.format(side="teacher", linear="", trains=False),
        SRD.format(side="student", linear=linear, trains=True),
        sgd(),
        criterion(CE, SRD_TERM),
    )
    run = train(text)
    assert changed(run.students[0], run.students[-1]) == everything(run.students[0])
    assert changed(run.teachers[0], run.teachers[-1]) == set()
    assert {"weight", "bias"} <= changed(run.wrapped[0], run.wrapped[-1], "linear.")
    assert {"running_mean", "running_var"} <= changed(run.wrapped[0], run.wrapped[-1], "norm_layer.")
    digits_cnn(width=4).load_state_dict(read_checkpoint(tmp_path / "student.pt")["model"])
    beside = read_checkpoint(run.output / "checkpoints" / "last.pt")["projectors"]
    assert torch.equal(beside["linear.weight"], run.wrapped[-1]["linear.weight"])


CRD = """
{side}:
  forward_proc: 'forward_batch_supp_dict'
  auxiliary_model_wrapper:
    key: 'Linear4CRD'
    kwargs:
      input_module_path: 'model.final_conv'
      linear_kwargs: {{in_features: {features}, out_features: 16, bias: True}}
      power: 2
  sequential: []
  forward_hook: {{input: {hooked}, output: ['model.final_conv', 'normalizer']}}
  wrapper:
  requires_grad: True
  frozen_modules: {frozen}
"""

CRD_TERM = """
crd:
  criterion:
    key: 'CRDLoss'
    kwargs:
      teacher_norm_module_path: 'normalizer'
      student_norm_module_path: 'normalizer'
      student_empty_module_path: 'empty'
      input_size: 16
      output_size: 130
      num_negative_samples: 8
      num_samples: 130
  weight: 0.8
"""


def test_crd_with_samples_that_bring_a_supplement(train: Callable[..., Run]) -> None:
    wrapped = (
        "  dataset_wrapper: {key: 'CRDDatasetWrapper', kwargs: {num_negative_samples: 8, mode: 'exact', ratio: 1.0}}"
    )
    run = train(
        experiment(
            "num_epochs: 1",
            LOADERS.replace("  sampler:", wrapped + "\n  sampler:", 1),
            CRD.format(side="teacher", features=512, hooked=[], frozen=["model"]),
            CRD.format(side="student", features=256, hooked=["empty"], frozen=[]),
            sgd(0.01),
            criterion(KD, CRD_TERM),
        )
    )
    assert changed(run.students[0], run.students[-1]) == everything(run.students[0])
    assert changed(run.teachers[0], run.teachers[-1]) == set()
    assert changed(run.wrapped[0], run.wrapped[-1], "normalizer.") == {"linear.weight", "linear.bias"}
    assert run.metrics()[0]["loss/crd"] > 0


HINT_TEACHER = """
teacher:
  forward_proc: 'forward_batch_only'
  sequential: ['stem']
  forward_hook: {input: [], output: ['stem']}
  wrapper: 'DistributedDataParallel'
  requires_grad: False
"""

HINT_STUDENT = """
student:
  forward_proc: 'forward_batch_only'
  adaptations:
    regressor:
      key: 'ConvReg'
      kwargs: {num_input_channels: 8, num_output_channels: 16, kernel_size: 1, stride: 1, padding: 0}
  sequential: ['stem', '+regressor']
  frozen_modules: []
  forward_hook: {input: [], output: ['+regressor']}
  wrapper: 'DistributedDataParallel'
  requires_grad: True
"""

HINT_TERM = """
hint:
  criterion: {key: 'MSELoss', kwargs: {reduction: 'sum'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: False, module_path: '+regressor', io: 'output'}
      target: {is_from_teacher: True, module_path: 'stem', io: 'output'}
  weight: 0.001
"""


def test_two_stages_with_a_part_of_the_student_an_adaptation_and_frozen_modules(train: Callable[..., Run]) -> None:
    run = train(
        experiment(
            stage(1, "num_epochs: 1", LOADERS, HINT_TEACHER, HINT_STUDENT, sgd(), criterion(HINT_TERM)),
            stage(
                2,
                "num_epochs: 1",
                FROZEN_TEACHER,
                PLAIN_STUDENT.replace("frozen_modules: []", "frozen_modules: ['stem']"),
                sgd(),
                criterion(KD),
            ),
        )
    )
    start, hinted, end = run.students
    assert changed(start, hinted) == {name for name in start if name.startswith("stem.")}
    trained = top_level(changed(hinted, end)) - {"stem"}
    assert trained == {"middle", "final_conv", "head"}
    assert not any(name.endswith(("weight", "bias")) for name in changed(hinted, end, "stem."))
    assert changed(run.teachers[0], run.teachers[-1]) == set()
    assert [set(r) & {"loss/hint", "loss/kd"} for r in run.metrics()] == [{"loss/hint"}, {"loss/kd"}]


FT_TEACHER = """
teacher:
  forward_proc: 'forward_batch_only'
  sequential: []
  auxiliary_model_wrapper:
    key: 'Teacher4FactorTransfer'
    kwargs:
      minimal: {minimal}
      input_module_path: 'teacher_model.final_conv'
      paraphraser_kwargs:
        {{k: 0.5, num_input_channels: 32, kernel_size: 3, stride: 1, padding: 1, uses_bn: False}}
      paraphraser_ckpt: 'OUTPUT/paraphraser.pt'
      uses_decoder: {trains}
  forward_hook: {{input: [], output: ['teacher_model.final_conv', 'paraphraser']}}
  wrapper:
  requires_grad: {trains}
  frozen_modules: {frozen}
"""

NO_STUDENT = """
student:
  forward_proc: 'forward_batch_only'
  adaptations:
  auxiliary_model_wrapper: {key: 'EmptyModule', kwargs: }
  sequential: []
  forward_hook: {input: [], output: []}
  wrapper:
  requires_grad: False
"""

FT_STUDENT = """
student:
  forward_proc: 'forward_batch_only'
  adaptations:
  sequential: []
  auxiliary_model_wrapper:
    key: 'Student4FactorTransfer'
    kwargs:
      input_module_path: 'student_model.final_conv'
      translator_kwargs:
        {num_input_channels: 16, num_output_channels: 16, kernel_size: 3, stride: 1, padding: 1, uses_bn: False}
  forward_hook: {input: [], output: ['student_model.final_conv', 'translator']}
  wrapper:
  requires_grad: True
  frozen_modules: []
"""

RECONSTRUCTION = """
reconstruction:
  criterion: {key: 'MSELoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: True, module_path: 'paraphraser', io: 'output'}
      target: {is_from_teacher: True, module_path: 'teacher_model.final_conv', io: 'output'}
  weight: 1.0
"""

FT_TERM = """
ft:
  criterion:
    key: 'FTLoss'
    kwargs: {p: 1, reduction: 'mean', paraphraser_path: 'paraphraser', translator_path: 'translator'}
  weight: 10.0
"""


def test_factor_transfer_trains_at_the_teachers_side_first(train: Callable[..., Run], tmp_path: Path) -> None:
    minimal = "{sequential: ['stem', 'pool', 'middle', 'final_conv']}"
    run = train(
        experiment(
            stage(
                1,
                "num_epochs: 2",
                LOADERS,
                FT_TEACHER.format(minimal=minimal, trains=True, frozen=["teacher_model"]),
                NO_STUDENT,
                sgd(),
                criterion(RECONSTRUCTION),
            ),
            stage(
                2,
                "num_epochs: 1",
                FT_TEACHER.format(minimal="", trains=False, frozen=[]),
                FT_STUDENT,
                sgd(),
                criterion(CE, FT_TERM),
            ),
        )
    )
    assert changed(run.students[0], run.students[2]) == set()
    assert changed(run.students[2], run.students[3]) == everything(run.students[3])
    assert changed(run.teachers[0], run.teachers[-1]) == set()
    first, second, _ = run.metrics()
    assert second["loss/reconstruction"] < first["loss/reconstruction"]
    assert (tmp_path / "paraphraser.pt").exists()


EXTENSION = '''
"""What a user's own module brings: a post-forward process, and a wrapper with a second forward pass."""

import torch
from torch import nn
from torchdistill.core.interfaces.registry import register_post_forward_proc_func
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

calls = []


@register_post_forward_proc_func
def step_by_sign(self, loss, metrics=None, **kwargs):
    """Only signs of gradients count."""
    calls.append(loss.item())
    self.optimizer.zero_grad()
    loss.backward()
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.sign_()
    self.optimizer.step()


@register_auxiliary_model_wrapper
class WithRegressor(AuxiliaryModelWrapper):
    def __init__(self, student_model, channels, device, device_ids, distributed):
        super().__init__()
        self.model = student_model
        self.regressor = nn.Linear(*channels).to(device)

    def forward(self, x):
        return self.model(x)

    def secondary_forward(self, io_dict):
        self.regressor(io_dict["model.final_conv"]["output"].mean(dim=(2, 3)))
'''


def test_a_post_forward_process_of_ones_own(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extension_of_a_user.py").write_text(EXTENSION)
    monkeypatch.syspath_prepend(tmp_path)
    plain = "optimizer: {key: 'SGD', kwargs: {lr: 0.0009765625}}"
    own = "post_forward_process: 'step_by_sign'"
    pieces = ["num_epochs: 1", LOADERS, FROZEN_TEACHER, PLAIN_STUDENT, plain, own, criterion(KD)]
    run = train(experiment(*pieces, more=", 'extension_of_a_user'"))
    steps = run.metrics()[-1]["step"]
    assert len(sys.modules["extension_of_a_user"].calls) == steps == 4
    # Every step moved every weight by the learning rate, up or down.
    moves = (run.students[-1]["head.bias"] - run.students[0]["head.bias"]) / 2**-10
    torch.testing.assert_close(moves, moves.round(), atol=1e-3, rtol=0)
    assert moves.abs().max() <= steps
    assert moves.abs().sum() > 0


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("{key: 'StepLR', kwargs: {step_size: 1, gamma: 0.5}}", [0.05, 0.025, 0.0125]),
        ("{key: 'StepLR', kwargs: {step_size: 4, gamma: 0.5}, scheduling_step: 1}", [0.025, 0.0125, 0.00625]),
        ("{key: 'StepLR', kwargs: {step_size: 1, gamma: 0.5}, scheduling_step: 2}", [0.0125, 0.003125, 0.00078125]),
        # A threshold that no accuracy reaches: one epoch is good, the others are bad.
        (
            "{key: 'ReduceLROnPlateau', kwargs: {mode: 'max', factor: 0.5, patience: 0, threshold: 1000.0, "
            "threshold_mode: 'abs'}}",
            [0.05, 0.05, 0.025],
        ),
    ],
    ids=["each epoch", "each step", "each second step", "plateau"],
)
def test_schedulers_step_when_torchdistill_says(train: Callable[..., Run], scheduler: str, rates: list[float]) -> None:
    """An epoch has four steps; the rate is that at the end of the epoch, before a step of the epoch's."""
    pieces = ["num_epochs: 3", LOADERS, FROZEN_TEACHER, PLAIN_STUDENT, sgd(), criterion(KD)]
    run = train(experiment(*pieces, f"scheduler: {scheduler}"))
    assert [r["lr"] for r in run.metrics()] == pytest.approx(rates)


def test_a_student_alone(train: Callable[..., Run], tmp_path: Path) -> None:
    """torchdistill calls it ``model``; this one is torchvision's."""
    models = """
models:
  model:
    key: 'resnet18'
    kwargs: {num_classes: 10, weights: }
    dst_ckpt: 'OUTPUT/student.pt'
"""
    side = "model: {forward_proc: 'forward_batch_only', sequential: [], wrapper: , requires_grad: True}"
    run = train(
        experiment("num_epochs: 1", LOADERS, side, sgd(), criterion(CE), models=models, channels=3),
    )
    assert changed(run.students[0], run.students[-1]) == everything(run.students[0])
    assert "teacher" not in json.loads((run.output / "summary.json").read_text())["test"]
    resnet18(num_classes=10).load_state_dict(read_checkpoint(tmp_path / "student.pt")["model"])


# --- several processes ----------------------------------------------------------------------------------------

WITH_REGRESSOR = """
student:
  forward_proc: 'forward_batch_only'
  auxiliary_model_wrapper: {key: 'WithRegressor', kwargs: {channels: [16, 32]}}
  frozen_modules: ['model.stem']
  forward_hook: {input: [], output: ['model.final_conv', 'regressor']}
  requires_grad: True
"""

PROJECTED = """
student:
  forward_proc: 'forward_batch_only'
  auxiliary_model_wrapper:
    key: 'ProjectedStudent'
    kwargs:
      features:
        regressor: {module: 'final_conv', readout: 'spatial_mean', projector: {out_features: 32}}
  frozen_modules: ['model.stem']
  forward_hook: {input: [], output: ['features.regressor']}
  requires_grad: True
"""

TRAINED_TEACHER = """
teacher:
  forward_proc: 'forward_batch_only'
  forward_hook: {input: [], output: ['final_conv']}
  frozen_modules: ['stem']
  requires_grad: True
"""

REGRESSION = """
regression:
  criterion: {key: 'MSELoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'FeaturePair'
    kwargs:
      student: {module: 'PATH'}
      teacher: {module: 'final_conv', readout: 'spatial_mean'}
  weight: 1.0
"""

SAME_EVERYWHERE = """
import sys
import torch
from torch import distributed as dist
from vkd_plugin.engine.train import Trainer
sys.path.insert(0, FOLDER)

def compare(self, record):
    models = [self.box.student, *([self.teacher] if self.teacher is not None else [])]
    values = torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
    others = [torch.empty_like(values) for _ in range(2)]
    dist.all_gather(others, values)
    assert torch.equal(others[0], others[1]), "the processes trained different models"
    assert torch.isfinite(values).all()

Trainer._post_epoch = compare
"""


@pytest.mark.parametrize("student", ["secondary_forward", "projected"])
def test_gradients_are_averaged_wherever_the_trained_parts_stand(tmp_path: Path, student: str) -> None:
    """Two processes with different images hold the same weights after each epoch.

    What trains: a student with a frozen part, a layer that only a hook leads to, and a teacher. None of them
    brings DistributedDataParallel.
    """
    (tmp_path / "extension_of_a_user.py").write_text(EXTENSION)
    side, path = {"secondary_forward": (WITH_REGRESSOR, "regressor"), "projected": (PROJECTED, "features.regressor")}[
        student
    ]
    text = experiment(
        "num_epochs: 1",
        LOADERS,
        TRAINED_TEACHER,
        side,
        sgd(),
        criterion(CE, CE.replace("False", "True").replace("ce:", "teacher:"), REGRESSION.replace("PATH", path)),
        more=", 'extension_of_a_user'",
    )
    (tmp_path / "experiment.yaml").write_text(text.replace("OUTPUT", str(tmp_path)))
    arguments = ["--config", str(tmp_path / "experiment.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    before = SAME_EVERYWHERE.replace("FOLDER", repr(str(tmp_path)))
    for ended in run_py(*arguments, "--trust", "extension_of_a_user", number=2, before=before):
        assert ended.code == 0, ended.err[-3000:]


def test_parts_of_the_student_without_a_gradient_are_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DistributedDataParallel cannot average them; one process shows it as well as many."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}.items():
        monkeypatch.setenv(name, str(value))
    projected = PROJECTED.replace("['model.stem']", "[]")
    teacher = TRAINED_TEACHER.replace("True", "False")
    text = experiment(
        "num_epochs: 1", LOADERS, teacher, projected, sgd(), criterion(REGRESSION.replace("PATH", "features.regressor"))
    )
    path = tmp_path / "experiment.yaml"
    path.write_text(text.replace("OUTPUT", str(tmp_path)))
    arguments = ["--config", str(path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main(arguments) == 2
    assert "gradient to 'model.head': use it in a term, or name it under frozen_modules" in capsys.readouterr().err
    text = path.read_text()
    path.write_text(text.replace("frozen_modules: []", "frozen_modules: ['model.head']"))
    assert main(arguments) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- our experiments under torchdistill's scripts -------------------------------------------------------------


def quickstart(folder: Path, config: str = QUICKSTART) -> Path:
    """One of our files with two epochs, for scripts that have no ``--set``."""
    text = (ROOT / config).read_text()
    text, epochs = re.subn(r"num_epochs: (&\w+ )?\d+", r"num_epochs: \g<1>2", text)
    text, target = re.subn(r"dst_ckpt: .*", f"dst_ckpt: '{folder}/student.pt'", text)
    assert epochs == target == 1
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any) -> float:
    model.eval()
    hits = [(model(images).argmax(dim=1) == labels).float() for images, labels in loader]
    return 100 * torch.cat(hits).mean().item()


def test_the_quickstart_through_torchdistills_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the example scripts of torchdistill do, call by call, without our engine."""
    monkeypatch.chdir(ROOT)
    set_seed(0)
    config = yaml_util.load_yaml_file(str(quickstart(tmp_path)))
    import_dependencies(config["dependencies"])
    models = config["models"]
    teacher, student = (
        get_model(models[side]["key"], None, **models[side]["kwargs"]) for side in ("teacher_model", "student_model")
    )
    taught, start = _state(teacher), _state(student)
    box = get_distillation_box(
        teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1
    )
    best = -1.0
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, supplement in box.train_data_loader:
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss=loss)
            losses.append(loss.item())
        found = accuracy(box.student_model, box.val_data_loader)
        if found > best:
            best = found
            target = models["student_model"]["dst_ckpt"]
            save_ckpt(box.student_model, box.optimizer, box.lr_scheduler, best, None, target)
        box.post_epoch_process()
    box.clean_modules()
    assert losses[-1] < losses[0]
    assert changed(start, _state(student)) == everything(start)
    assert changed(taught, _state(teacher)) == set()

    bare = digits_vit()
    load_ckpt(models["student_model"]["dst_ckpt"], model=bare, strict=True)
    test_config = config["test"]["test_data_loader"]
    loader = build_data_loader(config["datasets"][test_config["dataset_id"]], test_config, False)
    assert accuracy(bare, loader) == pytest.approx(best)
    assert accuracy(teacher, loader) > 95


@pytest.mark.skipif("VKD_TORCHDISTILL_EXAMPLES" not in os.environ, reason="needs a checkout of torchdistill")
@pytest.mark.parametrize(
    "config", [QUICKSTART, *(f"configs/digits/{name}/vit_from_cnn.yaml" for name in ("kd", "linear", "mlp"))]
)
def test_torchdistills_own_script_runs_our_experiments(tmp_path: Path, config: str) -> None:
    """``VKD_TORCHDISTILL_EXAMPLES`` names the folder ``examples/torchvision`` of any version of torchdistill."""
    script = Path(os.environ["VKD_TORCHDISTILL_EXAMPLES"]) / "image_classification.py"
    command = [sys.executable, str(script), "--config", str(quickstart(tmp_path, config)), "--device", "cpu"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    load_ckpt(str(tmp_path / "student.pt"), model=digits_vit(), strict=True)
