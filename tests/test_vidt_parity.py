"""ViDT with a Swin-nano body, held against what the method's reference code puts out.

``data/parity/vidt_nano.json`` has its outputs, losses and gradients in two batches of images of different sizes, with
the weights that ``data/parity/fill.py`` makes from their names; ``odd`` has sizes that no stride divides.
"""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from parity_helper import FILL, PARITY, assert_recorded, made
from torch import Tensor, nn
from torchvision.ops import box_convert

from vkd_plugin.losses import VkDLoss
from vkd_plugin.models import vidt_swin_base, vidt_swin_nano, vidt_swin_small, vidt_swin_tiny
from vkd_plugin.models.vidt.detector import ViDT
from vkd_plugin.models.vidt.postprocess import detections
from vkd_plugin.models.vidt.targets import Objects
from vkd_plugin.readouts import get_readout

RECORDED = json.loads((PARITY / "vidt_nano.json").read_text())
ALIAS = RECORDED["fill"]["alias"]
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
FEATURES = {f"patch{i}": (f"patch_tokens.{i}", "every_location") for i in range(4)}
FEATURES |= {"body_det": ("body_tokens", "every_token"), "neck_det": ("neck_tokens", "every_token")}
PATHS = [path for path, _ in FEATURES.values()]

precisions = pytest.mark.parametrize("precision", TOLERANCES)
batches = pytest.mark.parametrize("batch", RECORDED["inputs"])


@functools.cache
def student(precision: str) -> ViDT:
    """In training, with nothing random in it."""
    return FILL.fill_torch(vidt_swin_nano(dropout=0.0).to(getattr(torch, precision)), ALIAS)


