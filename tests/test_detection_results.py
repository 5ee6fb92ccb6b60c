"""What becomes of a detector's run: its report, and its export."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import fcos_resnet50_fpn

from vkd_plugin.check.offline import offline
from vkd_plugin.cli import main
from vkd_plugin.datasets.coco_shapes import write_tree
from vkd_plugin.engine.progress import setup_logging
from vkd_plugin.export import export
from vkd_plugin.models import fasterrcnn_resnet18_fpn, fit_weights, load_weights, shapes_fcos
from vkd_plugin.results import report as report_module

ROOT = Path(__file__).parents[1]
VKD = "configs/coco_shapes/vkd/shapes_fcos_student_from_teacher.yaml"
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two epochs, ``vkd``, on few images."""
    folder = tmp_path_factory.mktemp("detectors")
    write_tree(folder / "coco", train=4, val=3, size=64, objects=2, classes=5)
    overrides = [
        f"datasets._root={folder}/coco",
        "models.teacher_model.src_ckpt=null",
        f"models.student_model.dst_ckpt={folder}/student.pt",
        "train.num_epochs=2",
        "train.train_data_loader.kwargs={batch_size: 2}",
        "train.scheduler.kwargs={total_steps: 4, warmup_steps: 1}",
    ]
    sets = [word for override in overrides for word in ("--set", override)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["--config", VKD, *sets, "-student_only", "--output", str(folder / "vkd"), "--device", "cpu"]) == 0
    setup_logging(is_main=True)  # lets go of log.txt, as the end of a process does
    return folder


def text_of(page: Path) -> str:
    """What a reader sees, tags replaced by bars."""
    html = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.sub(r"\s*(<[^>]*>\s*)+", "|", html)


# The report.


def test_a_report_of_a_detector(trained: Path) -> None:
    assert main(["report", str(trained / "vkd")]) == 0
    page = trained / "vkd" / "report.html"
    summary = json.loads((trained / "vkd" / "summary.json").read_text())
    text = text_of(page)
    for name in FIGURES:
        value = summary["test"]["student"][name]
        assert f"|student {name}|{'no object of this size' if value is None else f'{value:.5g}'}|" in text
    assert "|student AP_large|no object of this size|" in text
    assert {f"<h4>{key}</h4>" for key in ("val/AP", "loss/level0", "orthogonality_error/level2")} <= set(
        re.findall("<h4>[^<]*</h4>", page.read_text("utf-8"))
    )
    assert "a detector: features by class, loss landscape and fitted projectors are those of classifiers." in text
    assert "Loss landscape|" not in text  # nor other sections without anything in them
    picture = (trained / "vkd" / "detections.png").read_bytes()
    assert report_module.picture(picture, f"detections of {trained / 'vkd'}") in page.read_text("utf-8")


def test_a_report_beside_a_classifier(trained: Path, tmp_path: Path) -> None:
    """The classifier's sections are there, and the detector is left out of them with a sentence."""
    shutil.copytree(trained / "vkd", tmp_path / "detector")
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.yaml").write_text(Path("configs/digits/ce/vit.yaml").read_text())
    (tmp_path / "classifier" / "metrics.jsonl").write_text('{"epoch": 1, "step": 2, "val/top1": 50.0}\n')
    arguments = [
        "report",
        str(tmp_path / "detector"),
        str(tmp_path / "classifier"),
        "--output",
        f"{tmp_path}/page.html",
    ]
    assert main(arguments) == 0
    text = text_of(tmp_path / "page.html")
    assert "|detector: a detector: features by class," in text
    assert "|classifier: it has no checkpoint yet|" in text
    assert "|Loss landscape|" in text


