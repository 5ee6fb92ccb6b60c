"""timm's models in an experiment: by name, with weights from a file, on images that another model's are."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchdistill.models.registry import get_model

from vkd_plugin.check import examine
from vkd_plugin.errors import UserError
from vkd_plugin.models import timm_model
from vkd_plugin.models.renormalization import Statistics, renormalize_inputs
from vkd_plugin.teacher import state_digest

ROOT = Path(__file__).parents[1]
IMAGENET = Path(__file__).parent / "data" / "check" / "imagenet.yaml"
DATA = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ViT = "test_vit"  # timm's smallest; means and standard deviations are 0.5


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)


def saved(weights: dict[str, torch.Tensor], folder: Path, kind: str) -> Path:
    path = folder / f"weights{kind}"
    if kind == ".safetensors":
        save_file(weights, path)
    else:  # .pth as DeiT's releases are
        torch.save({"model": weights} if kind == ".pth" else weights, path)
    return path


def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def normalized(images: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


# Weights.


@pytest.mark.parametrize("kind", [".pt", ".pth", ".safetensors"])
@pytest.mark.usefixtures("no_network")
def test_a_local_file(tmp_path: Path, kind: str) -> None:
    source = timm.create_model(ViT, num_classes=3)
    path = saved(source.state_dict(), tmp_path, kind)
    model = get_model("timm_model", name="test_vit.r160_in1k", checkpoint=str(path), num_classes=3)
    assert state_digest(model) == state_digest(source)


def test_a_file_for_other_classes_does_not_fit(tmp_path: Path) -> None:
    path = saved(timm.create_model(ViT).state_dict(), tmp_path, ".pth")
    with pytest.raises(UserError, match=r"2 of another shape \(head.weight \(1000, 64\) for \(999, 64\)") as caught:
        timm_model(ViT, checkpoint=str(path), num_classes=999)
    assert "\n" not in str(caught.value)


def test_a_new_classifier_in_place_of_a_files(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    path = saved(source.state_dict(), tmp_path, ".pth")
    model = timm_model("test_resnet", checkpoint=str(path), new_classifier=True, num_classes=7)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, source.state_dict()[name])]
    assert changed == ["fc.weight", "fc.bias"]
    assert model.num_classes == 7


def downloads(monkeypatch: pytest.MonkeyPatch, name: str) -> nn.Module:
    """Weights that timm gets in place of what it would download."""
    source = timm.create_model(name)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(source.state_dict()))
    return source


def test_pretrained_for_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = downloads(monkeypatch, ViT)
    assert state_digest(timm_model(ViT, pretrained=True)) == state_digest(source)
    with pytest.raises(UserError, match=r"for 1000 classes, and num_classes is 999 \(new_classifier: True"):
        timm_model(ViT, pretrained=True, num_classes=999)
    for classes in (7, 1000):
        model = timm_model(ViT, pretrained=True, num_classes=classes, new_classifier=True)
        assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert model.head.weight.shape[0] == classes
        assert not torch.equal(model.head.weight, source.head.weight[:classes])
    features = timm_model(ViT, pretrained=True, num_classes=0)
    assert features(pixels()).shape == (4, 64)


def test_a_download_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        timm_model("regnety_160.deit_in1k", pretrained=True, cache_dir=str(tmp_path))
    message = str(caught.value)
    assert message.startswith("timm_model regnety_160.deit_in1k: no pretrained weights: ")
    assert "see https://huggingface.co/timm/regnety_160.deit_in1k and name a downloaded file as checkpoint" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"hf-hub:timm/no: no pretrained weights: .*name a downloaded file"):
        timm_model("hf-hub:timm/no", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"checkpoint_path": "x.pth"}, "checkpoint_path is not taken: name a file of weights as checkpoint"),
        ({"pretrained_cfg": {"file": "x.pth"}}, "pretrained_cfg is not taken"),
        ({"pretrained_cfg_overlay": {"file": "x.pth"}}, "pretrained_cfg_overlay is not taken"),
        ({"pretrained": True, "checkpoint": "x.pth"}, "either pretrained or checkpoint"),
        ({"new_classifier": True}, "new_classifier goes with"),
        ({"checkpoint": "missing.pth"}, "missing.pth: no such checkpoint"),
    ],
)
def test_arguments_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_model(ViT, **kwargs)


def test_models_without_published_weights() -> None:
    with pytest.raises(UserError, match="no weights for deit_tiny_distilled_conv_patch16_224: name a file"):
        timm_model("deit_tiny_distilled_conv_patch16_224", pretrained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_classes=999", "its weights are for 1000 classes, and num_classes is 999"),
        ("checkpoint_path=x.pth", "'checkpoint_path' is refused here"),
        ("renormalize=deit_tiny", "timm has no model 'deit_tiny'"),
        ("renormalize={mean: [1]}", "renormalize: expected {mean: [...], std: [...]}"),
    ],
)
def test_mistakes_in_an_experiment(change: str, message: str) -> None:
    teacher = "models.teacher_model.kwargs"
    facts = examine(IMAGENET, (f"{teacher}.name=test_vit.r160_in1k", f"{teacher}.{change}"))
    assert len(facts.problems) == 1
    assert message in str(facts.problems[0])


# Images normalised for another model.


@pytest.mark.parametrize("given", [DATA, "deit_tiny_distilled_conv_patch16_224", "regnety_160.deit_in1k"])
def test_the_model_sees_what_it_was_trained_with(given: Any) -> None:
    plain = timm_model(ViT).eval()
    model = timm_model(ViT, renormalize=given).eval()
    model.load_state_dict(plain.state_dict())
    assert plain.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    images = normalized(pixels(), **DATA)
    expected = plain(normalized(pixels(), [0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert (plain(images) - expected).abs().max() > 1e-3
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [path for path, _ in model.named_modules()] == [path for path, _ in plain.named_modules()]


def test_nothing_is_done_where_statistics_are_the_same() -> None:
    model = timm_model(ViT, renormalize={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    assert len(model._forward_pre_hooks) == 0
    assert dict(model.named_buffers()) == {}
    assert len(timm_model(ViT, renormalize="test_vit2")._forward_pre_hooks) == 0


class Doubled(nn.Module):
    """Puts out twice its input; x as images."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.fixture
