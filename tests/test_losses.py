"""Losses against closed forms and torchdistill's own, and what they say about features that do not fit."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.losses.mid_level import ATLoss, SRDLoss
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

import vkd_plugin.losses.registration  # noqa: F401 - makes the keys known to torchdistill
from vkd_plugin.errors import ConfigError
from vkd_plugin.losses import (
    DISTANCES,
    AttentionTransferLoss,
    FeaturePair,
    HardTeacherCrossEntropy,
    SoftTargetCrossEntropy,
    SoftTargetKLLoss,
    TokenMatchingLoss,
    VkDLoss,
)
from vkd_plugin.normalization import DEFAULT_EPS, normalize


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- distances and VkDLoss


def test_distances_by_hand() -> None:
    student = torch.tensor([[0.5, 3.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    expected = {
        "smooth_l1": (0.125 + 2.5 + 0 + 1.5) / 4,
        "mse": (0.25 + 9 + 0 + 4) / 4,
        "l1": (0.5 + 3 + 0 + 2) / 4,
        "cosine": 1 - (0 - 1) / 2,
        "log_sum": math.log(0.5**4 + 3**4 + 2**4),
    }
    assert set(expected) == set(DISTANCES)
    for name, value in expected.items():
        assert DISTANCES[name](student, teacher).item() == pytest.approx(value, rel=1e-12), name


def test_log_sum_is_the_feature_term_of_srd() -> None:
    student, teacher, logits = rand(5, 7), rand(5, 7, seed=1), rand(5, 3)
    srd = SRDLoss("norm", "output", "norm", "output", "fc", "output", "fc", "output", exponent=4.0, temperature=1.0)
    io_dicts = [{"norm": {"output": z}, "fc": {"output": logits}} for z in (student, teacher)]
    loss = VkDLoss("none", "log_sum", alpha=4.0)
    torch.testing.assert_close(2 * loss(student, teacher), srd(*io_dicts), rtol=1e-12, atol=1e-12)


def test_log_sum_without_a_difference_is_finite() -> None:
    student = rand(4, 3).requires_grad_()
    loss = VkDLoss("none", "log_sum")(student, student.detach())
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("normalize_student", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalization", DEFAULT_EPS)
def test_vkd_loss_is_a_distance_of_normalised_features(
    normalization: str, distance: str, normalize_student: bool
) -> None:
    student, teacher = rand(9, 5).requires_grad_(), rand(9, 5, seed=1).requires_grad_()
    loss = VkDLoss(normalization, distance, normalize_student)
    z = normalize(student, normalization) if normalize_student else student
    expected = DISTANCES[distance](z, normalize(teacher, normalization))
    actual = loss(student, teacher)
    assert torch.equal(actual, expected)
    actual.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalization", ["layer_norm", "standardize", "whiten"])
def test_vkd_loss_gradcheck(normalization: str, distance: str) -> None:
    loss = VkDLoss(normalization, distance, normalize_student=True)
    teacher = rand(8, 3, seed=1)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), (rand(8, 3).requires_grad_(),))


def test_defaults_are_the_papers_imagenet_loss() -> None:
    student, teacher = rand(6, 8), rand(6, 8, seed=1)
    expected = F.smooth_l1_loss(student, F.layer_norm(teacher, (8,)))
    torch.testing.assert_close(VkDLoss()(student, teacher), expected)


def test_beta_and_alpha_reach_the_distance() -> None:
    student, teacher = rand(6, 8), rand(6, 8, seed=1)
    torch.testing.assert_close(
        VkDLoss("none", beta=0.3)(student, teacher), F.smooth_l1_loss(student, teacher, beta=0.3)
    )
    torch.testing.assert_close(
        VkDLoss("none", "log_sum", alpha=2.0)(student, teacher), (student - teacher).square().sum().log()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalization", DEFAULT_EPS)
def test_losses_are_computed_in_float32_under_autocast(normalization: str, dtype: torch.dtype) -> None:
    student, teacher = rand(16, 6, dtype=dtype).requires_grad_(), rand(16, 6, seed=1, dtype=dtype)
    loss = VkDLoss(normalization, "smooth_l1", normalize_student=True)
    expected = loss(student.detach().float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(student, teacher)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    actual.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_mixed_precisions_take_the_wider() -> None:
    student, teacher = rand(6, 4, dtype=torch.bfloat16).requires_grad_(), rand(6, 4, seed=1)
    loss = VkDLoss()(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float64


# --- losses on logits


def test_cross_entropy_of_indices_and_of_probabilities() -> None:
    logits, labels = rand(5, 4), torch.tensor([0, 3, 1, 1, 2])
    log_p = torch.log_softmax(logits, dim=1)
    hard = -log_p[range(5), labels].mean()
    loss = SoftTargetCrossEntropy()
    torch.testing.assert_close(loss(logits, labels), hard)
    torch.testing.assert_close(loss(logits, labels.int()), hard)
    torch.testing.assert_close(loss(logits, F.one_hot(labels).double()), hard)
    mixed = torch.softmax(rand(5, 4, seed=1), dim=1)
    torch.testing.assert_close(loss(logits, mixed), -(mixed * log_p).sum(dim=1).mean())
    smoothed = 0.9 * F.one_hot(labels).double() + 0.1 / 4
    torch.testing.assert_close(SoftTargetCrossEntropy(0.1)(logits, labels), loss(logits, smoothed))


@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_kl_of_softened_logits(temperature: float) -> None:
    student, teacher = rand(5, 4).requires_grad_(), (3 * rand(5, 4, seed=1)).requires_grad_()
    p, q = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(dim=1).mean()
    actual = SoftTargetKLLoss(temperature)(student, teacher)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert teacher.grad is None
    expected = temperature * (q - p).detach() / 5
    torch.testing.assert_close(student.grad, expected)


def test_logit_losses_are_computed_in_float32_under_autocast() -> None:
    student, teacher = rand(8, 5, dtype=torch.bfloat16), rand(8, 5, seed=1, dtype=torch.bfloat16)
    labels = torch.softmax(teacher, dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss, target in ((SoftTargetCrossEntropy(), labels), (SoftTargetKLLoss(), teacher)):
            value = loss(student, target)
            assert value.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(value, loss(student.float(), target.float()))


# --- pairs of hooked features


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head, self.head_dist = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.conv(x).mean(dim=(2, 3))
        return self.head(z), {"dist": self.head_dist(z)}


def io_dict(model: nn.Module, x: Tensor, **modules: str) -> dict[str, dict[str, Any]]:
    """What torchdistill's hooks bring back: ``conv='output'`` hooks the output of the module ``conv``."""
    manager = ForwardHookManager(torch.device("cpu"))
    for path, io in modules.items():
        manager.add_hook(model, path, requires_input="input" in io, requires_output="output" in io)
    output = model(x)
    return {**manager.pop_io_dict(), ".": {"output": output}}


