"""What the ImageNet experiments have to compute, counted and not measured, and the hours that it comes to on paper.

    python -m benchmarks.flops [--peak 312] [--utilisation 0.2 0.35 0.5] [--gpus 1 8 64] [--batch 512]
    python -m benchmarks.flops --images-per-second X        # of one GPU, measured: hours from that alone

Operations are those of torch's ``flop_counter`` (a multiplication and an addition are two) on tensors without values,
at 224 x 224 pixels: products and convolutions, attention written out, and of linear algebra the leading term. They are
the same on every machine. What a projector's map takes is counted twice: as a GPU computes it, without a look at the
data (float64, sixteen squarings), and as a CPU does with the weights that training starts from (float32). Operators
that compute something are counted besides: in eager mode a GPU's host has to start about so many kernels.

Hours are operations over ``peak * utilisation``, both of them assumptions: a vendor's figure for dense bfloat16, and
how much of it a training reaches.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vkd_plugin  # noqa: F401 (registers the students)
from benchmarks.measuring import save, setting, show
from vkd_plugin.projectors import OrthogonalProjector
from vkd_plugin.stiefel import ORTHOGONAL_MAPS, orthogonalize

TEACHER = "regnety_160"
STUDENTS = {
    "DeiT-Ti": "deit_tiny_distilled_conv_patch16_224",
    "DeiT-S": "deit_small_distilled_conv_patch16_224",
}
IMAGENET = 1_281_167
"""Training images."""


def _cube(factor: float) -> Callable[..., int]:
    """Of a square matrix: ``factor`` times the third power of its side."""

    def count(a: Any, *args: Any, **kwargs: Any) -> int:
        return round(factor * a[-1] ** 3)

    return count


def _triangular(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return b[-1] * b[-2] * a[-1]


ops = torch.ops.aten
LINEAR_ALGEBRA: dict[Any, Callable[..., int]] = {
    ops.linalg_inv_ex: _cube(2),
    ops.linalg_cholesky_ex: _cube(1 / 3),
    ops.linalg_solve_triangular: _triangular,
    ops._linalg_eigh: _cube(9),
}
"""Leading terms of what torch's counter leaves out (of eigenvectors: of the usual tridiagonal algorithm)."""


def operations(call: Callable[[], object]) -> int:
    """Of everything that a call computes."""
    with FlopCounterMode(display=False, custom_mapping=LINEAR_ALGEBRA) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


class _Launches(TorchDispatchMode):
    """Counts operators that compute something; views and bookkeeping start no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> int:
    """Operators that a call makes a device start, in eager mode: about as many kernels."""
    with _Launches() as counter:
        call()
    return counter.number


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, in float32, each storage once, without the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        _summed(model(images)).sum()
    return sum(kept.values())


def of_models() -> dict[str, dict[str, float]]:
    """By model: operations of an image, bytes that it keeps for the backward pass, parameters, operators of a step."""
    batch = 2
    found = {}
    with torch.device("meta"):
        images = torch.empty(batch, 3, 224, 224)
        teacher = timm.create_model(TEACHER).eval().requires_grad_(False)
        found["teacher"] = {
            "parameters": parameters(teacher),
            "forward": operations(lambda: teacher(images)) / batch,
            "launches": launches(lambda: teacher(images)),
        }
        for name, key in STUDENTS.items():
            student = timm.create_model(key).train()

            def train(student: nn.Module = student) -> None:
                _summed(student(images)).sum().backward()

            found[name] = {
                "parameters": parameters(student),
                "forward": operations(partial(student, images)) / batch,
                "training": operations(train) / batch,
                "kept_bytes": kept_bytes(student, images) / batch,
                "launches": launches(train),
            }
    return found


def _summed(output: Any) -> Tensor:
    """The heads of a distilled DeiT together."""
    return torch.stack(output).sum(0) if isinstance(output, tuple) else output


def of_projectors(student: int, teacher: int) -> dict[str, dict[str, float]]:
    """Of a training step, by map: ``gpu`` and ``cpu`` of the weight, forward and backward; ``product`` of a row.

    ``launches`` are the operators that a GPU starts for the weight.
    """
    found: dict[str, dict[str, float]] = {}
    for name in ORTHOGONAL_MAPS:
        torch.manual_seed(0)
        raw = OrthogonalProjector(student, teacher, name).raw_weight.detach().requires_grad_()
        cotangent = torch.ones_like(raw)
        with FakeTensorMode() as fake:
            unseen = (fake.from_tensor(raw), fake.from_tensor(cotangent))
            gpu = operations(partial(_weigh, name, *unseen))
            started = launches(partial(_weigh, name, *unseen))
        found[name] = {
            "gpu": gpu,
            "cpu": operations(partial(_weigh, name, raw, cotangent)),
            "launches": started,
            "product": 3 * 2 * student * teacher,  # forward, and backward to the row and to the weight
        }
    return found


def _weigh(orthogonal_map: str, raw: Tensor, cotangent: Tensor) -> None:
    """Forward and backward of a projector's weight."""
    orthogonalize(raw, orthogonal_map).backward(cotangent)


