"""One step of the method's ImageNet reference code: its losses and gradients, recorded in float64.

The numbers in ``data/parity/vkd_step.json`` were made by running the reference on the tensors that
``data/parity/fill.py`` makes from their names. The criterion here is built from YAML by torchdistill.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torchdistill.losses.registry import get_high_level_loss

import vkd_plugin.losses.registration  # noqa: F401 - makes the keys below known

DATA = Path(__file__).parent / "data" / "parity"
CASES = json.loads((DATA / "vkd_step.json").read_text())["cases"]

CRITERION = """
key: 'WeightedSumLoss'
kwargs:
  sub_terms:
    repr_distill_loss:
      criterion: {key: 'VkDLoss', kwargs: {normalization: 'layer_norm', distance: 'smooth_l1'}}
      criterion_wrapper:
        key: 'FeaturePair'
        kwargs:
          student: {module: 'features.tokens'}
          teacher: {module: 'final_conv', readout: 'spatial_mean'}
      weight: 1.0
    kl_loss:
      criterion: {key: 'SoftTargetKLLoss', kwargs: {temperature: 1.0}}
      criterion_wrapper:
        key: 'FeaturePair'
        kwargs: {student: {module: 'model.head_dist'}, teacher: {module: '.'}}
      weight: 1.0
    xe_loss:
      criterion: {key: 'SoftTargetCrossEntropy', kwargs: {}}
      criterion_wrapper:
        key: 'SimpleLossWrapper'
        kwargs:
          input: {is_from_teacher: False, module_path: 'model.head', io: 'output'}
          target: {uses_label: True}
      weight: 1.0
"""


def load_fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_fill", DATA / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = load_fill()


def made(recipe: str) -> torch.Tensor:
    """The tensor that a recipe such as ``inputs("vkd.z_s",(4,196,192),scale=1.5,offset=0.1)`` describes."""
    expression = recipe.split(";")[0]
    names = {name: getattr(fill, name) for name in ("inputs", "soft_targets", "orthonormal")}
    return torch.from_numpy(eval(expression, {"max": lambda a, floor: a.clip(floor), **names}).copy())


def assert_summary(name: str, tensor: torch.Tensor, expected: dict[str, Any]) -> None:
    """Every recorded number to 1e-10 of its scale (a sum's scale is that of what may cancel in it)."""
    actual = fill.summary(name, tensor.detach().numpy())
    first = tensor.detach().reshape(-1)[:8].tolist()
    assert actual["shape"] == expected["shape"]
    for key in ("norm", "absmax"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-10), (name, key)
    spread = expected["norm"] * tensor.numel() ** 0.5
    for key in ("sum", "probe"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-10, abs=1e-14 * spread), (name, key)
    assert first == pytest.approx(expected["first8"], rel=1e-10, abs=1e-12 * expected["absmax"]), name


@pytest.mark.parametrize("name", CASES)
def test_reference_step(name: str) -> None:
    case = CASES[name]
    tensors = {key: made(recipe) for key, recipe in case["inputs"].items()}
    learned = ("z_s", "student_cls_logits", "student_dist_logits", "projector")
    for key in learned:
        tensors[key].requires_grad_()
    projected = tensors["z_s"].mean(dim=1) @ tensors["projector"].T

    config = yaml.safe_load(CRITERION)
    config["kwargs"]["sub_terms"]["repr_distill_loss"]["weight"] = case["alpha"]
    config["kwargs"]["sub_terms"]["kl_loss"]["weight"] = case["gamma"]
    criterion = get_high_level_loss(config)
    student = {
        "features.tokens": {"output": projected},
        "model.head": {"output": tensors["student_cls_logits"]},
        "model.head_dist": {"output": tensors["student_dist_logits"]},
    }
    teacher = {
        "final_conv": {"output": tensors["teacher_map"]},
        ".": {"output": tensors["teacher_logits"]},
    }
    total = criterion({"student": student, "teacher": teacher}, {}, tensors["targets"])
    total.backward()

    for key, (term, weight) in criterion.term_dict.items():
        value = weight * term(student, teacher, tensors["targets"])
        assert value.item() == pytest.approx(case["losses"][key], rel=1e-10), key
    assert total.item() == pytest.approx(case["losses"]["total"], rel=1e-10)
    assert_summary("projected_student", projected, case["intermediate"]["projected_student"])
    vkd_term = criterion.term_dict["repr_distill_loss"][0]
    pooled = vkd_term.teacher.read(teacher)
    normalised = vkd_term.criterion.normalization(pooled)
    assert_summary("normalised_teacher", normalised, case["intermediate"]["normalised_teacher"])
    for key in learned:
        recorded = {"projector": "projector_weight"}.get(key, key)
        grad = tensors[key].grad
        assert grad is not None
        assert_summary(f"grad.{recorded}", grad, case["gradients"][recorded])