def test_pair_reads_hooked_modules() -> None:
    model, x = TwoHeads().double(), rand(5, 3, 8, 8)
    io = io_dict(model, x, conv="output", head="input output")
    pair = FeaturePair(
        VkDLoss("none", "mse"),
        student={"module": "head", "io": "input"},
        teacher={"module": "conv", "readout": "spatial_mean"},
    )
    assert pair(io, io, None).item() == pytest.approx(0, abs=1e-30)
    pair = FeaturePair(SoftTargetKLLoss(), {"module": "head"}, {"module": ".", "index": 0, "readout": "identity"})
    assert pair(io, io).item() == pytest.approx(0, abs=1e-12)


def test_pair_picks_from_tuples_lists_and_dicts() -> None:
    z = rand(3, 2)
    for value, index in (((None, z), 1), ([z, None], 0), ({"a": None, "b": z}, "b")):
        pair = FeaturePair(VkDLoss("none"), {"module": "m", "index": index}, {"module": "t"})
        assert pair({"m": {"output": value}}, {"t": {"output": z}}) == 0


def test_pair_drops_prefix_tokens() -> None:
    tokens = rand(2, 7, 3)
    student = {"module": "norm", "readout": "mean_patch_tokens", "num_prefix_tokens": 2}
    pair = FeaturePair(VkDLoss("none", "mse"), student, {"module": "t"})
    assert pair({"norm": {"output": tokens}}, {"t": {"output": tokens[:, 2:].mean(dim=1)}}).item() < 1e-30


