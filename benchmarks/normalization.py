"""Forward and backward time of each normalisation, as a ratio to a layer of torch.

    python benchmarks/normalization.py [--rows 512] [--channels 192] [--rounds 20] [--json FILE]

The candidates take turns within each round, so that a machine that slows down slows all of them; what is
printed is the median over the rounds of the ratio to torch's ``layer_norm`` and ``batch_norm`` (no affine)
in that round.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vkd_plugin.normalization import DEFAULT_EPS, normalize

LAYER_NORM, BATCH_NORM = "torch layer_norm", "torch batch_norm"


def candidates(channels: int) -> dict[str, Callable[[Tensor], Tensor]]:
    ours = {method: partial(normalize, method=method) for method in DEFAULT_EPS}
    return {
        LAYER_NORM: lambda x: F.layer_norm(x, (channels,)),
        BATCH_NORM: lambda x: F.batch_norm(x, None, None, training=True),
        **ours,
    }


def seconds(f: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Of one forward and backward."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f(x).backward(grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(rows: int, channels: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    x = torch.randn(rows, channels, device=device, requires_grad=True)
    grad = torch.randn(rows, channels, device=device)
    functions = candidates(channels)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, f in functions.items():
            elapsed = seconds(f, x, grad)
            if i >= 2:  # the first rounds warm up
                times[name].append(elapsed)

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))

    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "to_layer_norm": ratio(name, LAYER_NORM),
            "to_batch_norm": ratio(name, BATCH_NORM),
        }
        for name in functions
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--channels", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    results = measure(args.rows, args.channels, args.rounds, args.device)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor()
    setting = {
        "rows": args.rows,
        "channels": args.channels,
        "rounds": args.rounds,
        "device": f"{args.device} ({machine or platform.machine()}, {torch.get_num_threads()} threads)",
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'':18}{'ms':>10}{'/ layer_norm':>16}{'/ batch_norm':>16}")
    for name, r in results.items():
        print(f"{name:18}{r['milliseconds']:10.3f}{r['to_layer_norm']:16.2f}{r['to_batch_norm']:16.2f}")
    if args.json:
        args.json.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
