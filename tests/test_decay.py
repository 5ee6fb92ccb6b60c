"""Marked parameters stay out of weight decay, also in torchdistill's default single parameter group."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torchdistill.optim.registry import OPTIM_DICT, get_optimizer

import vkd_plugin
from vkd_plugin import host
from vkd_plugin.check import examine
from vkd_plugin.decay import without_decay
from vkd_plugin.errors import BadValue

IMAGENET = Path(__file__).parent / "data" / "check" / "imagenet.yaml"


def _pair() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(3, 3), vkd_plugin.OrthogonalProjector(3, 5)])


def _decay_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    (decay,) = [g["weight_decay"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return decay


@pytest.mark.parametrize("key", ["SGD", "AdamW", "Adam", "RMSprop"])
def test_torchdistills_default_group_leaves_projectors_out(key: str) -> None:
    linear, projector = modules = _pair()
    optimizer = get_optimizer(modules, key, lr=0.1, weight_decay=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == key
    assert _decay_of(optimizer, linear.weight) == 0.5
    assert _decay_of(optimizer, projector.raw_weight) == 0.0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(modules.parameters()))


def test_without_marks_nothing_changes() -> None:
    parameters = list(nn.Linear(3, 3).parameters())
    assert without_decay(iter(parameters)) == parameters
    optimizer = OPTIM_DICT["SGD"](parameters, lr=0.1, weight_decay=0.5)
    assert len(optimizer.param_groups) == 1


def test_an_explicit_decay_of_a_group_is_the_users_wish() -> None:
    linear, projector = _pair()
    groups = [
        {"params": linear.parameters(), "lr": 0.3},
        {"params": list(projector.parameters()), "weight_decay": 0.25},
    ]
    optimizer = OPTIM_DICT["AdamW"](groups, lr=0.1, weight_decay=0.5)
    assert _decay_of(optimizer, linear.weight) == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert _decay_of(optimizer, projector.raw_weight) == 0.25


def test_groups_without_decay_of_their_own_are_split() -> None:
    modules = _pair()
    optimizer = OPTIM_DICT["SGD"]([{"params": modules.parameters(), "lr": 0.3}], lr=0.1, weight_decay=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]
    assert _decay_of(optimizer, modules[1].raw_weight) == 0.0


def test_registered_optimizers_keep_their_signature() -> None:
    own = dict(inspect.signature(OPTIM_DICT["AdamW"]).parameters)
    assert own.pop("weight_decay_of").default == "all"
    assert own == dict(inspect.signature(torch.optim.AdamW).parameters)


def test_installing_twice_changes_nothing() -> None:
    before = dict(OPTIM_DICT)
    vkd_plugin.host.install()
    assert before == OPTIM_DICT


def test_of_matrices_alone_leaves_out_what_timm_leaves_out() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    expected = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    box = SimpleNamespace(student_model=model)
    token = host._current.set(host.Setup(box, {}))  # type: ignore[arg-type]
    try:
        optimizer = get_optimizer(
            nn.ModuleList([model]), "AdamW", lr=0.1, weight_decay=0.05, weight_decay_of="matrices"
        )
    finally:
        host._current.reset(token)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert by_decay == {group["weight_decay"]: {id(p) for p in group["params"]} for group in expected}


def test_of_matrices_alone_in_an_experiment() -> None:
    facts = examine(IMAGENET, ["train.optimizer.kwargs.weight_decay_of=matrices"])
    assert facts.problems == []
    groups = {group.weight_decay: group.tensors for group in facts.stages[0].groups}
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    named = model.no_weight_decay()
    plain = [name for name, p in model.named_parameters() if p.ndim < 2 or name in named]
    assert groups == {0.05: len(list(model.parameters())) - len(plain), 0.0: len(plain) + 1}  # and the projector


def _decays(model: nn.Module, rules: dict[str, str]) -> set[str]:
    """Names of the parameters that decay, in a box that is being set up."""
    box = SimpleNamespace(org_student_model=model, student_model=nn.ModuleDict({"model": model}))
    token = host._current.set(host.Setup(box, {}))  # type: ignore[arg-type]
    try:
        optimizer = get_optimizer(model, "AdamW", lr=0.1, weight_decay=0.05, weight_decay_of=rules)
    finally:
        host._current.reset(token)
    return {name for name, parameter in model.named_parameters() if _decay_of(optimizer, parameter) == 0.05}


def test_of_matrices_in_some_modules_alone() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    everything = {name for name, _ in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert _decays(model, {}) == everything
    assert _decays(model, {"blocks": "matrices"}) == {n for n in everything if n in matrices or "blocks" not in n}
    inner = {"blocks": "matrices", "blocks.1": "all"}
    assert _decays(model, inner) == {n for n in everything if n in matrices or "blocks.0" not in n}
    assert _decays(nn.ModuleDict({"vit": model}), {"vit": "matrices"}) == {
        f"vit.{name}" for name in matrices - model.no_weight_decay()
    }


def test_modules_of_a_rule_that_are_not_there_are_named() -> None:
    with pytest.raises(BadValue, match=r"the student has no module 'block' \(did you mean 'blocks'\?\)"):
        _decays(timm.create_model("deit_tiny_distilled_patch16_224", depth=1), {"block": "matrices"})
    with pytest.raises(ValueError, match=r"no weight_decay_of 'blocks' 'matrix' .did you mean 'matrices'"):
        _decays(timm.create_model("deit_tiny_distilled_patch16_224", depth=1), {"blocks": "matrix"})
    (problem,) = examine(IMAGENET, ["train.optimizer.kwargs.weight_decay_of={block: matrices}"]).problems
    assert "weight_decay_of: the student has no module 'block' (did you mean 'blocks'?)" in str(problem)


def test_a_misspelt_rule_is_refused() -> None:
    (problem,) = examine(IMAGENET, ["train.optimizer.kwargs.weight_decay_of=matrixes"]).problems
    assert "no weight_decay_of 'matrixes' (did you mean 'matrices'?)" in str(problem)
