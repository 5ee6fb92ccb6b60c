"""The numbers recorded from the method's reference code, and the inputs and weights that they belong to.

``data/parity/deit_tiny.json`` holds what its DeiT-Ti puts out, and one whole training step, with the weights that
``data/parity/fill.py`` makes from their names.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from vkd_plugin.models.deit import ConvStemDeiT

PARITY = Path(__file__).parent / "data" / "parity"
RECORDED = json.loads((PARITY / "deit_tiny.json").read_text())
STEP = RECORDED["engine_step"]
FILL = SimpleNamespace(**runpy.run_path(str(PARITY / "fill.py")))
TINY = "deit_tiny_distilled_conv_patch16_224"


def made(name: str, shape: tuple[int, ...], **scaling: float) -> torch.Tensor:
    return torch.from_numpy(FILL.inputs(name, shape, **scaling))


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return made("image", (2, 3, 224, 224), scale=1.7).to(dtype)


def filled(dtype: torch.dtype = torch.float64) -> ConvStemDeiT:
    model = timm.create_model(TINY, dtype=dtype)
    return FILL.fill_torch(model)


def assert_recorded(name: str, tensor: torch.Tensor, expected: dict[str, Any], tolerance: float) -> None:
    """Every recorded number, to ``tolerance`` of the scale of what it is summed from."""
    rows = tensor.dim() > 0 and isinstance(expected["first8"][0], list)
    found = FILL.summary(name, tensor.detach().numpy(), rows=rows)
    assert found["shape"] == expected["shape"]
    for key in ("norm", "absmax"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), (name, key)
    for key in ("sum", "probe"):
        assert found[key] == pytest.approx(expected[key], abs=tolerance * expected["norm"]), (name, key)
    first, wanted = (torch.tensor(summary["first8"]) for summary in (found, expected))
    torch.testing.assert_close(first, wanted, rtol=0, atol=tolerance * expected["absmax"], msg=name)


def norm_of_householder_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """The norm of the gradient with respect to the reference's raw parameter.

    That makes the projector P = B H(raw)[:, :k], with B orthogonal, its first k columns P, and the products H of
    Householder reflections of raw = -I. There dP / d raw_ji = 2 B (E_ji - E_ij) below the diagonal, and with
    S = P^T G the squared norm is 4 (|S - S^T|^2 / 2 + |G|^2 - |S|^2), whichever way B was completed.
    """
    s = weight.T @ gradient
    return 2 * float((s - s.T).square().sum() / 2 + gradient.square().sum() - s.square().sum()) ** 0.5
