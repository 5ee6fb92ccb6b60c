"""Checkpoints of other code load by the documented rules, and what fits none of them is refused in one line."""

import argparse
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from vkd_plugin import OrthogonalProjector
from vkd_plugin.cli import main
from vkd_plugin.engine.ema import StudentEMA
from vkd_plugin.engine.progress import setup_logging
from vkd_plugin.errors import UserError
from vkd_plugin.models import digits_vit, fit_weights, load_weights, timm_model
from vkd_plugin.models.reference import import_projector
from vkd_plugin.models.weights import AVERAGES, NESTED, read_checkpoint

ROOT = Path(__file__).parents[1]
RELEASE = json.loads((ROOT / "tests/data/parity/deit_tiny.json").read_text())["training_checkpoint"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth.tar"


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """caplog hears the plugin's logger, whatever a run before has made of it."""
    monkeypatch.setattr(logging.getLogger("vkd_plugin"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("vkd_plugin"), "level", logging.DEBUG)


def _model(classes: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def _loads(file: Path, state: Any, wanted: nn.Module | None = None) -> None:
    """That ``state`` in a file makes a new model ``wanted``."""
    torch.save(state, file)
    model = _model()
    fit_weights(model, load_weights(file), file)
    assert wanted is not None
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def _refused(source: Path | str, model: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as caught:
        fit_weights(model or _model(), load_weights(source), source)
    message = str(caught.value)
    assert message.startswith(str(source).partition("#")[0])
    assert "\n" not in message
    return message


# --- where weights lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*NESTED, *AVERAGES])
def test_weights_lie_under_a_known_key(file: Path, key: str) -> None:
    model = _model()
    beside = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "args": argparse.Namespace(lr=0.1)}
    _loads(file, {key: model.state_dict(), **beside}, model)


def test_weights_lie_at_the_top_or_deep(file: Path) -> None:
    model = _model()
    _loads(file, model.state_dict(), model)
    _loads(file, {"state_dict": {"model": OrderedDict(model.state_dict())}}, model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_are_taken_off(file: Path, prefix: str) -> None:
    model = _model()
    _loads(file, {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}}, model)


def test_a_prefix_of_some_names_is_no_wrapper(file: Path) -> None:
    state = _model().state_dict()
    state["module.0.weight"] = state.pop("0.weight")
    torch.save(state, file)
    assert "1 missing (0.weight); 1 unknown (module.0.weight)" in _refused(file)


def test_torchs_averaged_model(file: Path) -> None:
    model = _model()
    _loads(file, {"state_dict": AveragedModel(model).state_dict()}, model)


def test_a_model_whose_own_names_begin_like_a_wrappers(file: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = _model()

    own, model = Outer(), Outer()
    for state in (own.state_dict(), own.module.state_dict(), nn.DataParallel(own).state_dict()):
        torch.save({"model": state}, file)
        fit_weights(model, load_weights(file), file)
        assert torch.equal(model.module[0].weight, own.module[0].weight)
        nn.init.zeros_(model.module[0].weight)


def test_averages_are_read_where_there_is_nothing_else_and_by_name(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, average = _model(), _model()
    state = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    _loads(file, state, model)
    assert "averages under 'state_dict_ema' are not read" in caplog.text
    fit_weights(model, load_weights(f"{file}#state_dict_ema"), file)
    assert torch.equal(model[0].weight, average[0].weight)
    _loads(file, {"state_dict": None, "model_ema": average.state_dict()}, average)


def test_several_weights_are_an_error_that_lists_them(file: Path) -> None:
    one, other = _model(), _model()
    torch.save({"model": one.state_dict(), "student": other.state_dict(), "teacher": one.state_dict()}, file)
    message = _refused(file)
    assert f"under 'model' and 'student'; name {file}#model or {file}#student" in message
    model = _model()
    for key, wanted in (("student", other), ("teacher", one)):
        fit_weights(model, load_weights(f"{file}#{key}"), file)
        assert torch.equal(model[0].weight, wanted[0].weight)
    assert "no weights under 'techer' (did you mean 'teacher'?)" in _refused(f"{file}#techer")


def test_a_file_whose_name_has_the_mark(tmp_path: Path) -> None:
    model = _model()
    _loads(tmp_path / "run#3.pt", model.state_dict(), model)


# --- what is refused ------------------------------------------------------------------------------------------


def test_999_classes_are_named(file: Path) -> None:
    torch.save(timm_model("test_vit", num_classes=999).state_dict(), file)
    message = _refused(file, timm_model("test_vit"))
    assert "2 of another shape (head.weight (999, 64) for (1000, 64), head.bias (999,) for (1000,))" in message


def test_other_models_are_counted_and_the_first_names_given(file: Path) -> None:
    torch.save(_model().state_dict(), file)
    message = _refused(file, nn.Linear(3, 4))
    assert message.endswith(
        "does not fit Linear: 2 missing (weight, bias); 9 unknown (0.weight, 0.bias, 1.weight, ...)"
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "holds no weights"),
        ({"model": {"epoch": 3}}, "holds no weights"),
        ({"model": {0: torch.ones(1)}}, "holds no weights"),
        ([torch.ones(1)], "holds a list"),
        ({"model": {}}, "9 missing (0.weight, 0.bias, 1.weight, ...)"),
    ],
)
def test_what_holds_no_weights(file: Path, state: Any, message: str) -> None:
    torch.save(state, file)
    assert message in _refused(file)


def test_what_would_have_to_be_executed_is_named(file: Path) -> None:
    torch.save({"model": _model().state_dict(), "best": np.float64(0.5), "path": Path("x")}, file)
    message = _refused(file)
    assert "it holds " in message
    assert "multiarray.scalar" in message
    assert "only tensors and plain values are read" in message


# --- the method's reference release ---------------------------------------------------------------------------


def _release() -> dict[str, Any]:
    """As the reference's training saves it, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    student = {name: torch.randn(shape, generator=generator) for name, shape in RELEASE["student_keys"]}
    return {
        **dict.fromkeys(RELEASE["top_level_keys"], 1.0),
        "student": OrderedDict(student),
        "student_ema": None,
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]},
        "scaler": {"scale": 65536.0},
    }


def test_a_release_loads_into_the_bare_student(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = _release()
    torch.save(release, file)
    model = timm_model("deit_tiny_distilled_conv_patch16_224", checkpoint=str(file))
    own = model.state_dict()
    given = release["student"]
    assert len(given) == len(own) + len(RELEASE["projector_keys"])
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, given[f"module.{name}"].to(tensor.dtype), rtol=0, atol=0)
    (record,) = (r for r in caplog.records if "left out" in r.message)
    assert record.levelno == logging.WARNING
    assert "left out 2 tensors of a projector" in record.message
    assert "projector.parametrizations.weight.original, projector.parametrizations.weight.0.base" in record.message


def test_a_projector_of_the_models_own_is_not_left_out(file: Path) -> None:
    model = nn.ModuleDict({"projector": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    state = model.state_dict() | {"projector.scale": torch.ones(1)}
    torch.save(state, file)
    assert "1 unknown (projector.scale)" in _refused(file, model)


def _projector(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.orthogonal_(layer.weight)
    parametrizations.orthogonal(layer)
    return layer


def _state(layer: nn.Module, name: str = "projector") -> dict[str, Any]:
    return {"student": {f"module.{name}.{key}": value for key, value in layer.state_dict().items()}}


@pytest.mark.parametrize("sizes", [(6, 20), (8, 8), (20, 6)])
def test_a_projector_is_the_matrix_that_torch_applies(file: Path, sizes: tuple[int, int]) -> None:
    layer = _projector(*sizes)
    if sizes == (8, 8):  # the exponential leaves its base in training
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(0.3 * torch.randn(sizes))
    torch.save(_state(layer), file)
    matrix = import_projector(read_checkpoint(file), source=str(file))
    torch.testing.assert_close(matrix, layer.weight.detach(), rtol=0, atol=0)
    projector = OrthogonalProjector(*sizes)
    projector.weight = matrix
    x = torch.randn(5, sizes[0])
    torch.testing.assert_close(projector(x), layer(x))


def test_a_released_projector_is_the_zero_matrix_after_a_step_with_weight_decay(file: Path) -> None:
    """What the reference's recipe does (torch truncates the diagonal of the raw parameter)."""
    layer = _projector(6, 20)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-4, weight_decay=0.05)
    layer(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert not layer.weight.any()
    torch.save(_state(layer), file)
    with pytest.raises(UserError, match=rf"^{file}: projector 'projector' is the zero matrix, there is nothing"):
        import_projector(read_checkpoint(file), source=str(file))


def test_a_projector_that_is_not_orthonormal() -> None:
    layer = _projector(6, 20)
    with torch.no_grad():
        layer.parametrizations.weight.original[2, 2] = 0.9
    with pytest.raises(UserError, match=r"not orthonormal: .* is 1\.0e\+00 \(1 of 6 columns are zero\)"):
        import_projector(_state(layer))


def test_several_projectors_are_told_apart_by_name() -> None:
    one, other = _projector(4, 4), _projector(5, 5)
    student = _state(one, "patch_projector_1.projector")["student"] | _state(other, "body.projector")["student"]
    with pytest.raises(UserError, match=r"several projectors: give one of patch_projector_1\.projector, body\.proj"):
        import_projector({"student": student})
    assert torch.equal(import_projector({"student": student}, "body.projector"), other.weight)
    with pytest.raises(UserError, match=r"no projector 'body.projectr' \(did you mean 'body\.projector'\?\)"):
        import_projector({"student": student}, "body.projectr")


def test_no_projector() -> None:
    with pytest.raises(UserError, match="holds no projector"):
        import_projector(_model().state_dict())


# --- other releases, and where they are read --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_timm_release(tmp_path: Path, suffix: str) -> None:
    own, path = timm_model("test_vit"), tmp_path / f"model{suffix}"
    save_file(own.state_dict(), path) if suffix == ".safetensors" else torch.save(own.state_dict(), path)
    model = timm_model("test_vit", checkpoint=str(path))
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), model.state_dict().values(), strict=True))