def renormalized() -> Doubled:
    model = Doubled()
    renormalize_inputs(model, Statistics((0.5, 0.25), (0.25, 0.5)), Statistics((0.25, 0.5), (0.5, 0.25)))
    return model


X = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(2, 2, 1, 3)
# Pixels are 0.25, 0.5, 0.75 and -0.25, 0.25, 0.75.
EXPECTED = 2 * torch.tensor([[0.0, 0.5, 1.0], [-3.0, -1.0, 1.0]]).view(1, 2, 1, 3).expand(2, 2, 1, 3)


def test_the_formula(renormalized: Doubled) -> None:
    assert torch.equal(renormalized(X), EXPECTED)
    assert renormalized(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(renormalized.double()(X.double()), EXPECTED.double())
    assert torch.equal(renormalized.bfloat16()(X.bfloat16()), EXPECTED.bfloat16())
    x = X.to(memory_format=torch.channels_last)
    assert renormalized.float()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", ["deepcopy", "save", "state_dict", "compile", "data parallel"])
def test_it_goes_where_the_model_goes(renormalized: Doubled, way: str, tmp_path: Path) -> None:
    model: nn.Module = renormalized
    if way == "deepcopy":
        model = copy.deepcopy(renormalized)
        renormalized.get_buffer("_input_scale").zero_()
    elif way == "save":
        torch.save(renormalized, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    elif way == "state_dict":
        model.load_state_dict({"factor": torch.tensor(2.0)}, strict=True)
    elif way == "compile":
        model = torch.compile(renormalized, backend="eager", fullgraph=True)
    else:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            model = DistributedDataParallel(renormalized)
            assert torch.equal(model(X), EXPECTED)
        finally:
            dist.destroy_process_group()
        return
    assert torch.equal(model(X), EXPECTED)
    assert [name for name, _ in renormalized.named_parameters()] == ["factor"]
    assert list(renormalized.state_dict()) == ["factor"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("deit_tyni_patch16_224", "no model 'deit_tyni_patch16_224' .did you mean 'deit_tiny_patch16_224'"),
        ("regnety_160.nothing", "no weights 'nothing' for regnety_160"),
        ([0.5, 0.5], "renormalize: expected {mean"),
        ({"mean": [0.5] * 3}, "renormalize: expected {mean"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "eps": 0}, "renormalize: expected {mean"),
        ({"mean": [0.5] * 3, "std": 0.5}, "renormalize: expected a list of numbers, one a channel, got 0.5"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, "0.5"]}, "expected a list of numbers"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5, 0.0]}, "std should be positive"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.5]}, "mean has 3 channels, std 2"),
        ({"mean": [0.5], "std": [0.25]}, "images have 1 channels, the model expects 3"),
    ],
)
def test_statistics_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_model(ViT, renormalize=given)


LITE0_HOOKS = (
    "train.teacher.forward_hook.output=['conv_head']",
    "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.teacher.module=conv_head",
)


def test_an_experiment_with_it() -> None:
    teacher = {"name": "test_resnet", "renormalize": "deit_tiny_distilled_patch16_224"}
    assert len(timm_model(**teacher)._forward_pre_hooks) == 1
    changes = (
        f"models.teacher_model.kwargs={json.dumps(teacher)}",
        "train.teacher.forward_hook.output=['layer4']",
        "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.teacher.module=layer4",
    )
    assert examine(IMAGENET, changes).problems == []


@pytest.mark.parametrize(
    ("kwargs", "warned"),
    [
        ({"name": "efficientnet_lite0.ra_in1k", "pretrained": True}, False),  # the statistics of the data
        ({"name": "tf_efficientnet_lite0.in1k", "pretrained": True}, True),
        ({"name": "tf_efficientnet_lite0.in1k", "checkpoint": "https://example.org/x.pt"}, True),
        ({"name": "tf_efficientnet_lite0.in1k", "pretrained": False}, False),  # its weights come from elsewhere
        ({"name": "tf_efficientnet_lite0.in1k", "pretrained": True, "renormalize": "deit_tiny_patch16_224"}, False),
        ({"name": "tf_efficientnet_lite0.in1k", "pretrained": True, "renormalize": "vit_tiny_patch16_224"}, True),
    ],
)
def test_images_normalised_for_another_model_are_warned_of(kwargs: dict[str, Any], warned: bool) -> None:
    recipe = ROOT / "configs/ilsvrc2012/vkd/deit_tiny_from_regnety_160.yaml"
    facts = examine(recipe, (f"models.teacher_model.kwargs={json.dumps(kwargs)}", *LITE0_HOOKS))
    assert facts.problems == []
    warnings = [warning for warning in facts.warnings if "nothing is at" not in warning]
    assert len(warnings) == warned, warnings
    for warning in warnings:
        assert "--set models.teacher_model.kwargs" in warning
        assert "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225], it takes [0.5, 0.5, 0.5]" in warning
