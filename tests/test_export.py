"""``run.py export``: folders that load elsewhere as the model that was trained, or no folder at all."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import squeezenet1_1
from torchvision.transforms import v2

from vkd_plugin.cli import main
from vkd_plugin.engine.progress import setup_logging
from vkd_plugin.export import export, onnx_file
from vkd_plugin.export.preprocessing import Preprocessing, preprocessing
from vkd_plugin.models import digits_vit, fit_weights, load_weights
from vkd_plugin.models.weights import read_checkpoint

ROOT = Path(__file__).parents[1]
VIT = "configs/digits/vkd/vit_from_cnn.yaml"
IMAGES = "tests/data/configs/export.yaml"
STUDENTS = {
    "timm": ("timm_model", {"name": "test_vit", "num_classes": 5, "img_size": 32}),
    "deit": (
        "deit_tiny_distilled_conv_patch16_224",
        {"num_classes": 5, "img_size": 32, "depth": 1, "distilled_training": False},
    ),
    "torchvision": ("squeezenet1_1", {"num_classes": 5, "weights": None}),
}


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of short runs: ``digits``, with an EMA, and one by the name of each of :data:`STUDENTS`."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--set", "datasets.digits/train.init.kwargs.fraction=0.2", "--set", "train.ema.decay=0.5"]
    short += ["--set", "train.num_epochs=2", "--set", f"models.student_model.dst_ckpt={folder}/student.pt"]
    short += ["--set", "train.checkpoint.keep=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["--config", VIT, *short, "--output", str(folder / "digits"), "--device", "cpu"]) == 0
        for name, (key, kwargs) in STUDENTS.items():
            student = ["--set", f"models.model.key={key}", "--set", f"models.model.kwargs={json.dumps(kwargs)}"]
            assert main(["--config", IMAGES, *student, "--output", str(folder / name), "--device", "cpu"]) == 0
    setup_logging(is_main=True)  # lets go of log.txt, as the end of a process does
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run, to be changed."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(runs / name, tmp_path / name))

    return copied


def _edit(run: Path, old: str, new: str) -> None:
    """A change to the run's configuration."""
    text = (run / "config.yaml").read_text()
    assert text.count(old) == 1
    (run / "config.yaml").write_text(text.replace(old, new))


def _export(run: Path, *arguments: str, to: Path | None = None) -> Path:
    folder = to or run.parent / f"{run.name}-exported"
    shutil.rmtree(folder, ignore_errors=True)
    assert main(["export", str(run), "--to", str(folder), *arguments]) == 0
    return folder


def _refused(capfd: pytest.CaptureFixture[str], run: Path, *arguments: str, to: Path | None = None) -> str:
    """The only line on stderr; nothing is left behind."""
    folder = to or run.parent / "refused"
    before = sorted(run.parent.rglob("*"))
    capfd.readouterr()
    assert main(["export", str(run), "--to", str(folder), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert sorted(run.parent.rglob("*")) == before
    return line


def _code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's lines of Python leave."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(code, found)
    return found


@torch.inference_mode()
def _logits(model: nn.Module, *shape: int) -> Tensor:
    return model.eval()(torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)))


