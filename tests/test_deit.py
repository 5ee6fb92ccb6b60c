"""The DeiT students with a convolutional stem, held against the method's reference code.

What the reference's DeiT-Ti puts out is held against here, its whole training step in ``test_imagenet_evidence.py``.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from parity_helper import RECORDED, TINY, assert_recorded, filled, images, made
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn
from torchdistill.models.registry import get_model

from vkd_plugin.check import examine
from vkd_plugin.models.deit import ConvStem, ConvStemDeiT

IMAGENET = Path(__file__).parent / "data" / "check" / "imagenet.yaml"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


def small(**kwargs: Any) -> ConvStemDeiT:
    """One narrow block for small images: what does not depend on size is tested on it."""
    sizes = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 1, "num_classes": 5}
    return timm.create_model(TINY, **{**sizes, **kwargs})


def small_images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return made("small image", (2, 3, 64, 64), scale=1.7).to(dtype)


# The reference's numbers.


def test_names_and_shapes_are_the_releases() -> None:
    model = timm.create_model(TINY, device="meta")
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == RECORDED["state_dict"]
    assert [name for name, _ in model.named_buffers()] == RECORDED["buffers"]
    for child, count in RECORDED["n_parameters_by_child"].items():
        parameters = [value for name, value in model.named_parameters() if name.partition(".")[0] == child]
        assert sum(value.numel() for value in parameters) == count


@pytest.mark.parametrize(("size", "count"), [("tiny", RECORDED["n_parameters"]), ("small", 23_797_520)])
def test_number_of_parameters(size: str, count: int) -> None:
    model = timm.create_model(f"deit_{size}_distilled_conv_patch16_224", device="meta")
    assert sum(value.numel() for value in model.parameters()) == count


@pytest.mark.parametrize("precision", DTYPES)
@torch.no_grad()
def test_what_the_reference_puts_out(precision: str) -> None:
    recorded, tolerance = RECORDED[precision], TOLERANCES[precision]
    x = images(DTYPES[precision])
    seen: dict[str, torch.Tensor] = {}

    def record(model: ConvStemDeiT, path: str, name: str) -> None:
        def keep(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            seen[name] = output

        model.get_submodule(path).register_forward_hook(keep)

    model = filled(DTYPES[precision]).eval()
    for path, name in {"conv_embed": "conv_embed", "blocks.0": "block0", "blocks.11": "block11"}.items():
        record(model, path, name)
    for path, name in {"norm": "tokens", "head": "cls_head", "head_dist": "dist_head"}.items():
        record(model, path, name)

    logits = model(x)
    assert_recorded("eval_logits", logits, recorded["eval_logits"], tolerance)
    assert logits.argmax(dim=1).tolist() == recorded["eval_logits"]["argmax"]
    for name, expected in recorded["eval_intermediate"].items():
        assert_recorded(f"eval_{name}", seen[name], expected, tolerance)
    assert torch.equal(seen["tokens"], model.forward_features(x))
    for mode in ("eval", "train"):
        if mode == "train":
            heads = model.train()(x)
            assert torch.equal(heads[0], seen["cls_head"])
            assert torch.equal(heads[1], seen["dist_head"])
        parts = {"cls": seen["tokens"][:, 0], "dist": seen["tokens"][:, 1], "patch": seen["tokens"][:, 2:]}
        for name, expected in recorded[f"{mode}_forward_features"].items():
            assert_recorded(f"{mode}_{name}", parts[name], expected, tolerance)
        for head in ("cls_head", "dist_head"):
            assert_recorded(f"{mode}_{head}", seen[head], recorded[f"{mode}_{head}"], tolerance)
    state = model.state_dict()
    for name, expected in recorded["train_running_stats_after_1_forward"].items():
        assert_recorded(name, state[name], expected, tolerance)


# Initial weights.


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model(TINY, depth=2)
    model_again = copy.deepcopy(model)
    torch.manual_seed(1)
    model_again.init_weights()
    for state in (model.state_dict(), model_again.state_dict()):
        for name, fan_in in {"conv.0": 147, "conv.3": 576, "conv.6": 576, "proj": 4096}.items():
            weight = state[f"conv_embed.{name}.weight"]
            assert weight.mean().abs() < 0.05 * weight.std()
            assert weight.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.04)
            assert weight.abs().max() > 3.2 * weight.std()  # normal: neither uniform nor cut off
        bias = state["conv_embed.proj.bias"]
        assert bias.abs().max() <= 1 / 64
        assert bias.std() == pytest.approx(1 / 64 / 3**0.5, rel=0.15)
        matrices = [name for name in state if name.endswith("weight") and state[name].dim() == 2]
        assert {"head.weight", "head_dist.weight", "blocks.1.mlp.fc1.weight"} < set(matrices)
        for name in ("pos_embed", *matrices):
            assert state[name].std() == pytest.approx(0.02, rel=0.03), name
        assert state["cls_token"].std() == pytest.approx(1e-6, rel=0.25)
        for name in (name for name in state if name.endswith("bias") and name != "conv_embed.proj.bias"):
            assert state[name].count_nonzero() == 0, name
    assert not torch.equal(model.head.weight, model_again.head.weight)


# What timm and torchdistill ask of a model.


def test_both_registries_have_it() -> None:
    for size in ("tiny", "small", "base"):
        assert timm.is_model(f"deit_{size}_distilled_conv_patch16_224")
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    for model in (get_model(TINY, **kwargs), get_model("timm_model", name=TINY, **kwargs)):
        assert type(model) is ConvStemDeiT
        assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
        assert model.pretrained_cfg["std"] == (0.229, 0.224, 0.225)
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)
        for name in (*model.pretrained_cfg["classifier"], model.pretrained_cfg["first_conv"]):
            assert isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)
    assert timm.create_model("deit_base_distilled_conv_patch16_224", device="meta").embed_dim == 768
    assert timm.create_model("deit_base_distilled_conv_patch16_224", device="meta").blocks[0].attn.head_dim == 64


def test_both_heads_learn_in_training_and_their_mean_is_the_answer() -> None:
    model = small()
    x = small_images()
    both = model.train()(x)
    assert [head.shape for head in both] == [(2, 5), (2, 5)]
    sum(F.cross_entropy(head, torch.tensor([0, 3])) for head in both).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())
    for one in (model.eval(), small(distilled_training=False).train()):
        tokens = one.forward_features(x)
        mean = (one.head(tokens[:, 0]) + one.head_dist(tokens[:, 1])) / 2
        torch.testing.assert_close(one(x), mean)
    model.set_distilled_training(False)
    assert model.train()(x).shape == (2, 5)


def test_the_second_token_is_the_mean_of_the_stem() -> None:
    model = small().eval()
    seen: list[torch.Tensor] = []
    model.blocks.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = small_images()
    model(x)
    stem = model.conv_embed(x)
    torch.testing.assert_close(seen[0][:, 1], stem.mean(dim=1) + model.pos_embed[:, 1])
    torch.testing.assert_close(seen[0][:, 2:], stem + model.pos_embed[:, 2:])
    torch.testing.assert_close(seen[0][:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1))


def test_other_classes() -> None:
    model = small().train()
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert [head.shape for head in model(small_images())] == [(2, 7), (2, 7)]
    model.reset_classifier(0)
    assert model.eval()(small_images()).shape == (2, 32)
    with pytest.raises(ValueError, match="not 'avg'"):
        model.reset_classifier(7, "avg")


@pytest.mark.parametrize(("size", "tokens"), [(64, 16), ((96, 64), 24)])
def test_other_sizes(size: Any, tokens: int) -> None:
    model = small(img_size=size).eval()
    assert model.pos_embed.shape == (1, 2 + tokens, 32)
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    assert model(x).shape == (2, 5)
    resized = small(img_size=32).eval()
    resized.set_input_size(size)
    assert resized.pos_embed.shape == (1, 2 + tokens, 32)
    assert resized(x).shape == (2, 5)
    with pytest.raises(ValueError, match="images of 32 x 32 pixels"):
        model(torch.randn(2, 3, 32, 32))


def test_sizes_that_cannot_be() -> None:
    for size in (230, (224, 8), 0):
        with pytest.raises(ValueError, match="multiple of 16"):
            small(img_size=size)
    with pytest.raises(ValueError, match="multiple of 16"):
        small().set_input_size(100)
    with pytest.raises(ValueError, match="16 x 16 pixels, not 14"):
        small().set_input_size(patch_size=14)
    with pytest.raises(TypeError, match="num_class"):
        small(num_class=3)


def test_weights_of_another_task_begin_a_new_one(tmp_path: Path) -> None:
    source = small(img_size=224, num_classes=1000)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, img_size=64)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    summed = source.conv_embed.conv[0].weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.conv_embed.conv[0].weight, summed)
    assert torch.equal(model.pos_embed[:, :2], source.pos_embed[:, :2])
    assert model(torch.randn(2, 1, 64, 64))[1].shape == (2, 7)


def test_what_timm_reads() -> None:
    model = small(depth=2)
    assert model.num_prefix_tokens == 2
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    groups = group_parameters(model, model.group_matcher())
    assert set(groups[0]) == {name for name, _ in model.named_parameters() if name.split(".")[0] in STEM}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    features = small(depth=2, features_only=True, out_indices=[0, 1])
    x = small_images()
    assert [output.shape for output in features(x)] == [(2, 32, 4, 4)] * 2
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)


STEM = ("cls_token", "pos_embed", "conv_embed")


def test_no_dropout_unless_asked_for() -> None:
    model = small()
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4}
    model = small(depth=2, drop_path_rate=0.5, **rates)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    assert (model.blocks[0].attn.proj_drop.p, model.blocks[0].attn.attn_drop.p) == (0.3, 0.4)
    assert model.blocks[1].drop_path1.drop_prob == 0.5


# What changes speed changes no output.


def test_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    small(depth=2)(small_images())
    assert len(calls) == 2


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Both heads in training, the answer, and all gradients."""
    both = model.train()(x)
    sum(head.square().sum() for head in both).backward()
    gradients = [value.grad for value in model.parameters()]
    with torch.no_grad():
        return [*both, model.eval()(x), *gradients]


