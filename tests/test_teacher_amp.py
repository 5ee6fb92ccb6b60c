"""The teacher's own precision: its forward pass is rounded, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vkd_plugin.cli import main
from vkd_plugin.engine import run as engine_run
from vkd_plugin.engine.precision import Precision
from vkd_plugin.losses import VkDLoss
from vkd_plugin.models.small import DigitsCNN
from vkd_plugin.models.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
BATCH = 256
SETS = (
    "train.num_epochs=1",
    f"train.train_data_loader.kwargs={{batch_size: {BATCH}, drop_last: True}}",
    "datasets.digits/train.init.kwargs.fraction=0.4",
    "models.student_model.dst_ckpt=null",
)


def run(folder: Path, *sets: str) -> dict[str, Any]:
    words = [word for override in (*SETS, *sets) for word in ("--set", override)]
    config = "configs/digits/vkd/vit_from_cnn.yaml"
    assert main(["--config", config, "--output", str(folder), "--device", "cpu", "-student_only", *words]) == 0
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Dtypes of the teacher's last map, of the student's tokens, and of what the loss compares."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine_run, "prove", lambda experiment: [])
    dtypes: dict[str, set[torch.dtype]] = {"teacher": set(), "loss": set(), "blocks": set()}
    forward, loss, activation = DigitsCNN.forward, VkDLoss.forward, nn.GELU.forward

    def teacher_forward(model: DigitsCNN, x: Tensor) -> Tensor:
        if len(x) != BATCH:  # looked at for its shapes, before training
            return forward(model, x)
        handle = model.final_conv.register_forward_hook(lambda *args: dtypes["teacher"].add(args[2].dtype))
        try:
            return forward(model, x)
        finally:
            handle.remove()

    def loss_forward(module: VkDLoss, student: Tensor, teacher: Tensor) -> Tensor:
        dtypes["loss"] |= {student.dtype, teacher.dtype}
        return loss(module, student, teacher)

    def gelu(module: nn.GELU, x: Tensor) -> Tensor:
        dtypes["blocks"].add(x.dtype)
        return activation(module, x)

    monkeypatch.setattr(DigitsCNN, "forward", teacher_forward)
    monkeypatch.setattr(VkDLoss, "forward", loss_forward)
    monkeypatch.setattr(nn.GELU, "forward", gelu)
    return dtypes


def test_the_teacher_alone_is_rounded(tmp_path: Path, seen: dict[str, set[torch.dtype]]) -> None:
    rounded = run(tmp_path / "rounded", "train.teacher_amp={dtype: bfloat16}")
    assert seen == {"teacher": {torch.bfloat16}, "loss": {torch.float32}, "blocks": {torch.float32}}
    plain = run(tmp_path / "plain")
    assert rounded["loss"] != plain["loss"]
    # Five layers, each of which rounds what it is given, its weights and what it puts out by 2^-9: 3 % at worst. More
    # than four such roundings in a mean over all samples would be another teacher.
    assert rounded["loss"] == pytest.approx(plain["loss"], rel=2**-7)
    weights = read_checkpoint(tmp_path / "rounded" / "checkpoints" / "last.pt")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_amp_is_of_both(tmp_path: Path, seen: dict[str, set[torch.dtype]]) -> None:
    run(tmp_path / "run", "train.amp={dtype: bfloat16}")
    assert seen["teacher"] == {torch.bfloat16}
    assert torch.bfloat16 in seen["blocks"]


def test_outputs_in_containers() -> None:
    precision = Precision(None, torch.device("cpu"), {"dtype": "bfloat16"})
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    found = precision.from_teacher({"a": [half, (whole, None)], "b": {"c": half}})
    assert found["a"][0].dtype is found["b"]["c"].dtype is torch.float32
    assert found["a"][1] == (whole, None)
    assert Precision({"dtype": "bfloat16"}, torch.device("cpu")).from_teacher(half) is half
