"""Detection: pycocotools' figures on random detections, in one process and in two, and what a detector may return."""

import contextlib
import io
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes_helper import work_together
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchdistill.models.registry import MODEL_DICT
from torchvision.models import get_model_builder

from vkd_plugin.errors import UserError
from vkd_plugin.models.detector_labels import labels_of
from vkd_plugin.tasks import Detection
from vkd_plugin.tasks.coco_ap import FIGURES

pycocotools = pytest.importorskip("pycocotools")
CPU = torch.device("cpu")


class Replay(nn.Module):
    """A detector that has its detections from the images: the first pixel is the image's number."""

    def __init__(self, outputs: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.outputs = outputs
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert not torch.is_grad_enabled()
        return [self.outputs[int(image.flatten()[0])] for image in images]


class Problem:
    """Random images with objects, crowds among them, and detections, some of them near an object.

    Args:
        seed: of all.
        images, classes, objects, found: how many, at most.
        ties: scores of a few values.
        grid: boxes whose overlaps fall on the protocol's thresholds.
    """

    def __init__(
        self, seed: int, images: int, classes: int, objects: int, found: int, ties: bool = False, grid: bool = False
    ) -> None:
        random = np.random.default_rng(seed)
        self.items: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.outputs: list[dict[str, Tensor]] = []
        for number in range(images):
            count = int(random.integers(objects + 1))
            sides = random.uniform(4, 300, (count, 2)) * random.choice([0.2, 1.0], (count, 1))
            truth = np.concatenate([random.uniform(0, 200, (count, 2)), sides], axis=1)
            labels = random.integers(1, classes + 1, count)
            if grid:
                truth = np.round(truth / 10) * 10 + [0, 0, 10, 10]
            near = random.integers(max(count, 1), size=int(random.integers(found + 1)) if count else 0)
            guesses = truth[near] + random.normal(0, 6, (len(near), 4)) * (random.random((len(near), 1)) < 0.7)
            if grid:
                guesses = np.round(guesses / 10) * 10
            guesses[:, 2:] = guesses[:, 2:].clip(1)
            others = np.concatenate([random.uniform(0, 200, (2, 2)), random.uniform(1, 200, (2, 2))], axis=1)
            guesses = np.concatenate([guesses, others[: random.integers(3)]]).astype(np.float32)
            classified = np.concatenate([labels[near], random.integers(1, classes + 1, 2)])[: len(guesses)]
            scores = random.random(len(guesses))
            area = np.prod(truth[:, 2:], axis=1) * random.uniform(0.4, 1, count)
            crowd = random.random(count) < 0.2
            target = {
                "image_id": torch.tensor(7 * number + 3),
                "ground_truth": torch.from_numpy(np.column_stack([truth, area, labels, crowd]).astype(np.float64)),
            }
            self.items.append((torch.full((3, 2, 2), float(number)), target))
            corners = np.concatenate([guesses[:, :2], guesses[:, :2] + guesses[:, 2:]], axis=1)
            self.outputs.append(
                {
                    "boxes": torch.from_numpy(corners),
                    "labels": torch.from_numpy(classified),
                    "scores": torch.from_numpy(np.round(scores * 4) / 4 if ties else scores).float(),
                }
            )

    def batches(self, rank: int = 0, world_size: int = 1, size: int = 3) -> list[tuple[Any, Any]]:
        part = self.items[rank::world_size]
        return [tuple(zip(*part[at : at + size], strict=True)) for at in range(0, len(part), size)]

    @property
    def has_objects(self) -> bool:
        return any((target["ground_truth"][:, 6] == 0).any() for _, target in self.items)

    def reference(self) -> dict[str, float]:
        """pycocotools' figures in percent; nan where it says -1."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth, found = COCO(), COCO()
        images = [{"id": int(target["image_id"])} for _, target in self.items]
        rows, guesses = [], []
        for (_, target), output in zip(self.items, self.outputs, strict=True):
            number = int(target["image_id"])
            for *box, area, label, crowd in target["ground_truth"].tolist():
                rows.append({"bbox": box, "area": area, "category_id": int(label), "iscrowd": int(crowd)})
                rows[-1] |= {"id": len(rows), "image_id": number}
            boxes = output["boxes"].double()
            sizes = (boxes[:, 2:] - boxes[:, :2]).tolist()
            for corner, size, label, score in zip(
                boxes[:, :2].tolist(), sizes, output["labels"].tolist(), output["scores"].tolist(), strict=True
            ):
                guesses.append({"bbox": [*corner, *size], "area": size[0] * size[1], "category_id": label})
                guesses[-1] |= {"score": score, "id": len(guesses), "image_id": number, "iscrowd": 0}
        categories = [{"id": label} for label in sorted({row["category_id"] for row in rows + guesses})]
        with contextlib.redirect_stdout(io.StringIO()):
            for side, annotations in ((truth, rows), (found, guesses)):
                side.dataset = {"images": images, "categories": categories, "annotations": annotations}
                side.createIndex()
            evaluator = COCOeval(truth, found, "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return {n: 100 * v if v >= 0 else math.nan for n, v in zip(FIGURES, evaluator.stats[:6], strict=True)}


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 8),
    classes=st.integers(1, 4),
    objects=st.integers(1, 8),
    found=st.sampled_from([0, 3, 20, 250]),  # more than the 100 that count
    ties=st.booleans(),
    grid=st.booleans(),
)
def test_pycocotools_figures(**arguments: Any) -> None:
    problem = Problem(**arguments)
    if not problem.has_objects:
        with pytest.raises(UserError, match="no object is annotated"):
            Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU)
        return
    figures = Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU)
    assert figures == pytest.approx(problem.reference(), abs=1e-6, nan_ok=True)
    assert tuple(figures) == FIGURES


def test_known_figures() -> None:
    truth = torch.tensor([[10, 10, 20, 20, 400, 1, 0], [50, 50, 40, 40, 1600, 1, 0.0]]).double()
    outputs = [
        {
            "boxes": torch.tensor([[10.0, 10, 30, 30], [50, 50, 90, 74]]),  # one exact, one with an IoU of 0.6
            "labels": torch.tensor([1, 1]),
            "scores": torch.tensor([0.9, 0.8]),
        }
    ]
    batch = ((torch.zeros(3, 2, 2),), ({"image_id": torch.tensor(5), "ground_truth": truth},))
    figures = Detection().evaluate(Replay(outputs), [batch], CPU)
    half = 100 * 51 / 101  # precision 1 up to a recall of 0.5, of 101 points
    assert figures["AP50"] == pytest.approx(100)
    assert figures["AP75"] == pytest.approx(half)
    assert figures["AP"] == pytest.approx((3 * 100 + 7 * half) / 10)
    assert figures["AP_small"] == pytest.approx(100)
    assert figures["AP_medium"] == pytest.approx(30)
    assert math.isnan(figures["AP_large"])


def test_no_detections_at_all() -> None:
    problem = Problem(0, 4, 2, 5, 0)
    problem.outputs = [{n: value[:0] for n, value in output.items()} for output in problem.outputs]
    figures = Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU)
    assert figures["AP"] == 0
    assert figures == pytest.approx(problem.reference(), nan_ok=True)


def test_an_image_that_comes_twice_counts_once() -> None:
    problem = Problem(1, 6, 3, 6, 10)
    batches = problem.batches()
    once, twice = (Detection().evaluate(Replay(problem.outputs), b, CPU) for b in (batches, batches + batches[:1]))
    assert once == pytest.approx(twice, nan_ok=True)


def test_detections_are_scaled_to_the_file() -> None:
    problem = Problem(2, 5, 3, 6, 10)
    expected = Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU)
    for (_, target), output in zip(problem.items, problem.outputs, strict=True):
        target |= {"orig_size": torch.tensor([480, 640]), "size": torch.tensor([960, 320])}
        output["boxes"] = output["boxes"] * torch.tensor([0.5, 2, 0.5, 2])
    assert Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU) == expected


def test_targets_without_ground_truth() -> None:
    """Those of other data sets in torchvision's convention: boxes of the image as it is given, single precision."""
    problem = Problem(3, 6, 3, 6, 10)
    for _, target in problem.items:
        target["ground_truth"] = target["ground_truth"].float().double()
    expected = problem.reference()
    for _, target in problem.items:
        truth = target.pop("ground_truth").float()
        target["boxes"] = torch.cat([truth[:, :2], truth[:, :2] + truth[:, 2:4]], dim=1)
        target |= {"area": truth[:, 4], "labels": truth[:, 5].long(), "iscrowd": truth[:, 6].long()}
    assert Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU) == pytest.approx(
        expected, abs=1e-6, nan_ok=True
    )