def masked(mask: Tensor) -> tuple[dict[str, Any], dict[str, Any], FeaturePair]:
    """What is hooked of student and teacher, and the loss of the rows that the mask leaves."""
    student = {"features.map": {"output": rand(mask.numel(), 5, dtype=torch.float32)}, "pad": {"output": mask}}
    teacher = {"map": {"output": 3 + rand(*mask.shape[:1], 5, *mask.shape[1:], seed=1, dtype=torch.float32)}}
    pair = FeaturePair(
        VkDLoss("standardize", normalize_student=True),
        student={"module": "features.map"},
        teacher={"module": "map", "readout": "every_location"},
        mask={"module": "pad"},
    )
    return student, teacher, pair


def test_pair_leaves_out_what_the_mask_says() -> None:
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 2, :], mask[1, :, 3] = True, True
    student, teacher, pair = masked(mask)
    kept = [(b, y, x) for b in range(2) for y in range(3) for x in range(4) if not mask[b, y, x]]
    assert len(kept) == 2 * 12 - 4 - 3
    own = torch.stack([student["features.map"]["output"][12 * b + 4 * y + x] for b, y, x in kept])
    others = torch.stack([teacher["map"]["output"][b, :, y, x] for b, y, x in kept])
    own, others = ((rows - rows.mean(0)) / rows.std(0) for rows in (own, others))
    assert pair(student, teacher).item() == pytest.approx(F.smooth_l1_loss(own, others).item(), rel=1e-5)
    # What is on the padding does not matter, neither its values nor their statistics.
    teacher["map"]["output"].permute(0, 2, 3, 1)[mask] = 1e6
    before = pair(student, teacher)
    assert before.item() == pytest.approx(F.smooth_l1_loss(own, others).item(), rel=1e-5)


def test_an_empty_mask_changes_nothing() -> None:
    student, teacher, pair = masked(torch.zeros(2, 3, 4, dtype=torch.bool))
    pair_without = FeaturePair(
        pair.criterion, {"module": "features.map"}, {"module": "map", "readout": "every_location"}
    )
    assert pair(student, teacher) == pair_without(student, teacher)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3, 4), "the mask should be of bool, .* got torch.float32"),
        (torch.zeros(2, 3, 3, dtype=torch.bool), r"the mask \(2, 3, 3\) is not one for features \(24, 5\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    student, teacher, pair = masked(torch.zeros(2, 3, 4, dtype=torch.bool))
    student["pad"]["output"] = mask
    with pytest.raises(ConfigError, match=message):
        pair(student, teacher)


# --- token matching


def test_token_matching_by_hand() -> None:
    side = {"module": "tokens", "readout": "every_token", "num_prefix_tokens": 0}
    patches = {"module": "map", "readout": "every_location"}
    loss = TokenMatchingLoss(
        {"a": {"student": side, "teacher": side, "weight": 7.0}, "b": {"student": patches, "teacher": patches}}
    )
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)  # distances 5 and 0
    image = torch.zeros(1, 2, 1, 2)
    image[0, :, 0, 1] = torch.tensor([0.0, 2.0])  # 0 and 2
    student = {"tokens": {"output": tokens}, "map": {"output": image}}
    teacher = {name: {"output": torch.zeros_like(io["output"])} for name, io in student.items()}
    value = loss(student, teacher)
    assert value.item() == pytest.approx(math.sqrt(7 * 2.5 + 1), rel=1e-6)
    value.backward()
    assert tokens.grad is not None
    expected = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]) / 5 * 7 / 2 / (2 * value.item())
    torch.testing.assert_close(tokens.grad, expected)


def test_token_matching_without_a_difference_has_no_gradient() -> None:
    side = {"module": "tokens"}
    tokens = torch.ones(3, 2, requires_grad=True)
    io = {"tokens": {"output": tokens}}
    TokenMatchingLoss({"a": {"student": side, "teacher": side}})(io, io).backward()
    assert torch.equal(tokens.grad, torch.zeros(3, 2))