def test_a_picture_that_does_not_fit(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    monkeypatch.setattr(report_module, "_LARGEST_PICTURE", 10)
    assert main(["report", str(trained / "vkd"), "--no-figures", "--output", str(page)]) == 0
    assert f"|{trained}/vkd/detections.png is too large for this page|" in text_of(page)


# The export.


def test_an_exported_detector_loads(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(trained / "vkd"), "--to", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["library"], config["key"], config["num_classes"]) == ("torchdistill", "shapes_fcos", 6)
    assert config["pretrained_cfg"] == {"num_classes": 6}
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(code, found)
    wanted = shapes_fcos(**config["kwargs"]).eval()
    fit_weights(wanted, load_weights(trained / "vkd/checkpoints/best.pt"), "best.pt")
    image = torch.rand(3, 60, 50, generator=torch.Generator().manual_seed(0))
    for model in (wanted, found["model"]):
        model.score_thresh = 0.0
    with torch.inference_mode():
        (one,), (other,) = wanted([image]), found["model"]([image])
    assert len(one["boxes"]) > 0
    assert all(torch.equal(one[part], other[part]) for part in ("boxes", "labels", "scores"))


def test_the_card_of_a_detector(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained / "vkd"), "--to", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    tested = json.loads((trained / "vkd" / "summary.json").read_text())["test"]["student"]
    cells = ["" if tested[name] is None else f"{tested[name]:.4g}" for name in FIGURES]
    assert "| split | data set | AP | AP50 | AP75 | AP_small | AP_medium | AP_large |" in card
    assert f"| test | `coco_shapes/val` | {' | '.join(cells)} |" in card
    assert "pipeline_tag: object-detection\ntags:\n- object-detection\n- knowledge-distillation\n" in card
    assert "An object detector of the labels 0 to 5 with 130,907 parameters. Distilled" in card
    assert "Of all epochs this one was chosen by AP in validation, on the data that it was tested on." in card
    assert "projector of `level0`: OrthogonalProjector (matrix_exp)" in card
    assert not re.search("top-?1|classifier|cross-entropy", card)


def test_no_onnx_of_detectors(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["export", str(trained / "vkd"), "--to", str(tmp_path / "exported"), "--onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --onnx: is for classifiers; of detectors, whose outputs differ in number, leave it out"
    assert not (tmp_path / "exported").exists()


def test_another_detector_is_not_taken_for_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though both may find nothing in random images."""

    def changed(*arguments: Any) -> torch.nn.Module:
        model = shapes_fcos(num_classes=6, channels=32, num_convs=1).eval()
        fit_weights(model, load_weights(trained / "vkd/checkpoints/best.pt"), "best.pt")
        with torch.no_grad():
            model.backbone.stem[0].weight += 1e-4
        return model

    monkeypatch.setattr(export, "loaded", changed)
    assert main(["export", str(trained / "vkd"), "--to", str(tmp_path / "exported")]) == 2
    assert "is another model (its outputs differ by " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["fasterrcnn_resnet18_fpn", "fcos_resnet50_fpn"])
def test_first_weights_of_bodies_are_not_asked_for_again(
    key: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a body began with are downloaded when it is built; BatchNorm was frozen for them."""
    given: dict[str, Any] = {"num_classes": 6, "min_size": 64, "max_size": 64}
    if key.startswith("fasterrcnn"):
        given |= {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 20}
    started = {**given, "weights_backbone": "IMAGENET1K_V1", "trainable_backbone_layers": 2}
    build = {"fasterrcnn_resnet18_fpn": fasterrcnn_resnet18_fpn, "fcos_resnet50_fpn": fcos_resnet50_fpn}[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
        with offline():
            model = build(**started)
        run = Path(shutil.copytree(trained / "vkd", tmp_path / "run"))
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
        text = (run / "config.yaml").read_text()
        head, rest = text.split("  student_model:\n", 1)
        section = f"  student_model:\n    key: {key}\n    kwargs: {json.dumps(started)}\n"
        (run / "config.yaml").write_text(head + section + rest[rest.index("train:\n") :])
        arguments = [
            "export",
            str(run),
            "--to",
            str(tmp_path / "exported"),
            "--checkpoint",
            str(tmp_path / "weights.pt"),
        ]
        assert main(arguments) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "exported")
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(code, found)
    image = torch.rand(3, 60, 50, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = [m.eval().backbone(image[None]) for m in (model, found["model"])]
    for name, value in features[0].items():
        torch.testing.assert_close(features[1][name], value)
