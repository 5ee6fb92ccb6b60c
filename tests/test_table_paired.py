"""Rows of a table compared seed by seed."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest

from vkd_plugin.cli import main
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.paired import Paired, compare

TABLE = """\
title: 'Compared'
metric: {top-1: 'top1', loss: 'loss'}
seeds: [0, 1, 2]
paired_with: 'linear'
rows:
  - name: 'orthogonal'
    config: 'experiment.yaml'
  - name: 'linear'
    config: 'experiment.yaml'
    set: ['a.b=1']
  - name: 'others'
    published: {value: {top-1: 99}, source: 'their paper', verified: True}
"""


def test_student_s_distribution_in_closed_form() -> None:
    """With one degree of freedom it is Cauchy's; with two its distribution function is algebraic."""
    two = compare({0: 3.0, 1: 5.0}, {0: 1.0, 1: 2.0})  # differences 2, 3: t = 2.5 / 0.5
    assert two == Paired(2.5, pytest.approx(1 - 2 / math.pi * math.atan(5.0)), 2)
    three = compare({0: 1.0, 1: 5.0, 2: 0.0}, {0: 0.0, 1: 2.0, 2: 5.0})  # 1, 3, -5
    t = (-1 / 3) / math.sqrt(((4 / 3) ** 2 + (10 / 3) ** 2 + (14 / 3) ** 2) / 2 / 3)
    assert three == Paired(pytest.approx(-1 / 3), pytest.approx(1 - abs(t) / math.sqrt(2 + t * t)), 3)


def test_only_seeds_of_both_count() -> None:
    assert compare({0: 1.0, 1: 2.0, 4: 9.0}, {1: 1.5, 7: 0.0}) == Paired(0.5, None, 1)
    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({}, {}) is None


def test_no_chance_where_all_differ_by_as_much() -> None:
    """Not even where rounding makes the differences differ."""
    other = {seed: 13.1 * (seed + 1) for seed in range(5)}
    assert len({(value + 0.3) - value for value in other.values()}) > 1
    assert compare({seed: value + 0.3 for seed, value in other.items()}, other) == Paired(pytest.approx(0.3), None, 5)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text("models: {model: {}}\n")
    Path("table.yaml").write_text(TABLE)
    values = {"orthogonal": [(91.0, 0.5), (93.0, 0.4)], "linear": [(90.0, 0.5), (90.5, 0.4), (80.0, 9.0)]}
    for run in load_table("table.yaml").all_runs():
        if run.seed < len(values[run.row.name]):
            top1, loss = values[run.row.name][run.seed]
            run.folder.mkdir(parents=True)
            (run.folder / "summary.json").write_text(
                json.dumps({"config": run.config, "overrides": run.overrides, "top1": top1, "loss": loss})
            )
    return Path("table.yaml")


def test_printed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(table), "--md"]) == 0
    header, _, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    titles = [title.strip() for title in header.split("|")]
    column = {title: titles.index(f"{title} against linear") for title in ("top-1", "loss")}
    cells = {line.split("|")[1].strip().split(" ")[0]: line.split("|") for line in lines}
    chance = 1 - 2 / math.pi * math.atan(1.75 / 0.75)
    assert cells["orthogonal"][column["top-1"]].strip() == f"+1.75 (p {chance:.3f})"
    assert cells["orthogonal"][column["loss"]].strip() == "+0.00"
    for name in ("linear", "others"):
        assert [cells[name][index].strip() for index in column.values()] == ["-", "-"]


def test_as_csv(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(table), "--csv"]) == 0
    first, second, *others = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["paired_with"], first["paired_difference"], first["paired_n"]) == ("linear", "1.75", "2")
    assert float(first["paired_p"]) == pytest.approx(1 - 2 / math.pi * math.atan(1.75 / 0.75))
    assert (second["paired_difference"], second["paired_p"]) == ("0.0", "")
    assert all(line["paired_difference"] == "" for line in others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lineer", "no row 'lineer' with an experiment in the table (did you mean 'linear'?)"),
        ("others", "no row 'others' with an experiment in the table"),
        ("[linear]", "'paired_with' should be text"),
    ],
)
def test_a_row_that_is_none(table: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    table.write_text(TABLE.replace("paired_with: 'linear'", f"paired_with: {name}"))
    assert main(["table", str(table)]) == 2
    assert capsys.readouterr().err.startswith(f"error: table.yaml:4:14: {message}")


OWN = TABLE.replace("    set: ['a.b=1']\n", "    set: ['a.b=1']\n    paired_with: 'released'\n").replace(
    "  - name: 'others'", "  - {name: 'released', config: 'experiment.yaml', set: ['a.b=2']}\n  - name: 'others'"
)


def test_a_row_names_another_row_than_the_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(OWN)
    folder = Path("runs/tables/table/released/seed1")
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"top1": 88.0, "loss": 0.1}))
    assert main(["table", str(table), "--md"]) == 0
    page = capsys.readouterr().out.split("\n\n")
    header, _, *lines = page[0].splitlines()
    titles = [title.strip() for title in header.split("|")]
    column = titles.index("top-1 paired difference")
    cells = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines}
    assert re.fullmatch(r"\+1\.75 \(p 0\.\d{3}\) \\\[1\\\]", cells["orthogonal"])
    assert cells["linear"] == r"+2.50 \[2\]"  # the one seed of both
    assert cells["released"] == r"-2.50 \[1\]"
    assert cells["others"] == "-"
    assert "1. against linear\n2. against released" in page[1]

    assert main(["table", str(table), "--csv"]) == 0
    bases = {line["row"]: line["paired_with"] for line in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert bases == {"orthogonal": "linear", "linear": "released", "released": "linear", "others": ""}


def test_one_partner_for_all_needs_no_footnote(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = TABLE.replace("paired_with: 'linear'\n", "")
    table.write_text(lines.replace("  - name: 'orthogonal'\n", "  - name: 'orthogonal'\n    paired_with: 'linear'\n"))
    assert main(["table", str(table), "--md"]) == 0
    page = capsys.readouterr().out
    assert "top-1 against linear" in page
    assert "1. against" not in page


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("    paired_with: 'lineer'", "no row 'lineer' with an experiment in the table (did you mean 'linear'?)"),
        ("    paired_with: 'others'", "no row 'others' with an experiment in the table"),
        ("    paired_with: [linear]", "'paired_with' should be text"),
    ],
)
def test_a_rows_partner_that_is_none(table: Path, capsys: pytest.CaptureFixture[str], row: str, message: str) -> None:
    table.write_text(TABLE.replace("  - name: 'orthogonal'\n", f"  - name: 'orthogonal'\n{row}\n"))
    assert main(["table", str(table)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: table.yaml:7:18: {message}")
    assert said.count(message) == 1


def test_a_published_figure_is_not_compared(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(TABLE + "    paired_with: 'linear'\n")
    assert main(["table", str(table)]) == 2
    assert "'paired_with' means nothing in a row without 'config'" in capsys.readouterr().err
