"""A run's student as a folder: weights, ``config.json``, model card, and ONNX if asked for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserError
from ..models.detector_labels import labels_of
from ..models.weights import first_line
from .card import card
from .folder import check_target, whole_folder
from .kind import DETECTOR, kind_of
from .layout import CARD, CONFIG, WEIGHTS, Layout, layout, loaded
from .onnx_file import NAME, OnnxFacts, require_packages, write_onnx
from .preprocessing import Preprocessing, preprocessing
from .probe import Probe, layers_of, logits_of
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
    is_detector = kind_of(trained.experiment) is DETECTOR
    if onnx and is_detector:
        raise UserError("--onnx: is for classifiers; of detectors, whose outputs differ in number, leave it out")
    seen = preprocessing(trained.experiment)
    shape = [] if is_detector else _input_shape(trained, seen)
    probe = layers_of() if is_detector else logits_of(shape)
    wanted = probe(trained.model)
    described = layout(trained, seen, _detector_classes(trained.model) if is_detector else wanted.shape[1])
    with whole_folder(target) as folder:
        _write_weights(trained.model, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(described.config, indent=2) + "\n", "utf-8")
        _prove(trained, described, folder, probe, wanted)
        facts: OnnxFacts | None = None
        if onnx:
            facts = write_onnx(trained.model, shape, folder / NAME, opset)
        (folder / CARD).write_text(card(trained, described, seen, facts), "utf-8")
    return target


def _input_shape(trained: Trained, seen: Preprocessing) -> list[int]:
    """(channels, height, width) of a classifier's input: of a sample, else what the architecture is made for."""
    own = getattr(trained.model, "pretrained_cfg", None) or {}
    shape = seen.told.get("input_size") or own.get("input_size")
    if shape is None:
        raise UserError(f"{trained.run.path}: the size of the model's input cannot be told from its test data")
    return list(shape)


def _detector_classes(model: nn.Module) -> int | None:
    """``num_classes``, the background included where the detector has one; None where it cannot be told."""
    known = labels_of(model)
    return None if known is None else known.stop


def _write_weights(model: nn.Module, file: Path) -> None:
    # Copies, as tensors that share their memory (tied weights) are refused; those who load expect every name.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    file.write_bytes(save(state, metadata={"format": "pt"}))  # save_file keeps others from reading it


def _prove(trained: Trained, described: Layout, folder: Path, probe: Probe, wanted: Tensor) -> None:
    """That who loads the folder gets the same model."""
    try:
        found = probe(loaded(trained, described, folder))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"what would be exported does not load: {first_line(error)}") from error
    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
        return
    how = f"by {(found - wanted).abs().max():.1e}" if found.shape == wanted.shape else "in number"
    raise UserError(
        f"what would be exported is another model (its outputs differ {how}): {CONFIG} cannot say how "
        f"{described.name} was built"
    )
