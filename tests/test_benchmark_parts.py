"""What ``benchmarks.parts`` says of a step: each operator belongs to one part, and the step stays what it is."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vkd_plugin.config import load_experiment
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.loaders import set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks are no part of what is installed

from benchmarks import parts  # noqa: E402

CPU = torch.device("cpu")


class Steps:
    """A trainer of the quickstart's experiment, always with the same batch."""

    def __init__(self) -> None:
        changes = ["datasets.digits/train.init.kwargs.fraction=0.05", "train.train_data_loader.kwargs.batch_size=8"]
        experiment = load_experiment("configs/digits/vkd/vit_from_cnn.yaml", changes)
        torch.manual_seed(0)
        teacher, student = (build_model(experiment, key, CPU, False) for key in model_sections(experiment) if key)
        self.trainer = Trainer(experiment, teacher, student, Processes(0, 1, CPU), None, seed=0)
        self.loader = self.trainer._train_loader()
        self.trainer.box.pre_epoch_process(epoch=0)
        set_position(self.loader, 0)
        self.batch = next(iter(self.loader))

    def take(self) -> None:
        self.trainer._step(self.batch, self.loader, False)

    def replaceable(self) -> list[Any]:
        """Whatever a range may stand in the place of."""
        trainer, box = self.trainer, self.trainer.box
        owners = [trainer, trainer.watch, trainer.terms, box, *box.student.modules(), box.criterion]
        owners += [module for term, _ in box.criterion.term_dict.values() for module in term.modules()]
        own = [(name, value) for owner in owners for name, value in vars(owner).items() if callable(value)]
        models = [box.teacher_model, box.student, *(term for term, _ in box.criterion.term_dict.values())]
        modules = [module for model in models for module in model.modules()]
        hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        return [*own, *hooks, torch.autograd.backward]


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_shares_are_of_a_step_that_stays_the_same() -> None:
    measured, plain = Steps(), Steps()
    before = measured.replaceable()
    shares = parts.parts(measured.trainer, measured.take, CPU, steps=2)
    assert list(shares) == list(parts.PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert [name for name, share in shares.items() if not share > 0] == []
    assert measured.replaceable() == before
    for _ in range(3):  # one to warm up
        plain.take()
    pairs = zip(measured.trainer.box.student.parameters(), plain.trainer.box.student.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_backward_pass_belongs_to_where_its_operator_ran() -> None:
    """Products of matrices, counted: one forward, and two backward where both factors have a gradient."""
    first, second, third = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))
    x = torch.randn(3, 3)

    def step() -> None:
        y = parts._ranged(parts.FORWARD, lambda: x @ first)()  # x has no gradient: one backward
        z = parts._ranged(parts.PROJECTOR, lambda: (y.detach() @ first.detach(), y @ second)[1])()
        z.sin()  # leads nowhere
        loss = parts._ranged(parts.LOSSES, lambda: (z @ third).sum())()
        parts._ranged(parts.BACKWARD, loss.backward)()

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        parts._ranged(parts.REST, step)()
    took = parts._attributed(list(recorded.events()), lambda event: float(event.name == "aten::mm"))
    assert {name: count for name, count in took.items() if count} == {
        parts.FORWARD: 1,
        parts.BACKWARD: 1,
        parts.PROJECTOR: 4,
        parts.LOSSES: 3,
    }
