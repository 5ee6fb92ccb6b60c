"""Checkpoints: everything a run needs to go on, written atomically, read without executing anything.

``model`` holds the student under its own names, so a checkpoint loads into the bare student by torchdistill's
``load_ckpt`` as well; the projectors stand apart under ``projectors``.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.weights import read_checkpoint
from ..wrappers import ProjectedStudent


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Writes ``state`` beside ``path`` and renames it, so that ``path`` is never a part of a checkpoint.

    Raises:
        UserError: the disk refuses (full, read-only); what ``path`` held before is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot save the checkpoint: {error}") from error


def projectors_state(wrapper: nn.Module | None, student: nn.Module) -> dict[str, Tensor]:
    """What an auxiliary wrapper trains beside the student: projectors, or another wrapper's own layers."""
    if wrapper is None:
        return {}
    if isinstance(wrapper, ProjectedStudent):
        return wrapper.projector_state_dict()
    of_student = {id(t) for t in (*student.parameters(), *student.buffers())}
    tensors = (*wrapper.named_parameters(), *wrapper.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if id(tensor) not in of_student}


def load_projectors(wrapper: nn.Module | None, state: Mapping[str, Tensor]) -> None:
    """Loads what :func:`projectors_state` returned.

    Raises:
        UserError: names or shapes do not fit the wrapper.
    """
    if isinstance(wrapper, ProjectedStudent):
        wrapper.load_projector_state_dict(state)
    elif wrapper is not None:
        own = dict((*wrapper.named_parameters(), *wrapper.named_buffers()))
        with torch.no_grad():
            for name, tensor in state.items():
                if name not in own:
                    raise UserError(f"the checkpoint's '{name}' is not part of {type(wrapper).__name__}")
                own[name].copy_(tensor)


def read_run_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that ``run.py`` wrote.

    Raises:
        UserError: missing, unreadable, or something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    state = read_checkpoint(path)
    missing = {"model", "projectors", "optimizer", "epoch", "batch", "step", "terms"} - state.keys()
    if missing:
        raise UserError(f"{path}: not a checkpoint to resume from: it holds no {', '.join(sorted(missing))}")
    return state
