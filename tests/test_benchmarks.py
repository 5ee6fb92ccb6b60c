"""The benchmarks answer to ``--help``, and what they compute from what they measure is right. No time is asserted."""

import argparse
import importlib
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # they are no part of what is installed

from benchmarks import __main__ as all_of_them  # noqa: E402
from benchmarks import engine, flops, measuring, scale, teacher_cache  # noqa: E402
from benchmarks.measuring import Taken  # noqa: E402

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


class _ParsedError(Exception):
    """Ends a script as soon as its arguments are understood."""


@pytest.mark.parametrize("name", all_of_them.SHORT)
def test_the_arguments_of_a_short_round_are_those_of_the_script(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [name, *all_of_them.SHORT[name], "--json", "out.json"])
    with pytest.raises(_ParsedError):
        importlib.import_module(f"benchmarks.{name}").main()


def test_a_short_round_names_what_is_there_and_goes_on_where_one_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands = []

    def run(command: list[str]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1 if "benchmarks.projector" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", str(tmp_path)])
    assert all_of_them.main() == 1
    assert capsys.readouterr().err == "error: failed: projector\n"
    names = [command[2].removeprefix("benchmarks.") for command in commands]
    assert set(names) == set(all_of_them.SHORT)
    assert set(names) <= set(SCRIPTS)
    assert [command[-2:] for command in commands] == [["--json", str(tmp_path / f"{name}.json")] for name in names]


# --- what they share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.5])
def test_the_exponent_of_a_power_law(power: float) -> None:
    sizes = [3, 17, 64, 1000]
    # Logarithms of numbers up to 1e8 have a rounding error of 4e-15.
    assert measuring.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_a_least_squares_slope() -> None:
    """Of (0, 0), (1, 1), (2, 0), (3, 1) in logarithms to the base 2: 1/5."""
    assert measuring.exponent([1, 2, 4, 8], [1, 2, 1, 2]) == pytest.approx(0.2)


@pytest.mark.parametrize(("sizes", "values"), [([2], [1]), ([2, 2], [1, 3]), ([1, 2], [0, 1]), ([1, 2], [1, 2, 3])])
def test_an_exponent_that_is_none(sizes: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="exponent"):
        measuring.exponent(sizes, values)


def test_calls_take_turns_and_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    seconds = {"a": iter([5.0, 1.0, 2.0]), "b": iter([4.0, 4.0, 10.0])}
    now = 0.0

    def call(name: str) -> None:
        nonlocal now
        made.append(name)
        now += next(seconds[name])

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: now / 2)
    times = measuring.in_turn({"a": lambda: call("a"), "b": lambda: call("b")}, 3)
    assert made == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": Taken(2.0, 1.0), "b": Taken(4.0, 2.0)}
    assert measuring.ratios(times, "a") == {"a": Taken(1.0, 1.0), "b": Taken(2.0, 2.0)}


# --- each of them ---------------------------------------------------------------------------------------------


def test_three_loops_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine is compared with computes what it computes: forward, losses, gradients, AdamW."""
    monkeypatch.chdir(ROOT)
    loops = engine.loops(engine.CONFIGS["quickstart"], tmp_path)
    batches = list(itertools.islice(loops[1].loader, 3))
    losses = {loop.name: [loop.step(*batch) for batch in batches] for loop in loops}
    loops[0].close()
    assert losses["bare"][0] != losses["bare"][1]
    for name in ("torchdistill", "engine"):
        # They agree to the last bit here. Kernels may take sums in another order: some roundings of 6e-8 each.
        assert losses[name] == pytest.approx(losses["bare"], rel=1e-6)


def test_parts_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call within another is not counted twice."""
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "process_time", lambda: now)
    parts = engine.Parts()
    inner = parts.timed("inner", lambda: spend(2.0))

    def both() -> None:
        spend(1.0)
        inner()
        spend(4.0)

    class Owner:
        def method(self) -> None:
            spend(8.0)

    owner = Owner()
    parts.timed("outer", both)()
    with parts.watch("method", owner, "method"):
        owner.method()
    owner.method()
    assert list(parts.iterated("data", [1, 2])) == [1, 2]
    assert parts.seconds == {"inner": 2.0, "outer": 5.0, "method": 8.0, "data": 0.0}


