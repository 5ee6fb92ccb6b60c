"""A run's student as a folder: weights, ``config.json``, model card, and ONNX if asked for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserError
from ..models.weights import first_line
from ..tasks.classification import logits
from .card import card
from .folder import check_target, whole_folder
from .layout import CARD, CONFIG, WEIGHTS, Layout, layout, loaded
from .onnx_file import NAME, OnnxFacts, require_packages, write_onnx
from .preprocessing import Preprocessing, preprocessing
from .trained import Trained, trained_student

_TOLERANCE = 1e-6


def export_run(
    run: str,
    to: str,
    checkpoint: str = "best",
    ema: bool = False,
    onnx: bool = False,
    opset: int | None = None,
    trust: Sequence[str] = (),
) -> Path:
    """Exports the student of a run. The folder is there as a whole, its weights proved to load, or not at all.

    Args:
        run: the run's folder.
        to: the folder to make; an empty one is taken, too.
        checkpoint: name of one of the run's checkpoints, or a file.
        ema: the EMA's weights (``best.pt`` has them as the student's already where there is an EMA).
        onnx: write ``model.onnx`` as well.
        opset: of ONNX.
        trust: packages whose code the run's configuration may run.

    Returns:
        The folder.

    Raises:
        UserError: see :func:`trained_student`; ``to`` is not empty or cannot be written; a model that cannot be
            described or does not load back.
    """
    if opset is not None and not onnx:
        raise UserError("--opset is ONNX's: give --onnx, too")
    if onnx:
        require_packages()
    if not to:
        raise UserError("--to: the name of the folder is empty")
    target = Path(os.path.expanduser(to))
    check_target(target)
    trained = trained_student(run, checkpoint, ema, trust)
    seen = preprocessing(trained.experiment)
    shape = _input_shape(trained, seen)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    outputs = _outputs(trained.model, images)
    described = layout(trained, seen, outputs.shape[1])
    with whole_folder(target) as folder:
        _write_weights(trained.model, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(described.config, indent=2) + "\n", "utf-8")
        _prove(trained, described, folder, images, outputs)
        facts: OnnxFacts | None = None
        if onnx:
            facts = write_onnx(trained.model, shape, folder / NAME, opset)
        (folder / CARD).write_text(card(trained, described, seen, facts), "utf-8")
    return target


def _input_shape(trained: Trained, seen: Preprocessing) -> list[int]:
    """(channels, height, width) of an input: of a sample, else what the architecture is made for."""
    own = getattr(trained.model, "pretrained_cfg", None) or {}
    shape = seen.told.get("input_size") or own.get("input_size")
    if shape is None:
        raise UserError(f"{trained.run.path}: the size of the model's input cannot be told from its test data")
    return list(shape)


@torch.inference_mode()
def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return logits(model(images))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        raise UserError(f"the student does not take its test images, {shape} each: {first_line(error)}") from error


def _write_weights(model: nn.Module, file: Path) -> None:
    # Copies, as tensors that share their memory (tied weights) are refused; those who load expect every name.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    file.write_bytes(save(state, metadata={"format": "pt"}))  # save_file keeps others from reading it


def _prove(trained: Trained, described: Layout, folder: Path, images: Tensor, outputs: Tensor) -> None:
    """That who loads the folder gets the same logits."""
    try:
        found = _outputs(loaded(trained, described, folder), images)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"what would be exported does not load: {first_line(error)}") from error
    if not torch.allclose(found, outputs, rtol=_TOLERANCE, atol=_TOLERANCE):
        difference = float((found - outputs).abs().max())
        raise UserError(
            f"what would be exported is another model (its logits differ by {difference:.1e}): {CONFIG} cannot say "
            f"how {described.name} was built"
        )