def hours(images: int, epochs: int, images_per_second: float) -> float:
    """Of a training, at so many images a second in all."""
    return images * epochs / images_per_second / 3600


def show_models(models: dict[str, dict[str, float]]) -> None:
    print(f"\n{'of an image':12}{'parameters':>14}{'forward':>12}{'training':>12}{'kept':>12}{'operators a step':>20}")
    for name, row in models.items():
        training = f"{row['training'] / 1e9:8.2f} GF" if "training" in row else "-"
        kept = f"{row['kept_bytes'] / 2**20:8.1f} MiB" if "kept_bytes" in row else "-"
        print(f"{name:12}{row['parameters']:14,.0f}{row['forward'] / 1e9:9.2f} GF{training:>12}{kept:>12}", end="")
        print(f"{row['launches']:20d}")


def show_projectors(projectors: dict[str, dict[str, float]], batch: int) -> None:
    product = batch * next(iter(projectors.values()))["product"]
    print(f"\n{'of a step':12}{'map, GPU':>14}{'map, CPU':>14}{'operators on a GPU':>22}", end="")
    print(f"     (the product: {product / 1e9:.2f} GF for {batch} images)")
    for name, row in projectors.items():
        print(f"{name:12}{row['gpu'] / 1e9:11.2f} GF{row['cpu'] / 1e9:11.2f} GF{row['launches']:22d}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=IMAGENET, help="of an epoch (default: ImageNet's)")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=512, help="images of a step, over all GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--peak", type=float, default=312, help="TFLOP/s of a GPU (default: A100's data sheet)")
    parser.add_argument("--utilisation", type=float, nargs="+", default=[0.2, 0.35, 0.5], help="parts of it")
    parser.add_argument("--images-per-second", type=float, help="of one GPU, measured: hours from it alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)

    about = setting("flops", args, argv)
    show(about)
    results: dict[str, Any] = {}
    if args.images_per_second is not None:
        results["hours"] = {n: hours(args.images, args.epochs, n * args.images_per_second) for n in args.gpus}
        print(f"\nhours of {args.epochs} epochs of {args.images:,} images, if N GPUs do N times as much as one")
        for count, value in results["hours"].items():
            print(f"{f'{count} x':>8}{value:10.1f}")
        save(args.json, about, results)
        return

    models = results["models"] = of_models()
    show_models(models)
    projectors = results["projectors"] = of_projectors(192, 3024)
    show_projectors(projectors, args.batch)
    results["hours"] = []
    for name in STUDENTS:
        for taught in (True, False):
            each = models[name]["training"] + (models["teacher"]["forward"] if taught else 0)
            print(
                f"\n{name}{', teacher included' if taught else ', teacher outputs kept'}: {each / 1e9:.1f} GF an image"
            )
            print(f"{'assumed':>10}{'images/s':>10}" + "".join(f"{f'h, {n} x':>12}" for n in args.gpus))
            for part in args.utilisation:
                speed = part * args.peak * 1e12 / each
                row = {n: hours(args.images, args.epochs, n * speed) for n in args.gpus}
                results["hours"].append(
                    {"student": name, "teacher": taught, "utilisation": part, "images_per_second": speed, "hours": row}
                )
                print(f"{100 * part:8.0f} %{speed:10.0f}" + "".join(f"{value:12.1f}" for value in row.values()))
    save(args.json, about, results)


if __name__ == "__main__":
    main()
