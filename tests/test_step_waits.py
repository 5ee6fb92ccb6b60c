"""A training step does not look at what it computes: on a GPU each look makes the host wait for the device.

Looks are operators that hand a value to Python, recorded on a CPU. What only a GPU shows is in ``test_run.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vkd_plugin import stiefel
from vkd_plugin.check import standin
from vkd_plugin.config import load_experiment
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.loaders import batches_of, set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer

ROOT = Path(__file__).parents[1]
SCALED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "dtype: 'float16'" in path.read_text()]
LOOKS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default", "aten.nonzero.default"}
CPU = torch.device("cpu")


class Looks(TorchDispatchMode):
    """The looks, by operator, but for those at an optimizer's numbers of steps, which live on the host everywhere."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.found: list[str] = []
        self._optimizer = optimizer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in LOOKS and not any(args[0] is state.get("step") for state in self._optimizer.state.values()):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def looks_of_steps(monkeypatch: pytest.MonkeyPatch, *switches: str) -> list[str]:
    """Those of the second and third step of a run (the first makes the optimizer's state)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stiefel, "_may_look", lambda x: False)  # as on a GPU
    changes = ["datasets.digits/train.init.kwargs.fraction=0.05", "train.train_data_loader.kwargs.batch_size=16"]
    experiment = load_experiment("configs/digits/vkd/vit_from_cnn.yaml", [*changes, *switches])
    teacher, student = (build_model(experiment, key, CPU, False) for key in model_sections(experiment) if key)
    trainer = Trainer(experiment, teacher, student, Processes(0, 1, CPU), None, seed=0)
    loader = trainer._train_loader()
    trainer.box.pre_epoch_process(epoch=0)
    set_position(loader, 0)
    record = Looks(trainer.box.optimizer)
    for index, batch in zip(range(3), batches_of(loader), strict=False):
        with record:
            trainer._step(batch, loader, False)
        if index == 0:
            record.found.clear()
    assert trainer.box.optimizer_steps == 3
    return record.found


@pytest.mark.parametrize(
    "switches",
    [
        (),
        ("train.optimizer.max_grad_norm=1.0",),
        ("train.amp={dtype: bfloat16}", "train.ema={decay: 0.9}"),
        ("train.amp={dtype: float16}", "train.optimizer.kwargs.fused=true", "train.optimizer.max_grad_norm=1.0"),
        ("train.skip_nonfinite=1", "train.optimizer.kwargs.fused=true"),
    ],
    ids=["plain", "clipped", "bfloat16 and average", "float16 and fused", "spare and fused"],
)
def test_a_healthy_step_looks_at_nothing(switches: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_of_steps(monkeypatch, *switches) == []


def test_the_scaler_of_float16_looks_unless_the_optimizer_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_of_steps(monkeypatch, "train.amp={dtype: float16}") != []


@pytest.mark.parametrize("path", SCALED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_experiments_in_float16_have_such_an_optimizer(path: Path) -> None:
    experiment = load_experiment(path, build=standin.build)
    assert experiment.data["train"]["optimizer"]["kwargs"]["fused"] is True
