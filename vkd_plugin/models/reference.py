"""Projectors in checkpoints of the method's reference code (github.com/roymiles/VkD), which has them in the student.

Its projectors are torch's ``parametrizations.orthogonal(nn.Linear(C_s, C_t, bias=False))``: the checkpoint holds the
raw parameter, ``projector.parametrizations.weight.original``, and what it is relative to, ``...weight.0.base``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..errors import UserError
from ..suggest import nearest
from .weights import weights_of

_RAW, _BASE = ".parametrizations.weight.original", ".parametrizations.weight.0.base"
_TOLERANCE = torch.finfo(torch.float32).eps ** 0.5  # what OrthogonalProjector.weight takes in float32


def import_projector(state: Mapping[str, Any], name: str | None = None, source: str = "the checkpoint") -> Tensor:
    """The matrix that a projector of a reference checkpoint applies, as torch computes it.

    ::

        projector.weight = import_projector(read_checkpoint("checkpoint.pth.tar"))

    Args:
        state: what the checkpoint holds, or its weights.
        name: path of the projector's module, needed where there are several.
        source: where it is from, for messages.

    Returns:
        (C_teacher, C_student), orthonormal columns where C_teacher >= C_student, else rows; float32 or wider.

    Raises:
        UserError: no projector, several, one that cannot be read, or a matrix that is not orthonormal. The reference's
            ImageNet recipe makes it the zero matrix in its first step.
    """
    weights = weights_of(state, source)
    held = [key.removesuffix(_RAW) for key in weights if key.endswith(_RAW)]
    if not held:
        raise UserError(f"{source}: holds no projector (no name ends in '{_RAW[1:]}')")
    if name is None and len(held) > 1:
        raise UserError(f"{source}: holds several projectors: give one of {', '.join(held)} as name")
    if name is not None and name not in held:
        raise UserError(f"{source}: holds no projector '{name}'{nearest(name, held)}")
    name = name or held[0]
    matrix = _matrix(weights[name + _RAW], weights.get(name + _BASE), f"{source}: projector '{name}'")
    _prove_orthonormal(matrix, f"{source}: projector '{name}'")
    return matrix


def _matrix(raw: Tensor, base: Tensor | None, where: str) -> Tensor:
    if raw.dim() != 2:
        raise UserError(f"{where}: its parameter has shape {tuple(raw.shape)}, which is no matrix")
    # torch's default, which the reference does not change: Householder reflections unless the matrix is square.
    dtype = torch.promote_types(raw.dtype, torch.float32)
    layer = nn.Linear(raw.shape[1], raw.shape[0], bias=False, dtype=dtype)
    parametrizations.orthogonal(layer, use_trivialization=base is not None)
    state = {_RAW[1:]: raw} | ({_BASE[1:]: base} if base is not None else {})
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    with torch.no_grad():
        return layer.weight.detach().clone()


def _prove_orthonormal(matrix: Tensor, where: str) -> None:
    if not matrix.any():
        raise UserError(
            f"{where} is the zero matrix, there is nothing to import: it projected every feature to 0. Weight decay "
            "takes the diagonal of its raw parameter off +-1, which torch then truncates to 0; the student was trained "
            "without this projector from that step on"
        )
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().mT
    error = float((tall.mT @ tall - torch.eye(tall.shape[1], dtype=tall.dtype)).abs().amax())
    if not error <= _TOLERANCE:
        dead = int((~tall.any(dim=0)).sum())
        columns = f" ({dead} of {tall.shape[1]} columns are zero)" if dead else ""
        raise UserError(f"{where} is not orthonormal: the largest entry of |W^T W - I| is {error:.1e}{columns}")
