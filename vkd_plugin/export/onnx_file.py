"""A model as ONNX, proved equal on onnxruntime."""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.weights import first_line
from ..tasks.classification import logits

NAME = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of logits that is let through; of logits larger than 1, relative to the largest."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_BATCHES = (1, 3)
_Export = Callable[[nn.Module, Tensor, Path, int | None], None]


@dataclass(frozen=True)
class OnnxFacts:
    """What was measured: the largest ``difference`` of a logit over random batches of sizes ``batches``."""

    opset: int
    difference: float
    batches: Sequence[int]
    runtime: str


def require_packages() -> None:
    """That what ONNX needs is installed.

    Raises:
        UserError: it is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'vkd-plugin[onnx]'")


def write_onnx(model: nn.Module, shape: Sequence[int], file: Path, opset: int | None = None) -> OnnxFacts:
    """Exports ``model``, input ``images`` (batch, \\*shape), output ``logits`` (batch, classes), any size of batch.

    By torch.export, or by TorchScript where that cannot do it (or not in the opset asked for).

    Args:
        model: in evaluation mode, on the CPU.
        shape: of one input.
        file: where to.
        opset: of ONNX; by default the exporter's.

    Raises:
        UserError: neither can, or onnxruntime computes something else.
    """
    reasons = []
    exporters: dict[str, _Export] = {"torch.export": _by_graph, "TorchScript": _by_tracing}
    for name, export in exporters.items():
        try:
            with _quiet():
                export(model, torch.zeros(2, *shape), file, opset)
                return _proved(model, shape, file, opset)
        except Exception as error:  # exporters raise nearly anything
            reasons.append(f"{name}: {first_line(error)}")
    raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {'; '.join(reasons)}")


def _by_graph(model: nn.Module, sample: Tensor, file: Path, opset: int | None) -> None:
    torch.onnx.export(
        model,
        (sample,),
        file,
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )


def _by_tracing(model: nn.Module, sample: Tensor, file: Path, opset: int | None) -> None:
    torch.onnx.export(
        model,
        (sample,),
        str(file),
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        dynamo=False,
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def _proved(model: nn.Module, shape: Sequence[int], file: Path, opset: int | None) -> OnnxFacts:
    onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))  # without type stubs
    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    written = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise UserError(f"it writes opset {written}, not {opset}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in _BATCHES:
        images = torch.randn(size, *shape, generator=generator)
        with torch.inference_mode():
            wanted = logits(model(images))
        (found,) = session.run(["logits"], {"images": images.numpy()})
        if found.shape != tuple(wanted.shape):
            raise UserError(f"onnxruntime gives {found.shape} for a batch of {size}, not {tuple(wanted.shape)}")
        difference = float((torch.from_numpy(found) - wanted).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise UserError(f"onnxruntime's logits differ by {difference:.1e}")
        largest = max(largest, difference)
    return OnnxFacts(written, largest, _BATCHES, onnxruntime.__version__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of their progress and of their own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