def test_run_pys_own_averages(file: Path) -> None:
    """``ema`` in ``last.pt`` is the state of an AveragedModel."""
    model, ema = _model(), StudentEMA(_model(), 0.9)
    torch.save({"model": model.state_dict(), "ema": ema.averaged.state_dict(), "projectors": {}}, file)
    other = _model()
    for source, wanted in ((str(file), model), (f"{file}#ema", ema.model)):
        fit_weights(other, load_weights(source), source)
        _equal(other, wanted)


def _equal(one: nn.Module, other: nn.Module) -> None:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_release_is_tested_by_run_py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``-test_only`` with a release as ``dst_ckpt``; as ``src_ckpt`` one that does not fit is an error of one line."""
    monkeypatch.chdir(ROOT)
    good, bad = tmp_path / "release.pth", tmp_path / "999.pth"
    student = {f"module.{name}": tensor for name, tensor in digits_vit().state_dict().items()}
    torch.save({"student": student | _state(_projector(4, 8))["student"], "args": argparse.Namespace()}, good)
    torch.save({"model": digits_vit(num_classes=999).state_dict()}, bad)
    config = ["--config", "configs/digits/ce/vit.yaml", "--output", str(tmp_path / "run"), "--device", "cpu"]
    key = "models.model."
    try:
        assert main([*config, "-test_only", "--set", f"{key}dst_ckpt={good}"]) == 0
    finally:
        setup_logging(is_main=True)
    said = capfd.readouterr().err
    assert f"{good}: left out 2 tensors of a projector" in said
    assert "test student: top1" in said
    assert main([*config, "-test_only", "--set", f"{key}dst_ckpt={good}", "--set", f"{key}src_ckpt={bad}"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{bad}: does not fit VisionTransformer: 2 of another shape (head.weight (999, 48) for (10, 48)" in line


def test_a_key_in_src_ckpt_and_dst_ckpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two weights side by side, of which the experiment names one."""
    monkeypatch.chdir(ROOT)
    two = tmp_path / "two.pth"
    torch.save({"model": digits_vit(num_classes=999).state_dict(), "student": digits_vit().state_dict()}, two)
    config, key = "configs/digits/ce/vit.yaml", "models.model."
    for source, status in ((f"{two}#student", 0), (f"{two}#model", 2), (two, 2)):
        assert main(["check", config, "--set", f"{key}src_ckpt={source}"]) == status
    assert f"src_ckpt: {two}: holds weights under 'model' and 'student'" in capfd.readouterr().err
    assert main(["check", config, "--set", f"{key}src_ckpt={tmp_path / 'none.pth'}#student"]) == 2
    assert f"no checkpoint at '{tmp_path}/none.pth#student'" in capfd.readouterr().err
    test = ["--config", config, "--output", str(tmp_path / "run"), "--device", "cpu", "-test_only"]
    try:
        assert main([*test, "--set", f"{key}dst_ckpt={two}#student"]) == 0
    finally:
        setup_logging(is_main=True)
    assert "test student: top1" in capfd.readouterr().err