def test_the_upper_part_of_a_range() -> None:
    assert scale.upper([192, 384, 768, 1536, 3072, 6144, 8192]) == [1536, 3072, 6144, 8192]
    assert scale.upper([4, 2, 1, 3]) == [3, 4]


def test_exponents_by_sweep_and_candidate() -> None:
    """A cost that is constant at first and quadratic later is quadratic."""
    rows = [scale.Row("teacher", n, "polar", "map", max(n, 8) ** 2, n, 3.0, n**3) for n in (2, 4, 8, 16, 32)]
    found = scale.exponents(rows)["teacher"]["polar, map"]
    expected = {"milliseconds": 2.0, "processor": 1.0, "mib": 0.0, "operations": 3.0}
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_size_of_a_sweep() -> None:
    rows = scale.measure("student", 8, 1, "cpu")
    assert {row.what for row in rows} == {scale.WHOLE, scale.MAP}
    assert {row.name for row in rows if row.what == scale.MAP} == {r.name for r in rows} - {scale.LINEAR}
    assert all(row.milliseconds > 0 and row.mib > 0 for row in rows)
    assert next(row.operations for row in rows if row.name == scale.LINEAR) == 3 * 2 * 8 * 3072 * 512
    assert scale.sizes_of("teacher", 7) == (192, 7, 512)
    assert scale.sizes_of("rows", 7) == (192, 3024, 7)


def test_operations_are_counted() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert flops.operations(lambda: a @ b) == 2 * 3 * 4 * 5
    square = torch.eye(6)
    assert flops.operations(lambda: torch.linalg.inv_ex(square)) == 2 * 6**3
    assert flops.operations(lambda: torch.linalg.cholesky_ex(square)) == 6**3 / 3
    assert flops.operations(lambda: torch.linalg.solve_triangular(square, torch.ones(6, 2), upper=True)) == 6 * 6 * 2
    assert flops.operations(lambda: torch.linalg.eigh(square)) == 9 * 6**3


def test_operators_are_counted_where_they_compute_something() -> None:
    a = torch.ones(3, 4)
    assert flops.launches(lambda: (a.t() + 1).exp().t()) == 2


def test_what_is_kept_for_the_backward_pass() -> None:
    """A ReLU keeps its output, which is the next layer's input, once; a layer its input; parameters do not count."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        assert flops.kept_bytes(model, torch.empty(4, 3)) == 4 * (4 * 3 + 4 * 5)


def test_the_maps_products_are_linear_in_the_teachers_width() -> None:
    """Of k x k cores and n x k products, only the latter grow."""
    counts = [flops.of_projectors(4, n) for n in (16, 32, 48)]
    for name in counts[0]:
        for where in ("gpu", "cpu"):
            first, second, third = (count[name][where] for count in counts)
            assert 0 < second - first == third - second, (name, where)
        assert counts[0][name]["product"] == 6 * 4 * 16


def test_hours() -> None:
    assert flops.hours(images=7200, epochs=3, images_per_second=2.0) == 3.0


def test_bytes_of_a_sample(tmp_path: Path) -> None:
    for name, size in (("a/view-0000.rows", 600), ("a/view-0000.sums", 40), ("b/view-0000.rows", 100), ("a/x", 7)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    assert teacher_cache.bytes_of_a_sample(tmp_path, 10) == 74


def test_reading_rows() -> None:
    found: dict[str, Any] = teacher_cache.reading(samples=8, batch=4, rounds=1)
    assert found.pop("bytes") == 8048
    assert all(value > 0 for value in found.values())
