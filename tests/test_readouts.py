"""Readouts against explicit loops, and what they say about shapes that do not fit."""

import pytest
import torch

from vkd_plugin.readouts import READOUTS, get_readout
from vkd_plugin.suggest import nearest

TOKENS = torch.randn(2, 6, 3)
MAP = torch.randn(2, 3, 4, 5)


def test_token_readouts() -> None:
    expected = torch.stack([sum(TOKENS[b, t] for t in range(2, 6)) / 4 for b in range(2)])
    torch.testing.assert_close(READOUTS["mean_patch_tokens"](TOKENS, 2), expected)
    assert torch.equal(READOUTS["class_token"](TOKENS, 2), TOKENS[:, 0])
    assert torch.equal(READOUTS["distillation_token"](TOKENS, 2), TOKENS[:, 1])
    rows = READOUTS["every_token"](TOKENS, 2)
    assert torch.equal(rows, torch.stack([TOKENS[b, t] for b in range(2) for t in range(2, 6)]))


def test_map_readouts() -> None:
    expected = torch.stack([torch.stack([MAP[b, c].mean() for c in range(3)]) for b in range(2)])
    torch.testing.assert_close(READOUTS["spatial_mean"](MAP), expected)
    rows = READOUTS["every_location"](MAP)
    assert torch.equal(rows, torch.stack([MAP[b, :, i, j] for b in range(2) for i in range(4) for j in range(5)]))
    assert READOUTS["identity"](MAP) is MAP


def test_attention_maps() -> None:
    expected = torch.stack(
        [
            torch.stack([torch.stack([(MAP[b, :, i, j] ** 2).sum() / 3 for j in range(5)]) for i in range(4)])
            for b in (0, 1)
        ]
    )
    torch.testing.assert_close(READOUTS["attention_map"](MAP), expected)
    expected = torch.stack([(TOKENS[:, 2 + i] ** 2).sum(dim=1) / 3 for i in range(4)], dim=1).reshape(2, 2, 2)
    torch.testing.assert_close(READOUTS["token_attention_map"](TOKENS, 2), expected)
    large = READOUTS["attention_map"](torch.full((1, 2, 1, 1), 1000.0, dtype=torch.float16))
    assert large.dtype == torch.float32
    assert float(large) == 1e6  # beyond float16


def test_patch_tokens_must_make_a_square_map() -> None:
    with pytest.raises(ValueError, match="reads patch tokens that make a square, got 5 behind num_prefix_tokens=1"):
        READOUTS["token_attention_map"](TOKENS, 1)


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("mean_patch_tokens", MAP),
        ("spatial_mean", TOKENS),
        ("class_token", MAP),
        ("attention_map", TOKENS),
        ("token_attention_map", MAP),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name: str, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"readout '{name}' reads .*, got a tensor of shape"):
        READOUTS[name](x)


def test_prefix_tokens_must_leave_patches() -> None:
    with pytest.raises(ValueError, match="num_prefix_tokens=6 leaves none of the 6 tokens"):
        READOUTS["mean_patch_tokens"](TOKENS, 6)


def test_unknown_readout_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no readout 'spatial_men' \(did you mean 'spatial_mean'\?\)"):
        get_readout("spatial_men")


def test_nearest_lists_choices_when_nothing_is_near() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == " (choose from alpha, beta)"
    assert nearest("BETA", ["alpha", "beta"]) == " (did you mean 'beta'?)"
    assert nearest("x", []) == ""
