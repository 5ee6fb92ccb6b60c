"""ViDT as a detector like torchvision's: losses in training, detections in evaluation, whatever the images' sizes."""

import argparse
import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchdistill.models.registry import get_model
from vidt_helper import CLASSES, QUERIES, STAGES, random_images, small_body, small_vidt, target

from vkd_plugin.check.fake import NEEDS_CONTENTS
from vkd_plugin.decay import no_matrices
from vkd_plugin.errors import UserError
from vkd_plugin.models.vidt.attention import shift_mask
from vkd_plugin.models.vidt.backbone_weights import start_from
from vkd_plugin.models.vidt.padding import pad_images, resize_mask, valid_ratio
from vkd_plugin.models.vidt.positions import sine_positions
from vkd_plugin.models.weights import fit_weights, load_weights

TARGETS = [target([[2, 3, 20, 30], [10, 10, 40, 25]], [1, 4]), target([], [])]
SIZES = ((40, 52), (33, 47))
LOSSES = {f"loss_{kind}{ending}" for kind in ("ce", "bbox", "giou") for ending in ("", "_0", "_1")}


# The interface.


def test_losses_in_training() -> None:
    model = small_vidt().train()
    losses = model(random_images(*SIZES), TARGETS)
    assert set(losses) == LOSSES
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.grad.count_nonzero(), name
    with pytest.raises(UserError, match="targets in training"):
        model(random_images(*SIZES))


@torch.no_grad()
def test_detections_in_evaluation() -> None:
    model = small_vidt().eval()
    images = random_images(*SIZES)
    found = model(images, TARGETS)
    outputs = model.raw_outputs(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2
    for one, (height, width), boxes in zip(found, SIZES, outputs["pred_boxes"], strict=True):
        assert one["boxes"].shape == (QUERIES * CLASSES, 4)
        assert one["labels"].dtype == torch.int64
        assert set(one["labels"].tolist()) == set(range(CLASSES))
        assert (one["scores"].diff() <= 0).all()
        sides = one["boxes"][:, 2:] - one["boxes"][:, :2]  # in pixels of each image, not of the batch
        fractions = (sides / torch.tensor([width, height])).sort(dim=0).values
        torch.testing.assert_close(fractions, boxes[:, 2:].repeat(CLASSES, 1).sort(dim=0).values)


@torch.no_grad()
def test_a_batch_is_a_list_of_images() -> None:
    model = small_vidt().eval()
    images = random_images((40, 52), (40, 52))
    torch.testing.assert_close(model(torch.stack(images)), model(images), rtol=0, atol=0)


@torch.no_grad()
def test_predictions_of_every_stage() -> None:
    model = small_vidt().eval()
    outputs = model.raw_outputs(random_images(*SIZES))
    stages = [*outputs["aux_outputs"], {name: outputs[name] for name in ("pred_logits", "pred_boxes")}]
    assert len(stages) == STAGES
    for stage in stages:
        assert stage["pred_logits"].shape == (2, QUERIES, CLASSES)
        assert stage["pred_boxes"].shape == (2, QUERIES, 4)
        assert ((stage["pred_boxes"] > 0) & (stage["pred_boxes"] < 1)).all()
    assert not torch.equal(stages[0]["pred_boxes"], stages[1]["pred_boxes"])


@torch.no_grad()
def test_a_new_model_finds_hardly_anything() -> None:
    """Every class is as rare as the focal loss wants it, every box as large as sigmoid(-2) of the image."""
    model = get_model("vidt_swin_nano", decoder_layers=1, num_queries=5).eval()
    outputs = model.raw_outputs(random_images((64, 64)))
    assert outputs["pred_logits"].sigmoid().median().item() == pytest.approx(0.01, rel=0.5)
    sides = torch.tensor(-2.0).sigmoid().expand(1, 5, 2)
    for stage in (outputs, outputs["aux_outputs"][0]):
        torch.testing.assert_close(stage["pred_boxes"][..., 2:], sides)


def test_dropout_and_stochastic_depth() -> None:
    model = get_model("vidt_swin_tiny", decoder_layers=1, num_queries=5, dropout=0.3)
    drops = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.backbone.layers for block in stage.blocks]
    assert drops == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} >= {0.3}
    assert model.transformer.decoder.layers[0].self_attn.dropout == 0.3


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="num_class"):
        get_model("vidt_swin_nano", num_class=3)
    with pytest.raises(ValueError, match="no attention kernel 'cuda'"):
        get_model("vidt_swin_nano", attention_kernel="cuda")


# What is hooked.


