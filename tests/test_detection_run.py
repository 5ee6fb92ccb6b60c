"""Detectors of torchvision's through the command line: checked, trained with and without a teacher, tested."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from vkd_plugin.cli import main
from vkd_plugin.datasets.coco_shapes import write_tree
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.tasks.coco_ap import FIGURES
from vkd_plugin.tasks.pictures import FOUND, TRUTH

ROOT = Path(__file__).parents[1]
PLAIN, VKD = (f"tests/data/coco/{name}.yaml" for name in ("detector", "detector_vkd"))
OWN_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture(autouse=True)
def _in_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "coco", train=4, val=4, size=64, objects=2)
    monkeypatch.setenv("COCO_SHAPES", str(tmp_path / "coco"))
    monkeypatch.chdir(ROOT)


def test_a_detector_is_distilled_and_tested(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--config", VKD, "--output", str(run), "--device", "cpu"]
    pictures = ["--set", "test.pictures={count: 2, score: 0.0}"]
    assert main(arguments) == 0
    assert not (run / "detections.png").exists()  # nobody has asked for it
    (record,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {f"val/{name}" for name in FIGURES} <= record.keys()
    terms = {name: record[f"loss/{name}"] for name in (*OWN_LOSSES, "vkd")}
    weighted = sum(4 * value if name == "vkd" else value for name, value in terms.items())
    assert math.isclose(record["loss"], weighted, rel_tol=1e-5)
    assert record["orthogonality_error/level"] < 1e-5
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["test"]) == {"teacher", "student"}
    tested = summary["test"]["student"]["AP"]
    assert tested == pytest.approx(record["val/AP"])  # the same images
    assert read_checkpoint(run / "checkpoints" / "best.pt")["best_value"] == record["val/AP"]
    truth = json.loads((tmp_path / "coco" / "annotations" / "instances_val2017.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    results = json.loads((run / "detections.json").read_text())
    assert 0 < len(results) <= 10 * len(sizes)
    for entry in results:
        (left, top, width, height), (most_right, most_down) = entry["bbox"], sizes[entry["image_id"]]
        assert -1e-3 < left <= left + width < most_right + 1e-3
        assert -1e-3 < top <= top + height < most_down + 1e-3
    (run / "detections.json").unlink()
    assert main([*arguments, *pictures, "-test_only", "-student_only"]) == 0
    assert json.loads((run / "detections.json").read_text()) == results
    with Image.open(run / "detections.png") as grid:
        found = {colour for _, colour in grid.convert("RGB").getcolors(grid.width * grid.height)}
    assert {TRUTH, FOUND} <= found


def test_a_step_without_the_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCO_SHAPES", "/nowhere")
    assert main(["check", PLAIN]) == 0
    out, err = capsys.readouterr()
    assert "CocoDetection  118,287 samples  of 3 x" in out
    assert "engine     task: detection" in out
    assert {line.split(": ", 1)[0] for line in err.splitlines()} == {"warning"}
    assert "nothing is at '/nowhere'" in err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.task=classification", "a classifier's targets are a tensor, got a tuple; detectors"),
        ("train.task=detecton", "(did you mean 'detection'?)"),
        ("train.train_data_loader.collate_fn=", "give collate_fn: 'coco_collate_fn'"),
        ("train.model.forward_proc=forward_batch_only", "targets should not be none"),
        ("datasets.coco2017/val.init.kwargs.transforms=", "got Image: end transforms with ToDtype"),
        ("models.model.key=resnet18", "models.model"),
        ("models.model.kwargs.num_classes=11", "reach 11, the detector's 10: num_classes should be 12"),
        (
            "datasets.coco2017/train.init.kwargs.labels=contiguous",
            "label 0 of data set 'coco2017/train' is the detector",
        ),
        ("test.pictures=4", "expected a mapping, got 4; write {count: ...}"),
        ("test.pictures={count: 0}", "test.pictures.count: expected a whole number from 1 to 100, got 0"),
        ("test.pictures={count: 4, scores: 0.3}", "unknown key 'scores' (did you mean 'score'?)"),
        ("test.pictures={score: 0.3}", "test.pictures: missing key 'count'"),
    ],
)
def test_mistakes_are_found_before_training(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--data", PLAIN, "--set", override]) == 2
    err = capsys.readouterr().err
    assert said.lower() in err.lower()
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_pictures_need_detections_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / PLAIN).read_text() + "  pictures: {count: 4}\n"
    images = "  coco2017/val: !import_call {key: 'torchvision.datasets.FakeData', init: {kwargs: {size: 2}}}\n\nmodels:"
    start, end = text.index("  coco2017/val: "), text.index("\nmodels:")
    for changed, said in (
        (text.replace("  task: 'detection'\n", ""), "test: 'pictures' is not read here: they are of detections"),
        (
            text[:start] + images + text[end + 8 :],
            "test.pictures: data set 'coco2017/val' cannot be asked for the image",
        ),
    ):
        config = tmp_path / "changed.yaml"
        config.write_text(changed)
        line = 1 + changed.splitlines().index("  pictures: {count: 4}")
        assert main(["check", str(config)]) == 2
        assert f"error: {config}:{line}:3: {said}" in capsys.readouterr().err


def test_the_dry_step_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several processes takes it, and a loss that is standardised over all would wait for the others."""

    def wait(*_: object, **__: object) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", wait)
    assert main(["check", "--data", VKD]) == 0
