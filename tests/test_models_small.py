"""The small models, and timm's by name with weights from local files."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchdistill.models.registry import get_model

from vkd_plugin.errors import UserError
from vkd_plugin.models import digits_cnn, digits_vit, load_weights, timm_model


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def outputs_of(model: torch.nn.Module, module: str, images: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _module, _args, output: kept.append(output))
    model(images)
    return kept[0]


@pytest.mark.parametrize("key", ["digits_cnn", "digits_vit"])
def test_every_parameter_learns(key):
    model = get_model(key, num_classes=7)
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_teacher_has_a_wide_last_feature_map(tmp_path):
    teacher = digits_cnn().eval()
    assert outputs_of(teacher, "final_conv", torch.randn(2, 1, 8, 8)).shape == (2, 128, 4, 4)
    assert 100e3 < size(teacher) < 200e3
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").stat().st_size < 1e6
    assert size(digits_cnn(width=16)) < size(teacher)


def test_student_has_tokens_and_no_convolution_beyond_its_patches():
    student = digits_vit().eval()
    assert outputs_of(student, "norm", torch.randn(2, 1, 8, 8)).shape == (2, 17, 48)
    assert size(student) < 250e3
    convolutions = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions == ["patch_embed.proj"]


def test_timm_model_by_name():
    model = get_model("timm_model", name="test_vit", num_classes=3)
    assert type(model) is type(timm.create_model("test_vit"))
    assert model.num_classes == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("regnety_16O", "timm has no model 'regnety_16O' .did you mean 'regnety_160'"),
        ("regnety_160.deit_in1", "no weights 'deit_in1' for regnety_160 .did you mean 'deit_in1k'"),
    ],
)
def test_unknown_names_are_met_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        timm_model(name)


def test_pretrained_without_a_network_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"^timm_model test_vit: .* not known \(without a network.*checkpoint\)$"):
        timm_model("test_vit", pretrained=True)


def test_pretrained_and_checkpoint_exclude_each_other():
    with pytest.raises(UserError, match="either pretrained or checkpoint"):
        timm_model("test_vit", pretrained=True, checkpoint="x.pt")


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_weights_round_trip(tmp_path, key):
    source = timm_model("test_vit", num_classes=3)
    state = source.state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state if key is None else {key: state, "epoch": 3}, path)
    model = timm_model("test_vit", checkpoint=str(path), num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(digits_vit().state_dict(), path)
    digits_vit().load_state_dict(load_weights(path))


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_load_weights_refuses_what_it_cannot_trust_or_read(tmp_path, capsys):
    with pytest.raises(UserError, match=r"missing\.pt: no such checkpoint"):
        load_weights(tmp_path / "missing.pt")
    for name in ("torn.pt", "torn.safetensors", "empty.pt"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no weights in here")
        with pytest.raises(UserError, match=f"{name}: not a readable checkpoint"):
            load_weights(tmp_path / name)
    torch.save({"model": Payload()}, tmp_path / "payload.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_weights(tmp_path / "payload.pt")
    assert "executed" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(tmp_path / "other.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = timm_model("test_vit", num_classes=3).state_dict()
    state["stranger"] = state.pop("cls_token")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError) as caught:
        timm_model("test_vit", checkpoint=str(tmp_path / "weights.pt"), num_classes=4)
    message = str(caught.value)
    assert "1 missing (cls_token)" in message
    assert "1 unknown (stranger)" in message
    assert "2 of another shape (head.weight (3, 64) for (4, 64), head.bias (3,) for (4,))" in message