@torch.no_grad()
def test_features_and_masks() -> None:
    model = small_vidt().eval()
    seen: dict[str, Tensor] = {}
    for name in (
        "body_tokens",
        "neck_tokens",
        *(f"patch_{kind}.{i}" for kind in ("tokens", "masks") for i in range(4)),
    ):
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out))
    model(random_images((64, 96), (40, 40)))
    assert seen["body_tokens"].shape == (2, QUERIES, 64)
    assert seen["neck_tokens"].shape == (2, STAGES * QUERIES, 64)
    assert torch.equal(seen["neck_tokens"][:, :QUERIES], seen["body_tokens"])
    for i, (height, width) in enumerate(((8, 12), (4, 6), (2, 3), (1, 2))):
        assert seen[f"patch_tokens.{i}"].shape == (2, 64, height, width)
        assert seen[f"patch_masks.{i}"].dtype == torch.bool
        assert not seen[f"patch_masks.{i}"][0].any()
    assert torch.equal(~seen["patch_masks.0"][1], (torch.arange(8)[:, None] < 5) & (torch.arange(12) < 5))
    assert {name.split(".")[0] for name in model.state_dict()}.isdisjoint(name.split(".")[0] for name in seen)


def test_what_weight_decay_leaves_alone() -> None:
    model = small_vidt()
    found = no_matrices(model)
    assert {id(model.backbone.det_token), id(model.backbone.det_pos_embed), id(model.tgt_proj[0].bias)} < found
    assert id(model.tgt_proj[0].weight) not in found


# Any size.


@pytest.mark.parametrize("sizes", [((1, 1),), ((3, 70),), ((29, 28),), ((64, 64), (1, 9)), ((225, 31), (30, 200))])
def test_sizes(sizes: tuple[tuple[int, int], ...]) -> None:
    model = small_vidt().train()
    found = [target([[0, 0, width, height]], [2]) for height, width in sizes]
    losses = model(random_images(*sizes), found)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(one["boxes"].isfinite().all() for one in model.eval()(random_images(*sizes)))


def test_no_objects_at_all_and_more_than_queries() -> None:
    model = small_vidt().train()
    losses = model(random_images(*SIZES), [target([], []), target([], [])])
    assert losses["loss_bbox"] == losses["loss_giou_0"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    many = target([[i, i, i + 5, i + 8] for i in range(QUERIES + 3)], [i % CLASSES for i in range(QUERIES + 3)])
    assert all(value.isfinite() for value in model(random_images((40, 40)), [many]).values())


def test_images_that_are_none() -> None:
    model = small_vidt().eval()
    for images, message in (
        ([], "without images"),
        ([torch.zeros(1, 8, 8)], r"image 0 of the batch is torch.float32 of shape \(1, 8, 8\)"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)], "image 1 of the batch is torch.uint8"),
        (torch.zeros(2, 3, 0, 8), "image 0"),
        (torch.zeros(3, 8, 8), r"shape \(8, 8\)"),
    ):
        with pytest.raises(UserError, match=message):
            model(images)


def test_padding() -> None:
    images = random_images((4, 6), (5, 3), dtype=torch.float64)
    batch, mask = pad_images(images)
    assert batch.shape == (2, 3, 5, 6)
    assert batch.dtype == torch.float64
    assert torch.equal(batch[0, :, :4], images[0])
    assert torch.equal(batch[1, :, :, :3], images[1])
    assert batch[mask[:, None].expand(-1, 3, -1, -1)].count_nonzero() == 0
    assert (~mask).sum(dim=(1, 2)).tolist() == [24, 15]
    torch.testing.assert_close(valid_ratio(mask), torch.tensor([[1.0, 0.8], [0.5, 1.0]]))
    assert resize_mask(mask, (1, 2)).tolist() == [[[False, False]], [[False, True]]]