def test_the_results_file_is_what_was_measured(tmp_path: Path) -> None:
    problem = Problem(4, 6, 3, 6, 10)
    Detection().evaluate(Replay(problem.outputs), problem.batches(size=4), CPU, tmp_path)
    written = json.loads((tmp_path / "detections.json").read_text())
    assert [entry["image_id"] for entry in written] == sorted(entry["image_id"] for entry in written)
    for (_, target), output in zip(problem.items, problem.outputs, strict=True):
        of_image = [entry for entry in written if entry["image_id"] == int(target["image_id"])]
        boxes = output["boxes"].double()
        assert [entry["bbox"] for entry in of_image] == torch.cat(
            [boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1
        ).tolist()
        assert [entry["score"] for entry in of_image] == output["scores"].tolist()
        assert [entry["category_id"] for entry in of_image] == output["labels"].tolist()
    Detection({1: 10, 2: 20}).evaluate(Replay(problem.outputs), problem.batches(), CPU, tmp_path)
    renamed = json.loads((tmp_path / "detections.json").read_text())
    assert [e["category_id"] for e in renamed] == [10 * e["category_id"] for e in written if e["category_id"] < 3]


# Several processes.


def evaluate_a_part(rank: int, world_size: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        problem = Problem(5, 9, 3, 6, 10)
        batches = problem.batches(rank, world_size)
        if rank == 1:
            batches += problem.batches()[:1]  # a sampler may pad
        model = DistributedDataParallel(Replay(problem.outputs))
        figures = Detection().evaluate(model, batches, CPU, folder)
        assert model.training
        try:
            Detection().evaluate(model, [], CPU)
            said = ""
        except UserError as error:
            said = str(error)
        (folder / f"{rank}.json").write_text(json.dumps({"figures": figures, "said": said}))
        dist.barrier()  # gloo aborts a process whose peer is gone while it still connects
    finally:
        dist.destroy_process_group()


def test_two_processes_are_exact(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work_together(evaluate_a_part, (2, port, tmp_path), 2)
    problem = Problem(5, 9, 3, 6, 10)
    alone = Detection().evaluate(Replay(problem.outputs), problem.batches(), CPU, tmp_path / "alone")
    for rank in (0, 1):
        part = json.loads((tmp_path / f"{rank}.json").read_text())
        assert part["figures"] == pytest.approx(alone, abs=1e-9, nan_ok=True)
        assert part["said"] == "nothing to evaluate: the data set is empty"  # in both, and neither waits
    assert (tmp_path / "detections.json").read_text() == (tmp_path / "alone" / "detections.json").read_text()


# What is given and returned.


def test_unpack() -> None:
    target = {"boxes": torch.zeros(1, 4), "ground_truth": torch.zeros(1, 7), "name": "x"}
    image = torch.zeros(3, 2, 2)
    images, targets, supplement = Detection().unpack(((image,), (target,), ({},)), torch.device("meta"))
    assert images[0].is_meta
    assert targets[0]["boxes"].is_meta
    assert not targets[0]["ground_truth"].is_meta
    assert targets[0]["name"] == "x"
    assert supplement == {}
    assert not target["boxes"].is_meta  # the loader's own is left alone
    more = Detection().unpack(((image,) * 2, (target,) * 2, ({"row": 1}, {"row": 2})), CPU)[2]
    assert more["row"].tolist() == [1, 2]


def test_batches_that_are_not_lists() -> None:
    image, target = torch.zeros(3, 2, 2), {"boxes": torch.zeros(1, 4)}
    for batch in ((image[None], (target,)), ((image,), {"boxes": torch.zeros(1, 1, 4)})):
        with pytest.raises(UserError, match="give the loader collate_fn: 'coco_collate_fn'"):
            Detection().unpack(batch, CPU)
    for wrong, said in ((image.byte(), "uint8"), ("image", "str")):
        with pytest.raises(UserError, match=f"tensors of floats, got .*{said}: end transforms with ToDtype"):
            Detection().unpack(((wrong,), (target,)), CPU)


FINE = {"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "scores": torch.ones(1)}


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (torch.zeros(1, 10), "a list of detections, one of each of 1 images; got Tensor"),
        ([FINE, FINE], "one of each of 1 images; got 2 outputs"),
        ([{"boxes": torch.zeros(1, 4), "labels": torch.ones(1)}], "boxes, labels and scores of an image; got boxes, l"),
        ([torch.zeros(1, 4)], "boxes, labels and scores of an image; got Tensor"),
        ([{**FINE, "boxes": torch.full((1, 4), math.nan)}], "boxes or scores are not finite"),
        ([{**FINE, "scores": torch.full((1,), math.inf)}], "boxes or scores are not finite"),
    ],
)
def test_outputs_that_are_not_detections(outputs: Any, said: str) -> None:
    class Model(nn.Module):
        def forward(self, images: list[Tensor]) -> Any:
            return outputs

    (batch,) = Problem(0, 1, 1, 1, 1).batches()
    model = Model()
    with pytest.raises(UserError, match=said):
        Detection().evaluate(model, [batch], CPU)
    assert model.training


def test_targets_without_an_image_id() -> None:
    batch = ((torch.zeros(3, 2, 2),), ({"boxes": torch.zeros(1, 4)},))
    with pytest.raises(UserError, match="targets need an image_id to be evaluated; got boxes"):
        Detection().evaluate(Replay([FINE]), [batch], CPU)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", range(1, 7)),  # 0 is the background
        ("ssdlite320_mobilenet_v3_large", range(1, 7)),
        ("retinanet_resnet18_fpn", range(7)),
        ("vidt_swin_nano", range(7)),
    ],
)
def test_labels_that_a_detector_knows(key: str, known: range) -> None:
    build = MODEL_DICT.get(key) or get_model_builder(key)
    bodies = {} if key.startswith("vidt") else {"weights_backbone": None}
    with torch.device("meta"):  # its shape is all that is asked
        assert labels_of(build(num_classes=7, **bodies)) == known
    assert labels_of(Replay([])) is None


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"needs faster-coco-eval: pip install 'vkd-plugin\[detection\]'"):
        Detection()