def _rows(folder: Path) -> dict[str, list[str]]:
    lines = re.findall(r"^\| (validation|test) \| `(.*)` \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    return {split: [dataset, *figures.split(" | ")] for split, dataset, figures in lines}


# --- what is exported -----------------------------------------------------------------------------------------


def test_a_student_of_the_registry(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _export(runs / "digits")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    wanted = digits_vit()
    fit_weights(wanted, load_weights(runs / "digits/checkpoints/best.pt"), "best.pt")
    torch.testing.assert_close(_logits(_code(folder, monkeypatch)["model"], 1, 8, 8), _logits(wanted, 1, 8, 8))
    config = json.loads((folder / "config.json").read_text())
    assert (config["library"], config["key"], config["kwargs"]) == ("torchdistill", "digits_vit", {})
    assert config["pretrained_cfg"] == {
        "input_size": [1, 8, 8], "mean": [0.3], "std": [0.37], "crop_pct": 1.0, "num_classes": 10,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["timm", "deit"])
def test_a_student_of_timm(runs: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _export(runs / name)
    key, kwargs = STUDENTS[name]
    architecture = kwargs.get("name", key)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == architecture
    assert config["num_classes"] == 5
    assert config["model_args"] == {k: v for k, v in kwargs.items() if k not in ("name", "num_classes")}
    wanted = timm.create_model(architecture, **{k: v for k, v in kwargs.items() if k != "name"})
    fit_weights(wanted, load_weights(runs / name / "checkpoints/best.pt"), "best.pt")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(_logits(model, 3, 32, 32), _logits(wanted, 3, 32, 32), rtol=1e-6, atol=1e-6)

    found = _code(folder, monkeypatch)
    torch.testing.assert_close(_logits(found["model"], 3, 32, 32), _logits(wanted, 3, 32, 32), rtol=1e-6, atol=1e-6)
    assert ("vkd_plugin" in found) == (name == "deit"), "only the plugin's own architectures need it"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8))
    torch.testing.assert_close(found["transform"](image), _evaluation()(image), rtol=0, atol=0)


def _evaluation() -> transforms.Compose:
    """That of the configuration."""
    bicubic = transforms.InterpolationMode.BICUBIC
    first = [transforms.Resize(36, bicubic), transforms.CenterCrop(32), transforms.ToTensor()]
    return transforms.Compose([*first, transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])])