def test_positions() -> None:
    mask = torch.ones(1, 4, 5, dtype=torch.bool)
    mask[0, :2, :4] = False
    found = sine_positions(mask, 8)[0]
    turn = 2 * torch.pi
    y, x = torch.tensor(turn / 2), torch.tensor(3 * turn / 4)  # the first of two rows, the third of four columns
    expected = [part for angle in (y, y / 100, x, x / 100) for part in (angle.sin(), angle.cos())]
    torch.testing.assert_close(found[0, 2], torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()


def test_shifted_windows_are_kept_apart() -> None:
    mask = shift_mask(4, 8, window=4, shift=2, device=torch.device("cpu"))
    assert mask.shape == (2, 16, 16)
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    for window, inner in enumerate((columns * 0, columns // 2)):  # only the last window of a row wraps around
        region = 2 * (rows // 2) + inner
        assert torch.equal(mask[window] == 0, region[:, None] == region)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}


# Precision, graphs, copies.


def test_autocast() -> None:
    model = small_vidt().train()
    images = random_images(*SIZES)
    expected = model(images, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.raw_outputs(images)
        losses = model(images, TARGETS)
    assert {outputs[name].dtype for name in ("pred_logits", "pred_boxes")} == {torch.float32}
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert {name: v.item() for name, v in losses.items()} == pytest.approx(
        {name: v.item() for name, v in expected.items()}, rel=0.05
    )
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_models_of_another_precision(dtype: torch.dtype) -> None:
    model = small_vidt().to(dtype).eval()
    outputs = model.raw_outputs(random_images(*SIZES, dtype=dtype))
    expected = small_vidt().eval().raw_outputs(random_images(*SIZES))
    torch.testing.assert_close(outputs["pred_boxes"].float(), expected["pred_boxes"], rtol=0, atol=0.05)
    assert outputs["pred_boxes"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph() -> None:
    model = small_vidt(small_body(depths=(1, 1, 1, 2)), decoder_layers=1).eval()
    images = torch.stack(random_images((40, 52), (40, 52)))
    compiled: Callable[..., Any] = torch.compile(model.raw_outputs, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model.raw_outputs(images))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = small_vidt()
    copied = copy.deepcopy(model)
    assert copied.bbox_embed[0] is copied.transformer.decoder.bbox_embed[0]
    assert copied.bbox_embed[0] is not model.bbox_embed[0]


def test_a_dry_step_asks_for_contents() -> None:
    """Without contents features have shapes, and matching says what it misses."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = small_vidt().train()
        images = [torch.zeros(3, 40, 52), torch.zeros(3, 33, 47)]
        assert model.raw_outputs(images)["pred_boxes"].shape == (2, QUERIES, 4)
        with pytest.raises(NEEDS_CONTENTS):
            model(images, [{"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.int64)}] * 2)


# Weights.


def timms_swin() -> SwinTransformer:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
    model = SwinTransformer(img_size=448, num_classes=11, **sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def microsofts_layout(model: SwinTransformer) -> dict[str, Any]:
    """As in the releases of 2021: merging behind its stage, masks and indices among the weights."""
    renamed = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    renamed |= {"head.weight": torch.zeros(11, 64), "head.bias": torch.zeros(11)}
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return {"model": renamed}


@pytest.mark.parametrize("layout", ["timm", "microsoft"])
@torch.no_grad()
def test_a_classifiers_weights_begin_the_body(layout: str, tmp_path: Path) -> None:
    classifier = timms_swin()
    file = str(tmp_path / "swin.pth")
    torch.save(classifier.state_dict() if layout == "timm" else microsofts_layout(classifier), file)
    body = small_body().eval()
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    start_from(body, file)

    (image,) = random_images((448, 448))
    maps, _, _ = body(image[None], torch.zeros(1, 448, 448, dtype=torch.bool))
    x = classifier.patch_embed(image[None])  # patches do not attend to detection tokens, so timm's is the same
    for number, stage in enumerate(classifier.layers):
        x = stage(x)
        if number:
            torch.testing.assert_close(maps[number - 1], x.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    for name in ("det_token", "det_pos_embed", "layers.3.downsample.reduction.weight", "layers.0.blocks.0.attn."):
        for own in (own for own in before if own == name or own == name + "relative_position_index"):
            assert torch.equal(before[own], body.state_dict()[own])


def test_a_classifier_that_does_not_fit(tmp_path: Path) -> None:
    file = str(tmp_path / "swin.pth")
    torch.save(timms_swin().state_dict(), file)
    with pytest.raises(UserError, match=r"swin.pth: does not fit SwinWithDetTokens: .* of another shape"):
        get_model("vidt_swin_nano", num_queries=5, decoder_layers=1, backbone_checkpoint=file)
    torch.save({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"missing .* 1 unknown \(conv1.weight\)"):
        start_from(small_body(), file)
    with pytest.raises(UserError, match="no such checkpoint"):
        start_from(small_body(), str(tmp_path / "none.pth"))


def test_releases_load_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the authors save them: names as here, the projectors among them, and their command line."""
    released = small_vidt(seed=1)
    state = {f"module.{name}": tensor for name, tensor in released.state_dict().items()}
    for name in ("patch_projector_1.weight", "neck_det_projector.projector.parametrizations.weight.original"):
        state[f"module.{name}"] = torch.zeros(64)
    file = str(tmp_path / "checkpoint.pth")
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, file)
    model = small_vidt(seed=2)
    with caplog.at_level(logging.WARNING, logger="vkd_plugin"):
        fit_weights(model, load_weights(file), file)
    assert "left out 2 tensors of a projector" in caplog.text
    torch.testing.assert_close(model.state_dict(), released.state_dict(), rtol=0, atol=0)
    assert model.bbox_embed[1] is model.transformer.decoder.bbox_embed[1]
    with pytest.raises(UserError, match="does not fit ViDT"):
        get_model("vidt_swin_nano", decoder_layers=1, checkpoint=file)
