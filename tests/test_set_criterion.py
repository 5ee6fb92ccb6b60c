"""Matching and losses against all permutations and the formulas as they are written."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vidt_helper import target

from vkd_plugin.errors import UserError
from vkd_plugin.models.vidt.criterion import SetCriterion, average_number
from vkd_plugin.models.vidt.matcher import HungarianMatcher
from vkd_plugin.models.vidt.postprocess import detections
from vkd_plugin.models.vidt.targets import Objects, objects_of

STAGES, QUERIES, CLASSES = 2, 4, 3
CPU = torch.device("cpu")


def predictions(images: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(STAGES, images, QUERIES, CLASSES, generator=generator, dtype=torch.float64)
    boxes = 0.1 + 0.5 * torch.rand(STAGES, images, QUERIES, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_()


def objects(*counts: int) -> list[Objects]:
    generator = torch.Generator().manual_seed(5)
    return [
        Objects(
            torch.randint(CLASSES, (n,), generator=generator),
            0.1 + 0.5 * torch.rand(n, 4, generator=generator, dtype=torch.float64),
        )
        for n in counts
    ]


def outputs(logits: Tensor, boxes: Tensor) -> dict[str, Any]:
    stages = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    return {**stages[-1], "aux_outputs": stages[:-1]}


def l1(box: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(box, other, strict=True))


def giou(box: list[float], other: list[float]) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = box, other
    width = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
    height = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
    common = max(width, 0) * max(height, 0)
    union = aw * ah + bw * bh - common
    outer_width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    outer_height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    outer = outer_width * outer_height
    return common / union - (outer - union) / outer


def focal(logit: float, present: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if present else -0.75 * p**2 * math.log(1 - p)


def cost(logits: Tensor, box: Tensor, label: int, other: Tensor) -> float:
    of_class = focal(logits[label].item(), True) - focal(logits[label].item(), False)
    return 2 * of_class + 5 * l1(box.tolist(), other.tolist()) - 2 * giou(box.tolist(), other.tolist())


def best(logits: Tensor, boxes: Tensor, own: Objects) -> list[tuple[int, int]]:
    """Pairs of query and object, by trying all."""
    queries, wanted = range(len(boxes)), range(len(own.labels))
    if len(wanted) <= len(queries):
        candidates = [list(zip(chosen, wanted, strict=True)) for chosen in itertools.permutations(queries, len(wanted))]
    else:
        candidates = [
            list(zip(queries, chosen, strict=True)) for chosen in itertools.permutations(wanted, len(queries))
        ]
    return sorted(
        min(
            candidates,
            key=lambda pairs: sum(cost(logits[q], boxes[q], int(own.labels[o]), own.boxes[o]) for q, o in pairs),
        )
    )


COUNTS = [(2, 3), (0, 1), (4, 0, 6), (0, 0)]


@pytest.mark.parametrize("counts", COUNTS)
def test_matching(counts: tuple[int, ...]) -> None:
    logits, boxes = predictions(len(counts))
    wanted = objects(*counts)
    found = HungarianMatcher()(logits, boxes, wanted)
    for image, stage in itertools.product(range(len(counts)), range(STAGES)):
        pairs = [tuple(pair) for pair in found[image][stage].T.tolist()]
        assert pairs == best(logits[stage, image], boxes[stage, image], wanted[image])
        assert len(pairs) == min(QUERIES, counts[image])


@pytest.mark.parametrize("counts", COUNTS)
def test_losses(counts: tuple[int, ...]) -> None:
    logits, boxes = predictions(len(counts))
    wanted = objects(*counts)
    losses = SetCriterion()(outputs(logits, boxes), wanted)
    for stage, ending in enumerate(("_0", "")):
        expected = {"loss_ce": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
        for image, own in enumerate(wanted):
            answers = {}
            for query, number in best(logits[stage, image], boxes[stage, image], own):
                answers[query] = int(own.labels[number])
                box, other = boxes[stage, image, query].tolist(), own.boxes[number].tolist()
                expected["loss_bbox"] += 5 * l1(box, other)
                expected["loss_giou"] += 2 * (1 - giou(box, other))
            for query, label in itertools.product(range(QUERIES), range(CLASSES)):
                expected["loss_ce"] += 2 * focal(logits[stage, image, query, label].item(), answers.get(query) == label)
        for name, value in expected.items():
            assert losses[name + ending].item() == pytest.approx(value / max(sum(counts), 1), rel=1e-9), name
    assert len(losses) == 3 * STAGES
    sum(losses.values()).backward()
    assert logits.grad.count_nonzero() == logits.numel()
    matched = sum(min(n, QUERIES) for n in counts)
    assert (boxes.grad.abs().sum(-1) > 0).sum() == STAGES * matched  # no box without an object learns


def test_tiny_boxes_are_told_apart() -> None:
    """A box of 4 x 4 in 1000 x 1000 pixels, found at a quarter of its place: IoU 1 / 7, all of it within 6 x 6."""
    logits, _ = predictions(1)
    box = torch.tensor([0.5, 0.5, 0.004, 0.004], dtype=torch.float64)
    found = (box + torch.tensor([0.002, 0.002, 0, 0], dtype=torch.float64)).expand(STAGES, 1, 1, 4)
    wanted = [Objects(torch.tensor([0]), box[None])]
    losses = SetCriterion()(outputs(logits[:, :, :1], found), wanted)
    assert losses["loss_giou"].item() == pytest.approx(2 * (1 - (4 / 28 - 8 / 36)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32(dtype: torch.dtype) -> None:
    logits, boxes = predictions(2, dtype)
    wanted = [Objects(x.labels, x.boxes.float()) for x in objects(2, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = SetCriterion()(outputs(logits, boxes), wanted)
    expected = SetCriterion()(outputs(logits.float(), boxes.float()), wanted)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["one logit", "one image", "boxes"])
def test_predictions_that_are_not_finite(value: float, where: str, caplog: pytest.LogCaptureFixture) -> None:
    logits, boxes = (x.detach().clone() for x in predictions(2))
    if where == "boxes":
        boxes[:, 1] = value
    else:
        logits[(0, 0, 0, 0) if where == "one logit" else (slice(None), 1)] = value
    with caplog.at_level(logging.WARNING, logger="vkd_plugin"):
        losses = SetCriterion()(outputs(logits, boxes), objects(3, 2))
    assert not sum(losses.values()).isfinite()
    assert len(caplog.records) <= 1
    if math.isnan(value) or where == "boxes":  # an infinite logit is a probability like others
        assert "predictions are not finite" in caplog.text


def test_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    assert average_number(objects(3, 0, 2), CPU) == 5
    assert average_number(objects(0, 0), CPU) == 1
    module = "vkd_plugin.models.vidt.criterion."
    monkeypatch.setattr(module + "is_distributed", lambda: True)
    monkeypatch.setattr(module + "dist.get_world_size", lambda: 4)
    monkeypatch.setattr(module + "dist.all_reduce", lambda x: x.add_(9))
    assert average_number(objects(3, 0), CPU) == 3
    monkeypatch.setattr(module + "dist.all_reduce", lambda x: x.add_(1))
    assert average_number(objects(0), CPU) == 1


# Targets.


def test_targets_become_fractions() -> None:
    targets = [target([[10, 20, 30, 60]], [2]), target([], [])]
    first, second = objects_of(targets, [(100, 50), (7, 9)], CLASSES, CPU)
    torch.testing.assert_close(first.boxes, torch.tensor([[0.4, 0.4, 0.4, 0.4]]))
    assert first.labels.tolist() == [2]
    assert second.boxes.shape == (0, 4)
    bare = {"boxes": torch.empty(0), "labels": torch.empty(0)}  # what torch.tensor([]) makes of nothing
    assert objects_of([bare], [(7, 9)], CLASSES, CPU)[0].labels.dtype == torch.int64


BROKEN: dict[str, tuple[Any, str]] = {
    "no boxes": ({"labels": torch.tensor([1])}, "image_id 7: a target is a mapping .* no 'boxes'"),
    "whole numbers": ({"boxes": torch.ones(1, 4, dtype=torch.int64)}, "boxes should be .* floats, got .* int64"),
    "five columns": ({"boxes": torch.ones(1, 5)}, r"image_id 7: boxes should be \(n, 4\) floats, got \(1, 5\)"),
    "too many labels": ({"labels": torch.tensor([1, 2])}, r"labels should be \(1,\) int64 for 1 boxes, got \(2,\)"),
    "labels as floats": ({"labels": torch.tensor([1.0])}, "int64 for 1 boxes, got .* float32"),
    "unknown label": ({"labels": torch.tensor([3])}, r"image_id 7: label 3 of box 0 .* 3 classes \(0 to 2\)"),
    "negative label": ({"labels": torch.tensor([-1])}, "label -1 of box 0"),
    "not a number": ({"boxes": torch.tensor([[0, 0, math.nan, 1]])}, "image_id 7: box 0 is not finite"),
    "width and height": ({"boxes": torch.tensor([[5.0, 6, 2, 3]])}, r"box 0 should be x1, y1, x2, y2 .* \[5.0, 6.0"),
    "no area": ({"boxes": torch.tensor([[5.0, 6, 5, 8]])}, "x1 < x2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_targets_that_are_none(case: str) -> None:
    changed, message = BROKEN[case]
    good = target([[0, 0, 2, 2], [1, 1, 2, 2]], [0, 1])
    bad = target([[0, 0, 2, 2]], [1], image_id=7) | changed
    if case == "no boxes":
        del bad["boxes"]
    with pytest.raises(UserError, match=message):
        objects_of([good, bad], [(9, 9), (9, 9)], CLASSES, CPU)


def test_one_target_for_each_image() -> None:
    with pytest.raises(UserError, match="1 targets for 2 images"):
        objects_of([target([], [])], [(9, 9), (9, 9)], CLASSES, CPU)
    with pytest.raises(UserError, match="image 1 of the batch: boxes"):
        objects_of([target([], []), target([], []) | {"boxes": torch.ones(2)}], [(9, 9), (9, 9)], CLASSES, CPU)


# Detections.


def test_detections() -> None:
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 1, 2], logits[0, 0, 1], logits[0, 1, 0] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.6, 1.0]]])
    (found,) = detections({"pred_logits": logits, "pred_boxes": boxes}, [(100, 200)], limit=3)
    assert found["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    second = [-10.0, 0.0, 110.0, 100.0]  # not clipped
    torch.testing.assert_close(found["boxes"], torch.tensor([second, [0.0, 25.0, 200.0, 75.0], second]))
    (every,) = detections({"pred_logits": logits, "pred_boxes": boxes}, [(100, 200)])
    assert len(every["scores"]) == 6