def test_a_student_of_torchvision(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _export(runs / "torchvision")
    model = _code(folder, monkeypatch)["model"]
    assert type(model).__module__.startswith("torchvision.")
    saved = read_checkpoint(runs / "torchvision/checkpoints/best.pt")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["kwargs"] == {"num_classes": 5}


def test_which_checkpoint(runs: Path, tmp_path: Path) -> None:
    run, other = runs / "digits", tmp_path / "other.pt"
    last = read_checkpoint(run / "checkpoints/last.pt")
    averages = {name.removeprefix("module."): value for name, value in last["ema"].items() if name != "n_averaged"}
    torch.save({"student": {f"module.{name}": tensor for name, tensor in last["model"].items()}}, other)
    first = read_checkpoint(run / "checkpoints/epoch1.pt")["model"]
    for arguments, wanted in (
        (["--checkpoint", "last"], last["model"]),
        (["--checkpoint", "last", "--ema"], averages),
        (["--checkpoint", "epoch1"], first),
        (["--checkpoint", str(other)], last["model"]),
    ):
        found = load_weights(_export(run, *arguments) / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), arguments
    assert not torch.equal(last["model"]["head.weight"], averages["head.weight"])


def test_the_card_says_what_was_measured_with_these_weights(runs: Path, tmp_path: Path) -> None:
    run = runs / "digits"
    summary = json.loads((run / "summary.json").read_text())
    last, best, test = summary["last"], summary["best"], summary["test"]["student"]

    def figures(values: dict[str, float], prefix: str) -> list[str]:
        return ["digits/test", *(f"{values[prefix + name]:.4g}" for name in ("top1", "top5", "loss"))]

    exported = _export(run)
    text = (exported / "README.md").read_text()
    assert _rows(exported) == {"validation": figures(best, "val_ema/"), "test": figures(test, "")}
    assert _rows(_export(run, "--checkpoint", "last")) == {"validation": figures(last, "val/")}
    assert _rows(_export(run, "--checkpoint", "last", "--ema")) == {"validation": figures(last, "val_ema/")}
    shutil.copy(run / "checkpoints/last.pt", tmp_path / "else.pt")
    assert _rows(_export(run, "--checkpoint", str(tmp_path / "else.pt"))) == {}

    assert f"weights of epoch {best['epoch']} of 2" in text
    assert "the exponential moving average of the student" in text
    assert f"* configuration: `{VIT} --set " in text
    assert '* teacher: `digits_cnn` `{"checkpoint": "configs/digits/ce/digits_cnn.safetensors"}`' in text
    assert "vkd (VkDLoss, weight 4)" in text
    assert "on the data that it was tested on" in text
    assert f"| torch | {torch.__version__} | {torch.__version__} |" in text


def test_a_run_that_is_not_finished(run: Callable[[str], Path]) -> None:
    folder = run("digits")
    (folder / "summary.json").unlink()
    exported = _export(folder)
    assert "* the run is unfinished, epoch 2 of 2" in (exported / "README.md").read_text()
    assert _rows(exported).keys() == {"validation"}


def test_neither_data_nor_first_weights_have_to_be_there(run: Callable[[str], Path], tmp_path: Path) -> None:
    """Nor is anything downloaded."""
    folder = run("timm")
    _edit(folder, "torchvision.datasets.FakeData", "torchvision.datasets.ImageFolder")
    _edit(
        folder, "        size: 8\n        image_size: [3, 40, 56]\n        num_classes: 5\n", "        root: /nowhere\n"
    )
    _edit(folder, '"test_vit"', '"test_vit.r160_in1k", "pretrained": true, "new_classifier": true')
    _edit(folder, "    key: timm_model\n", f"    key: timm_model\n    src_ckpt: {tmp_path}/gone.pt\n")
    exported = _export(folder)
    wanted = json.loads((exported / "config.json").read_text())
    assert wanted["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert wanted["model_args"] == {"img_size": 32}
    assert f"* began with: `models.model.src_ckpt` `{tmp_path}/gone.pt`" in (exported / "README.md").read_text()
    found = load_weights(exported / "model.safetensors")
    saved = read_checkpoint(folder / "checkpoints/best.pt")["model"]
    assert all(torch.equal(found[name], saved[name]) for name in saved)


# --- what is refused ------------------------------------------------------------------------------------------


def test_the_folder_is_taken(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    run = runs / "digits"
    assert "is no folder" in _refused(capfd, run, to=tmp_path / "file")
    assert "is not empty" in _refused(capfd, run, to=tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (_export(run, to=tmp_path / "empty") / "config.json").exists()
    assert (_export(run, to=tmp_path / "new" / "deep") / "config.json").exists()


def test_the_working_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is the working folder" in _refused(capfd, runs / "digits", to=Path("."))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "bset"], "--checkpoint bset: no file, and no checkpoint of .*did you mean 'best'"),
        (["--opset", "17"], "give --onnx"),
        (["--checkpoint", "configs/digits/ce/digits_cnn.safetensors"], "does not fit VisionTransformer: .* missing"),
    ],
)
def test_arguments(runs: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, _refused(capfd, runs / "digits", *arguments))


def test_no_run(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in _refused(capfd, tmp_path, to=tmp_path / "new")
    assert "did you mean" in _refused(capfd, runs / "digit")


def test_no_best_checkpoint(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("digits")
    (folder / "checkpoints/best.pt").unlink()
    (folder / "summary.json").unlink()
    assert "best.pt: no such checkpoint (unfinished, epoch 2 of 2); --checkpoint takes" in _refused(capfd, folder)


def test_a_damaged_checkpoint(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("digits")
    best = folder / "checkpoints/best.pt"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    assert "best.pt: not a readable checkpoint: it was damaged after it was written" in _refused(capfd, folder)
    best.write_bytes(content[:1000])
    assert "best.pt: not a readable checkpoint" in _refused(capfd, folder)


def test_no_average(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "holds no EMA" in _refused(capfd, runs / "timm", "--ema")


def test_other_classes(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("timm")
    _edit(folder, '"num_classes": 5', '"num_classes": 999')
    assert "2 of another shape (head.weight (5, 64) for (999, 64)" in _refused(capfd, folder)


def test_a_model_that_the_folder_could_not_say(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Its images are renormalised on their way in, which is no argument of timm's."""
    folder = run("timm")
    _edit(folder, '"test_vit"', '"test_vit", "renormalize": {"mean": [0.1, 0.1, 0.1], "std": [0.3, 0.3, 0.3]}')
    assert "does not load: " in (line := _refused(capfd, folder))
    assert "renormalize" in line


def test_arguments_that_are_no_json(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("timm")
    _edit(folder, '"test_vit"', '"test_vit", "act_layer": !import_get {"key": "torch.nn.ReLU"}')
    line = _refused(capfd, folder)
    assert re.search(r"config\.yaml:\d+:\d+: models\.model\.kwargs\.act_layer: type is nothing that config\.json", line)


def test_other_logits(runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What loads back is compared, not only loaded."""

    def changed(*arguments: Any) -> nn.Module:
        model = digits_vit().eval()
        nn.init.ones_(model.head.bias)
        return model

    monkeypatch.setattr(export, "loaded", changed)
    assert "is another model (its outputs differ by" in _refused(capfd, runs / "digits")


def test_a_full_disk(runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def full(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "card", full)
    assert "cannot write there: No space left on device" in _refused(capfd, runs / "digits")


def test_code_of_a_package_that_is_not_trusted(run: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("timm")
    _edit(folder, "torchvision.datasets.FakeData", "hypothesis.given")
    before = sorted(folder.parent.rglob("*"))
    assert main(["export", str(folder), "--to", str(folder.parent / "refused")]) == 2
    assert "--trust hypothesis" in capfd.readouterr().err
    assert sorted(folder.parent.rglob("*")) == before


# --- ONNX -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "opset"), [("digits", None), pytest.param("torchvision", 17, marks=pytest.mark.slow)])
def test_onnx(runs: Path, name: str, opset: int | None) -> None:
    """Opset 17 is older than what torch.export writes."""
    onnx, runtime, _ = map(pytest.importorskip, onnx_file._PACKAGES)
    folder = _export(runs / name, "--onnx", *(["--opset", str(opset)] if opset else []))
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "model.onnx"}
    (version,) = [entry.version for entry in onnx.load(folder / "model.onnx").opset_import if entry.domain == ""]
    assert version == (opset or version)
    assert f"`model.onnx` (opset {version})" in (folder / "README.md").read_text()
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    model = digits_vit() if name == "digits" else squeezenet1_1(num_classes=5)
    fit_weights(model.eval(), load_weights(folder / "model.safetensors"), folder)
    images = torch.randn(5, *json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def test_onnx_that_computes_something_else(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for package in onnx_file._PACKAGES:
        pytest.importorskip(package)
    by_tracing = onnx_file._by_tracing

    def shifted(model: nn.Module, sample: Tensor, file: Path, opset: int | None) -> None:
        changed = digits_vit()
        changed.load_state_dict(model.state_dict())
        nn.init.constant_(changed.head.bias, 0.1)
        by_tracing(changed.eval(), sample, file, opset)

    monkeypatch.setattr(onnx_file, "_by_graph", shifted)
    monkeypatch.setattr(onnx_file, "_by_tracing", shifted)
    line = _refused(capfd, runs / "digits", "--onnx")
    assert "cannot be exported to ONNX: torch.export: onnxruntime's logits differ by" in line


def test_onnx_without_its_packages(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    line = _refused(capfd, runs / "digits", "--onnx")
    assert line == "error: --onnx needs onnx, onnxruntime, onnxscript: pip install 'vkd-plugin[onnx]'"


# --- what an evaluation transform says ------------------------------------------------------------------------


def _read(*steps: Any) -> Preprocessing:
    """Of a data set with these steps, whose images are not at hand."""

    class Data:
        transform = transforms.Compose(steps)

    class Experiment:
        data: Any = {"train": {}, "datasets": {"x": Data()}, "test": {"test_data_loader": {"dataset_id": "x"}}}  # noqa: RUF012

    return preprocessing(Experiment())  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(0, 200), st.booleans())
def test_timm_resizes_and_crops_as_the_run_did(crop: int, more: int, squash: bool) -> None:
    resized = (crop + more, crop + more) if squash else crop + more
    told = _read(transforms.Resize(resized), transforms.CenterCrop(crop)).told
    theirs = timm.data.create_transform(
        (3, crop, crop), interpolation=told["interpolation"], crop_pct=told["crop_pct"], crop_mode=told["crop_mode"]
    )
    resize, cropped = theirs.transforms[:2]
    assert (resize.size, resize.interpolation.value) == (resized, "bilinear")
    assert tuple(cropped.size) == (crop, crop)


def test_torchvisions_second_transforms() -> None:
    found = _read(
        v2.Resize((32, 48)),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        v2.Normalize([0.5], [0.5]),
    )
    assert found.told == {
        "interpolation": "bilinear", "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "crop_mode": "squash",
    }  # fmt: skip
    assert found.untold == []


@pytest.mark.parametrize(
    "step",
    [
        transforms.Grayscale(3),
        transforms.RandomApply([transforms.Grayscale(3)]),
        v2.ToDtype(torch.float32, scale=False),
        transforms.CenterCrop(8),
        transforms.Resize(8),
    ],
)
def test_what_timm_has_no_words_for_is_said(step: Any) -> None:
    found = _read(step, transforms.ToTensor())
    assert len(found.untold) == 1
    assert not {"crop_mode", "mean"} & found.told.keys()