def test_torchdistill_builds_token_matching_of_its_yaml() -> None:
    text = (TokenMatchingLoss.__doc__ or "").partition(".. code-block:: yaml")[2]
    section = yaml.safe_load(text.partition("Args:")[0])
    loss = get_mid_level_loss(section["criterion"])
    assert isinstance(loss, TokenMatchingLoss)
    assert list(loss.pairs) == ["patch0", "body"]


def test_shipped_wrapper_reads_soft_labels_of_one_head() -> None:
    """torchdistill's SimpleLossWrapper does for labels: nothing of ours is needed."""
    io = io_dict(TwoHeads().double(), rand(5, 3, 8, 8), head="output", head_dist="output")
    wrapper = {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": "head", "io": "output"},
            "target": {"uses_label": True},
        },
    }
    loss = get_mid_level_loss({"key": "SoftTargetCrossEntropy", "kwargs": {}}, wrapper)
    labels = torch.softmax(rand(5, 4), dim=1)
    assert loss(io, {}, labels) == SoftTargetCrossEntropy()(io["head"]["output"], labels)


IO = {"features.tokens": {"output": torch.ones(2, 3)}, ".": {"output": (torch.ones(2, 3), 1.0)}, "head": {}}


@pytest.mark.parametrize(
    ("student", "io", "message"),
    [
        (
            {"module": "features.token"},
            IO,
            r"'features.token' of the student, which is not hooked \(did you mean 'features.tokens'\?\); "
            r"hooked: features.tokens, \.",
        ),
        ({"module": "head"}, IO, "'head' of the student, which is not hooked"),
        ({"module": "features.tokens", "io": "input"}, IO, "but only its output is hooked"),
        ({"module": "a"}, {".": {}}, "nothing of the student is hooked"),
        ({"module": "a"}, {}, "nothing of the student is hooked"),
        ({"module": "."}, IO, "output of module '.' of the student is a tuple of 2, not a tensor"),
        ({"module": ".", "index": 2}, IO, "no index 2 in the output .* a tuple of 2"),
        ({"module": ".", "index": "x"}, IO, "no index 'x' in the output"),
        ({"module": ".", "index": 1}, IO, "is a float, not a tensor"),
    ],
)
def test_what_is_not_hooked_is_named(student: dict[str, Any], io: dict[str, Any], message: str) -> None:
    pair = FeaturePair(VkDLoss(), student, {"module": "features.tokens"})
    with pytest.raises(ConfigError, match=message):
        pair(io, IO)


def test_missing_teacher_is_named() -> None:
    pair = FeaturePair(VkDLoss(), {"module": "features.tokens"}, {"module": "fc"})
    with pytest.raises(ConfigError, match=r"nothing of the teacher is hooked.*'fc'"):
        pair(IO, {})