@functools.cache
@torch.enable_grad()
def step(precision: str, batch: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Outputs and losses of a training step, and what the hooks saw in it."""
    model = student(precision)
    outputs: dict[str, Any] = {}
    handle = model.criterion.register_forward_pre_hook(lambda _module, args: outputs.update(args[0]))
    with hooked(model, "backbone", *PATHS, *(f"patch_masks.{i}" for i in range(4))) as seen:
        losses = model.train()(images(batch, precision), targets(batch))
    handle.remove()
    return outputs, losses, seen


@functools.cache
def teacher() -> ViDT:
    return FILL.fill_torch(vidt_swin_tiny().double(), ALIAS, salt="teacher:").eval()


@functools.cache
@torch.no_grad()
def teachers_features(batch: str) -> dict[str, Tensor]:
    with hooked(teacher(), *PATHS) as seen:
        teacher()(images(batch, "float64"))
    return seen


def images(batch: str, precision: str) -> list[Tensor]:
    sizes = RECORDED["inputs"][batch]["sizes_hw"]
    made_images = [made(f"{batch}.image{i}", (3, *size), scale=1.7) for i, size in enumerate(sizes)]
    return [image.to(getattr(torch, precision)) for image in made_images]


def targets(batch: str) -> list[dict[str, Tensor]]:
    """In pixels, as a data set has them."""
    found = []
    for recorded, (height, width) in zip(RECORDED["targets"], RECORDED["inputs"][batch]["sizes_hw"], strict=True):
        boxes = torch.tensor(recorded["boxes_cxcywh"], dtype=torch.float64)
        pixels = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        found.append({"boxes": pixels, "labels": torch.tensor(recorded["labels"])})
    return found


@contextmanager
def hooked(model: nn.Module, *paths: str) -> Iterator[dict[str, Any]]:
    """What modules put out, by their paths."""
    seen: dict[str, Any] = {}

    def hook(path: str) -> Any:
        return lambda _module, _args, output: seen.__setitem__(path, output)

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    yield seen
    for handle in handles:
        handle.remove()


# Names and sizes.


def test_names_and_shapes_are_the_releases() -> None:
    with torch.device("meta"):
        model = vidt_swin_nano()
    projectors = tuple(name for name, _ in RECORDED["projector_keys"])
    expected = [[name, shape] for name, shape, _ in RECORDED["state_dict"] if name not in projectors]
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == expected
    assert sum(p.numel() for p in model.parameters()) == RECORDED["n_parameters_without_projectors"]
    for child, count in RECORDED["n_parameters_by_child"].items():
        if "projector" not in child:
            assert sum(p.numel() for p in model.get_submodule(child).parameters()) == count


@pytest.mark.parametrize(
    ("build", "count"),
    [(vidt_swin_tiny, RECORDED["teacher_n_parameters"]), (vidt_swin_small, 60_465_061), (vidt_swin_base, 99_959_635)],
)
def test_number_of_parameters(build: Any, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def test_names_and_shapes_of_the_teacher() -> None:
    with torch.device("meta"):
        state = vidt_swin_tiny().state_dict()
    assert [[name, list(value.shape)] for name, value in state.items()] == RECORDED["teacher_state_dict"]


# Numbers.


@batches
@precisions
@torch.no_grad()
def test_what_the_reference_puts_out(precision: str, batch: str) -> None:
    recorded, tolerance = RECORDED[precision][batch], TOLERANCES[precision]
    outputs, _, taps = step(precision, batch)
    for name in ("pred_logits", "pred_boxes"):
        assert_recorded(name, outputs[name], recorded["outputs"][name], tolerance)
        assert len(outputs["aux_outputs"]) == len(recorded["outputs"]["aux_outputs"]) == 6
        for i, expected in enumerate(recorded["outputs"]["aux_outputs"]):
            assert_recorded(f"aux{i}.{name}", outputs["aux_outputs"][i][name], expected[name], tolerance)

    maps, det, det_pos = taps["backbone"]
    for i, expected in enumerate(recorded["backbone"]["patch_outs"]):
        assert_recorded(f"bb.patch{i}", maps[i], expected, tolerance)
    assert_recorded("bb.det_tgt", det.transpose(1, 2), recorded["backbone"]["det_tgt"], tolerance)
    assert_recorded("bb.det_pos", det_pos.transpose(1, 2), recorded["backbone"]["det_pos"], tolerance)

    tokens = recorded["student_tokens_unprojected"]
    for i, expected in enumerate(tokens["patch_token"]):
        assert_recorded(f"student_raw.patch_token{i}", taps[f"patch_tokens.{i}"], expected, tolerance)
        assert (
            taps[f"patch_masks.{i}"].shape == taps[f"patch_tokens.{i}"].shape[:1] + taps[f"patch_tokens.{i}"].shape[2:]
        )
    assert_recorded("student_raw.body_det_token", taps["body_tokens"], tokens["body_det_token"], tolerance)
    neck = taps["neck_tokens"].unflatten(1, (7, 100)).transpose(0, 1)
    assert_recorded("student_raw.neck_det_token", neck, tokens["neck_det_token"], tolerance)


@batches
@precisions
@torch.no_grad()
def test_losses_and_detections(precision: str, batch: str) -> None:
    recorded, tolerance = RECORDED[precision][batch], TOLERANCES[precision]
    outputs, losses, _ = step(precision, batch)
    weights = RECORDED["weight_dict"]
    expected = {name: weights[name] * value for name, value in recorded["loss_dict"].items() if name in losses}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=tolerance)
    assert len(losses) == 21
    assert sum(losses.values()).item() == pytest.approx(recorded["weighted_total_without_distillation"], rel=tolerance)

    objects = [Objects(torch.tensor(t["labels"]), torch.tensor(t["boxes_cxcywh"])) for t in RECORDED["targets"]]
    pairs = student(precision).criterion.matcher(outputs["pred_logits"][None], outputs["pred_boxes"][None], objects)
    assert [pair[0].tolist() for pair in pairs] == recorded["matching_last_layer"]

    found = detections(outputs, [(480, 640), (375, 500)])
    for i, expected in enumerate(recorded["postprocess_480x640_375x500"]):
        assert_recorded(f"pp.scores{i}", found[i]["scores"], expected["scores"], tolerance)
        assert_recorded(f"pp.boxes{i}", found[i]["boxes"], expected["boxes"], tolerance)
        assert found[i]["labels"][:8].tolist() == expected["labels_first8"]


@batches
@precisions
def test_distillation_and_gradients(precision: str, batch: str) -> None:
    """The six terms of the method, read off the hooks with its readouts; and what the whole loss is to the weights."""
    recorded, tolerance = RECORDED[precision][batch], TOLERANCES[precision]
    model = student(precision)
    _, losses, own = step(precision, batch)
    others = teachers_features(batch)

    distance = VkDLoss(normalization="standardize", normalize_student=True)
    terms = {}
    for name, (path, readout) in FEATURES.items():
        rows, teachers = (get_readout(readout)(seen[path]) for seen in (own, others))
        terms[name] = distance(rows @ projector(name).to(rows.dtype).T, teachers.to(rows.dtype))
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(recorded["distillation_terms"], rel=tolerance)
    total = sum(losses.values()) + RECORDED["weight_dict"]["loss_distil"] * sum(terms.values())
    assert total.item() == pytest.approx(recorded["weighted_total"], rel=tolerance)

    if precision == "float32":  # gradients are recorded in float64
        return
    model.zero_grad()
    total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert without == set(recorded["parameters_without_gradient"])
    compared = [name for name in recorded["gradients_of_weighted_total"] if "projector" not in name]
    assert len(compared) == 19
    for name in compared:
        assert_recorded(
            f"grad:{name}", model.get_parameter(name).grad, recorded["gradients_of_weighted_total"][name], tolerance
        )


def projector(name: str) -> Tensor:
    """The orthogonal matrix that ``fill.py`` gives the reference; its scale and shift are undone by standardising."""
    module = {"body_det": "body_det_projector", "neck_det": "neck_det_projector"}.get(name)
    module = module or f"patch_projector_{int(re.sub('patch', '', name)) + 1}"
    key = f"{module}.projector.parametrizations.weight.0.base"
    return torch.from_numpy(FILL.orthonormal(key, 256, 256))