@pytest.mark.parametrize("variant", ["channels_last", "checkpointing", "compile"])
def test_equal_outputs_and_gradients(variant: str) -> None:
    model = small().double()
    changed: Any = copy.deepcopy(model)
    x = small_images(torch.float64)
    expected = outputs(model, x)
    if variant == "channels_last":
        changed = changed.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    elif variant == "checkpointing":
        changed.set_grad_checkpointing()
    else:
        changed = torch.compile(changed, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(changed, x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_inductor() -> None:
    model = filled(torch.float32)
    compiled = torch.compile(copy.deepcopy(model))
    x = images(torch.float32)
    expected, found = outputs(model, x), outputs(compiled, x)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_the_stem_alone() -> None:
    stem = ConvStem(img_size=(32, 64), embed_dim=8)
    assert stem(torch.randn(2, 3, 32, 64)).shape == (2, 8, 8)


# In an experiment.

HEADS_OF_VIT = (
    "train.student.forward_hook.output=['model.head', 'features.tokens']",
    "train.criterion.kwargs.sub_terms.kl.criterion_wrapper.kwargs.student.module=model.head",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (f"models.student_model.kwargs.name={TINY}",),
        (f"models.student_model.key={TINY}", "models.student_model.kwargs={}"),
        ("models.student_model.kwargs.name=deit_tiny_distilled_patch16_224",),
        ("models.student_model.kwargs.name=vit_tiny_patch16_224", *HEADS_OF_VIT),
    ],
    ids=["by name", "by key", "timm's DeiT", "timm's ViT"],
)
def test_an_experiment_takes_it_by_name(overrides: tuple[str, ...]) -> None:
    facts = examine(IMAGENET, overrides)
    assert facts.problems == []
    (stage,) = facts.stages
    shapes = {(feature.side, feature.path): feature.shape for feature in stage.features}
    assert shapes["student", "features.tokens"] == [512, 3024]
    assert shapes["student", "model.head"] == [512, 1000]
    assert all(term.has_gradient for term in stage.terms)