# --- mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VkDLoss("whitten"), "no normalization 'whitten' .did you mean 'whiten'"),
        (lambda: VkDLoss(distance="smoothl1"), "no distance 'smoothl1' .did you mean 'smooth_l1'"),
        (lambda: VkDLoss(eps="1e-5"), "eps must be a number, got '1e-5'.*write 1.0e-5"),  # type: ignore[arg-type]
        (lambda: VkDLoss(beta=-1.0), "beta must lie in"),
        (lambda: VkDLoss(distance="log_sum", alpha=0.5), r"alpha must lie in \[1, inf\)"),
        (
            lambda: VkDLoss(distance="mse", beta=2.0),
            "beta shapes the distance 'smooth_l1', and 'mse' does not",
        ),
        (lambda: VkDLoss(alpha=2.0), "alpha shapes the distance 'log_sum'"),
        (lambda: VkDLoss()(rand(4, 3), rand(4, 5)), r"student \(4, 3\), teacher \(4, 5\).*needs a projector"),
        (lambda: VkDLoss()(rand(8, 3), rand(4, 3)), r"same rows, got student \(8, 3\), teacher \(4, 3\)"),
        (lambda: VkDLoss()(rand(8, 2, 3), rand(8, 3)), r"rows \(N, C\), got student \(8, 2, 3\).*readout"),
        (lambda: SoftTargetKLLoss(0.0), "temperature must lie in"),
        (lambda: SoftTargetKLLoss()(rand(4, 3), rand(4, 5)), r"student \(4, 3\), teacher \(4, 5\)"),
        (lambda: SoftTargetCrossEntropy(1.0), r"label_smoothing must lie in \[0, 1\)"),
        (lambda: SoftTargetCrossEntropy()(rand(4, 3), rand(4, 5)), r"logits \(4, 3\) and targets \(4, 5\)"),
        (
            lambda: SoftTargetCrossEntropy()(rand(4, 3), torch.ones(3).long()),
            r"targets \(3,\) of torch.int64",
        ),
        (lambda: SoftTargetCrossEntropy(0.1)(rand(4, 3), rand(4, 3)), "probabilities already"),
        (lambda: FeaturePair(VkDLoss(), {"module": "a", "io": "out"}, {"module": "b"}), "no io 'out'"),
        (
            lambda: FeaturePair(VkDLoss(), {"module": "a", "readout": "mean"}, {"module": "b"}),
            "no readout 'mean'",
        ),
    ],
)
def test_mistakes_are_value_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VkDLoss(normalisation="l2"), "normalisation"),  # type: ignore[call-arg]
        (lambda: SoftTargetKLLoss(T=2.0), "T"),  # type: ignore[call-arg]
        (lambda: SoftTargetCrossEntropy(smoothing=0.1), "smoothing"),  # type: ignore[call-arg]
        (lambda: FeaturePair(VkDLoss(), {"module": "a"}, {"module": "b"}, target=1), "target"),  # type: ignore[call-arg]
        (
            lambda: FeaturePair(VkDLoss(), {"module": "a", "redout": "identity"}, {"module": "b"}),
            "student has no key 'redout' .did you mean 'readout'",
        ),
        (
            lambda: FeaturePair(VkDLoss(), {"module": "a"}, {"path": "b"}),
            "teacher must be a mapping with a 'module'",
        ),
        (lambda: FeaturePair(VkDLoss(), "a", {"module": "b"}), "student must be a mapping"),  # type: ignore[arg-type]
        (lambda: FeaturePair(VkDLoss(), {"module": "a"}, {"module": "b"}, {"path": "c"}), "student must be a mapping"),
        (lambda: TokenMatchingLoss({}), "pairs must be a mapping"),
        (
            lambda: TokenMatchingLoss({"a": {"student": {"module": "b"}}}),
            "pair 'a' must be a mapping with 'student' and 'teacher'",
        ),
        (
            lambda: TokenMatchingLoss({"a": {"student": {"module": "b"}, "teacher": {"module": "b"}, "wight": 1}}),
            "pair 'a' has no key 'wight' .did you mean 'weight'",
        ),
    ],
)
def test_unknown_arguments_are_type_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


# --- YAML


@pytest.mark.parametrize("cls", [VkDLoss, SoftTargetCrossEntropy, SoftTargetKLLoss, AttentionTransferLoss, FeaturePair])
def test_yaml_of_the_docstring_builds_the_class(cls: type[nn.Module]) -> None:
    assert cls.__doc__ is not None
    block = re.search(r"code-block:: yaml\n\n(( {8}.*\n)+)", cls.__doc__)
    assert block is not None
    term = yaml.safe_load(block.group(1))
    criterion = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"term": term}}})
    (module, weight) = criterion.term_dict["term"]
    assert weight == term["weight"]
    assert any(type(m) is cls for m in module.modules())
    assert cls.__name__ in str(criterion)


def test_a_readout_that_leaves_prefix_tokens_out_must_be_told_how_many() -> None:
    message = "teacher: readout 'mean_patch_tokens' needs num_prefix_tokens"
    with pytest.raises(ValueError, match=message):
        FeaturePair(nn.MSELoss(), {"module": "a"}, {"module": "b", "readout": "mean_patch_tokens"})


