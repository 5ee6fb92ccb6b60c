"""How a projector's cost grows: with the teacher's width, with the student's, and with the batch.

    python -m benchmarks.scale [--threads 2] [--repeats 10] [--quick] [--json FILE]

Forward and backward of ``OrthogonalProjector`` with each map, and of ``nn.Linear``, which is the product alone: by the
teacher's width (student 192, 512 rows), by the rows of a batch (192 to 3,024), and by the student's width (teacher
3,072, 512 rows). Besides, of each map alone: forward and backward of the weight, in which the batch has no part. All
candidates take turns; medians. Memory is the most that is held at once, beyond what is held before; operations are
counted (see :mod:`benchmarks.flops`), so their exponents are the same on every machine.

An exponent p says that the cost goes as the p-th power of the size: the least-squares line through the logarithms of
the upper part of the range (the larger half of the sizes), where overheads no longer count.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.flops import operations
from benchmarks.measuring import exponent, in_turn, save, setting, show
from benchmarks.projector import LINEAR, ours, peak_mib, step
from vkd_plugin.projectors import OrthogonalProjector

STUDENT, TEACHER, ROWS = 192, 3024, 512
SWEEPS = {
    "teacher": [192, 384, 768, 1536, 3072, 6144, 8192],
    "rows": [64, 128, 256, 512, 1024, 2048, 4096],
    "student": [48, 96, 192, 384, 768],
}
QUICK = {"teacher": [1536, 3072, 6144], "rows": [512, 1024, 2048], "student": [96, 192, 384]}
WHOLE, MAP = "projector", "map"
FIGURES = ("milliseconds", "processor", "mib", "operations")


@dataclass(frozen=True)
class Row:
    """A candidate's cost at one size.

    Args:
        sweep: what grows: ``teacher``, ``student`` or ``rows``.
        size: of it.
        name: the map, or nn.Linear.
        what: the whole projector, or its map alone.
        milliseconds, processor: by the clock and of the processor.
        mib: most memory held at once.
        operations: counted.
    """

    sweep: str
    size: int
    name: str
    what: str
    milliseconds: float
    processor: float
    mib: float
    operations: int


def weigh(module: OrthogonalProjector, cotangent: Tensor) -> None:
    """Forward and backward of the weight alone."""
    module.raw_weight.grad = None
    module.weight.backward(cotangent)


def sizes_of(sweep: str, size: int) -> tuple[int, int, int]:
    """(student, teacher, rows) at a size of a sweep."""
    if sweep == "teacher":
        return STUDENT, size, ROWS
    if sweep == "student":
        return size, 3072, ROWS
    return STUDENT, TEACHER, size


def measure(sweep: str, size: int, repeats: int, device: str) -> list[Row]:
    """All candidates at one size."""
    student, teacher, rows = sizes_of(sweep, size)
    x = torch.randn(rows, student, device=device, requires_grad=True)
    cotangent, of_weight = (torch.randn(n, m, device=device) for n, m in ((rows, teacher), (teacher, student)))
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    modules: dict[str, nn.Module] = {LINEAR: nn.Linear(student, teacher, bias=False, device=device)}
    for name, module in (modules | ours(device, (student, teacher))).items():
        calls[name, WHOLE] = partial(step, module, x, cotangent)
        if isinstance(module, OrthogonalProjector) and sweep != "rows":
            calls[name, MAP] = partial(weigh, module, of_weight)
    peaks, counts = {}, {}
    for key, call in calls.items():
        counts[key] = operations(call)  # and warm
        peaks[key] = max(peak_mib(call, device) for _ in range(2))  # the profiler misses an allocation now and then

    def finished(call: Callable[[], None]) -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    times = in_turn({"/".join(key): partial(finished, call) for key, call in calls.items()}, repeats)
    found = []
    for name, what in calls:
        wall, cpu = times[f"{name}/{what}"]
        found.append(Row(sweep, size, name, what, 1e3 * wall, 1e3 * cpu, peaks[name, what], counts[name, what]))
    return found


def upper(sizes: list[int]) -> list[int]:
    """The larger half of the sizes, that in the middle included."""
    return sorted(sizes)[len(sizes) // 2 :]


def exponents(table: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Sweep -> ``name, what`` -> exponents of each figure of a row, over the upper sizes."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for sweep in dict.fromkeys(row.sweep for row in table):
        own = [row for row in table if row.sweep == sweep]
        sizes = upper(sorted({row.size for row in own}))
        for key in dict.fromkeys((row.name, row.what) for row in own):
            rows = [row for row in own if (row.name, row.what) == key and row.size in sizes]
            found.setdefault(sweep, {})[", ".join(key)] = {
                figure: exponent([row.size for row in rows], [getattr(row, figure) for row in rows])
                for figure in FIGURES
            }
    return found


def report(sweep: str, table: list[Row], fitted: Mapping[str, Mapping[str, float]]) -> None:
    student, teacher, rows = (
        "N" if name == sweep else str(value)
        for name, value in zip(("student", "teacher", "rows"), sizes_of(sweep, -1), strict=True)
    )
    sizes = list(dict.fromkeys(row.size for row in table))
    print(f"\n{student} -> {teacher}, {rows} rows: ms (MiB), by N")
    title = f"exponents, N >= {upper(sizes)[0]}"
    print(f"{'':24}" + "".join(f"{size:>16}" for size in sizes) + f"{title:>24}: ms (MiB), operations")
    for key, found in fitted.items():
        own = [row for row in table if f"{row.name}, {row.what}" == key]
        cells = [f"{row.milliseconds:.2f} ({row.mib:.1f})" for row in own]
        print(f"{key:24}" + "".join(f"{cell:>16}" for cell in cells), end="")
        print(f"{found['milliseconds']:18.2f} ({found['mib']:.2f}), {found['operations']:.2f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="three sizes of each sweep")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    about = setting("scale", args, argv)
    show(about)
    table: list[Row] = []
    for sweep, sizes in (QUICK if args.quick else SWEEPS).items():
        own = [row for size in sizes for row in measure(sweep, size, args.repeats, args.device)]
        report(sweep, own, exponents(own)[sweep])
        table += own
    save(args.json, about, {"rows": [asdict(row) for row in table], "exponents": exponents(table)})


if __name__ == "__main__":
    main()
