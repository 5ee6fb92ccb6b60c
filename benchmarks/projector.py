"""What an orthogonal projector costs: forward and backward, time and peak memory, against ``nn.Linear``.

    python -m benchmarks.projector [--device cuda] [--threads 2] [--repeats 20] [--quick] [--json OUT]

Every ratio is one of medians of alternating measurements: in each round every candidate runs once, so that what
else the machine does falls on all of them alike. A round takes the projector's forward on a batch and the backward
to the input and the parameters. Beside ours: torch's ``parametrizations.orthogonal`` (without its base, the same
function) and geotorch's ``orthogonal``, which form n x n matrices and are run once or twice only.
"""

import argparse
import contextlib
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile

from vkd_plugin.projectors import OrthogonalProjector
from vkd_plugin.stiefel import ORTHOGONAL_MAPS

LINEAR = "nn.Linear"
# (in_features, out_features, rows of the batch): DeiT-Ti and DeiT-S to RegNetY-160, rows as images and as fewer;
# a detector's 256 to 256; a teacher narrower than the student.
CASES = [(192, 3024, 512), (192, 3024, 2048), (384, 3024, 512), (256, 256, 2048), (768, 192, 512)]
SLOW_CASES = CASES[:1]
SLOW_REPEATS = {"torch matrix_exp": 1, "geotorch matrix_exp": 1}


@dataclass
class Row:
    """A candidate's medians at one size."""

    in_features: int
    out_features: int
    rows: int
    name: str
    milliseconds: float
    ratio: float
    peak_mib: float | None  # None: too slow to run once more
    repeats: int


def ours(device: str, sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: OrthogonalProjector(*sizes, orthogonal_map=name, device=device) for name in ORTHOGONAL_MAPS}


def others(device: str, sizes: tuple[int, int]) -> dict[str, nn.Module]:
    def linear() -> nn.Linear:
        return nn.Linear(*sizes, bias=False, device=device)

    modules: dict[str, nn.Module] = {
        f"torch {name}": parametrizations.orthogonal(linear(), orthogonal_map=name, use_trivialization=False)
        for name in ("householder", "cayley", "matrix_exp")
    }
    with contextlib.suppress(ImportError):
        import geotorch

        for name, triv in (("matrix_exp", "expm"), ("cayley", "cayley")):
            module = linear()
            geotorch.orthogonal(module, "weight", triv)
            modules[f"geotorch {name}"] = module
    return modules


def step(module: nn.Module, x: Tensor, cotangent: Tensor) -> None:
    """One forward and backward, gradients written anew as after ``zero_grad``."""
    for p in (x, *module.parameters()):
        p.grad = None
    module(x).backward(cotangent)


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(run: Callable[[], None], device: str) -> float:
    """The most memory that ``run`` held at once beyond what it found, in MiB, as torch's own allocator saw it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def measure(case: tuple[int, int, int], repeats: int, device: str, slow: bool) -> list[Row]:
    in_features, out_features, rows = case
    x = torch.randn(rows, in_features, device=device, requires_grad=True)
    cotangent = torch.randn(rows, out_features, device=device)
    sizes = (in_features, out_features)
    modules = {LINEAR: nn.Linear(*sizes, bias=False, device=device), **ours(device, sizes)}
    rounds = dict.fromkeys(modules, repeats)
    if slow:
        rivals = others(device, sizes)
        modules |= rivals
        rounds |= {name: min(repeats, SLOW_REPEATS.get(name, 2)) for name in rivals}

    runs = {name: partial(step, module, x, cotangent) for name, module in modules.items()}
    peaks: dict[str, float] = {}
    for name, run in runs.items():
        if name not in SLOW_REPEATS:
            run()  # warm
            peaks[name] = peak_mib(run, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name, run in runs.items():
            if i < rounds[name]:
                times[name].append(seconds(run, device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return [
        Row(
            *case, name, 1e3 * t, t / medians[LINEAR], peaks.get(name), len(times[name])
        )
        for name, t in medians.items()
    ]  # fmt: skip


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projector", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="the first size only, without the slow rivals")
    parser.add_argument("--no-rivals", action="store_true", help="leave torch's and geotorch's versions out")
    parser.add_argument("--json", metavar="OUT", help="write the rows and the machine to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    about: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.projector", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": "float32",
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{k} {v}" for k, v in about.items() if k != "command"))
    table: list[Row] = []
    for case in CASES[:1] if args.quick else CASES:
        slow = case in SLOW_CASES and not (args.quick or args.no_rivals)
        print(f"\n{case[0]} -> {case[1]}, {case[2]} rows")
        print(f"  {'':22}{'ms':>10}{'ratio':>9}{'peak MiB':>10}")
        for row in measure(case, args.repeats, args.device, slow):
            peak = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
            print(f"  {row.name:22}{row.milliseconds:10.2f}{row.ratio:9.2f}{peak:>10}", flush=True)
            table.append(row)
    about["process_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.json:
        with open(args.json, "w") as f:
            json.dump({**about, "rows": [asdict(row) for row in table]}, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