def test_the_teachers_decision_is_the_label() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    loss = HardTeacherCrossEntropy()(student, teacher)
    decided = [max(range(5), key=lambda k: float(row[k])) for row in teacher.detach()]
    probabilities = student.detach().exp() / student.detach().exp().sum(dim=1, keepdim=True)
    expected = -sum(math.log(probabilities[i, k]) for i, k in enumerate(decided)) / 7
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    one_hot = torch.zeros(7, 5, dtype=torch.float64)
    one_hot[range(7), decided] = 1
    torch.testing.assert_close(student.grad, (probabilities - one_hot) / 7)
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"HardTeacherCrossEntropy reads two sets of logits .* student \(7, 5\)"):
        HardTeacherCrossEntropy()(student, teacher[:, :4])


# --- AttentionTransferLoss


def test_attention_transfer_of_maps_of_one_size_is_torchdistills() -> None:
    student, teacher = rand(3, 5, 4, 6), rand(3, 7, 4, 6, seed=1)
    pairs = {side: {"path": "layer", "io": "output"} for side in ("student", "teacher")}
    reference = ATLoss({"pair": pairs}, mode="code")
    expected = reference({"layer": {"output": student}}, {"layer": {"output": teacher}})
    pair = FeaturePair(
        AttentionTransferLoss(),
        {"module": "layer", "readout": "attention_map"},
        {"module": "layer", "readout": "attention_map"},
    )
    actual = pair({"layer": {"output": student}}, {"layer": {"output": teacher}})
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_attention_of_tokens_against_a_finer_map_by_loops() -> None:
    tokens = rand(2, 5, 3).requires_grad_()  # one class token, 2 x 2 patches
    feature_map = rand(2, 4, 6, 4, seed=1).requires_grad_()
    pair = FeaturePair(
        AttentionTransferLoss(),
        {"module": "blocks", "readout": "token_attention_map", "num_prefix_tokens": 1},
        {"module": "conv", "readout": "attention_map"},
    )
    loss = pair({"blocks": {"output": tokens}}, {"conv": {"output": feature_map}})

    def unit(values: list[float]) -> list[float]:
        return [v / math.sqrt(sum(u * u for u in values)) for v in values]

    total = 0.0
    for b in range(2):
        looked_at = unit([float(tokens[b, 1 + i].detach().square().sum()) for i in range(4)])
        cells = [feature_map[b, :, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2] for i in range(2) for j in range(2)]
        aim = unit([float(cell.detach().square().sum()) for cell in cells])
        total += sum((s - t) ** 2 for s, t in zip(looked_at, aim, strict=True))
    assert float(loss.detach()) == pytest.approx(total / 8, rel=1e-12)
    loss.backward()
    assert tokens.grad is not None
    assert (tokens.grad[:, 0] == 0).all()  # the class token has no place on the map
    assert (tokens.grad[:, 1:] != 0).any(dim=2).all()
    assert feature_map.grad is None


def test_attention_transfer_does_not_see_how_large_features_are() -> None:
    student, teacher = rand(2, 4, 4).square(), rand(2, 4, 4, seed=1).square()
    loss = AttentionTransferLoss()
    torch.testing.assert_close(loss(3 * student, 0.1 * teacher), loss(student, teacher), rtol=1e-12, atol=0)
    assert float(loss(student, 5 * student)) < 1e-30
    half = loss((300 * student).half(), teacher.half())  # squares beyond float16 are the readouts' affair
    assert half.dtype == torch.float32


def test_attention_transfer_gradient_by_finite_differences() -> None:
    student, teacher = rand(2, 4, 6).square().add(0.1).requires_grad_(), rand(2, 8, 3, seed=1).square()
    assert torch.autograd.gradcheck(lambda x: AttentionTransferLoss()(x, teacher), student)


@pytest.mark.parametrize("student", [rand(2, 16), rand(2, 3, 4, 4), rand(3, 4, 4)])
def test_attention_transfer_reads_maps_of_as_many_images(student: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"reads two attention maps \(B, H, W\) .* teacher \(2, 4, 4\)"):
        AttentionTransferLoss()(student, rand(2, 4, 4))
