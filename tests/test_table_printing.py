"""Printed tables: measured beside published, what is missing, and text that means itself in every form."""

import csv
import io
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vkd_plugin.cli import main
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Run

TABLE = """\
title: 'A [red]table[/red] <b>'
metric: 'test.student.top1'
seeds: [0, 1, 2]
notes: 'A note of the table.'
rows:
  - name: 'Plain | [bold]'
    config: 'experiment.yaml'
    published: {value: 90.50, source: 'its paper', verified: False}
    note: 'a <note>'
  - name: 'With teacher'
    config: 'experiment.yaml'
    set: ['a.b={c: 1}']
  - name: 'Others'
    published: {value: 99, source: 'their paper', verified: True}
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two of the first row's three runs have finished, none of the second's."""
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text("models: {model: {dst_ckpt: 'student.pt'}}\n")
    Path("table.yaml").write_text(TABLE)
    runs = [*load_table("table.yaml").all_runs()]
    _finish(runs[0], 90.0)
    _finish(runs[2], 92.0)
    return runs


def _finish(run: Run, top1: float, **more: object) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    summary = {"test": {"student": {"top1": top1}}, "wall_seconds": 90, **more}
    (run.folder / "summary.json").write_text(json.dumps(summary))


def _printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["table", "table.yaml", *flags]) == 0
    return capsys.readouterr().out


def test_markdown(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    command = "python run.py --config experiment.yaml"
    assert _printed(capsys, "--md").splitlines() == [
        "|  | test.student.top1 | published | difference | seeds | minutes per run |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Plain \\| \\[bold\\] \\[1\\] | 91.00 ± 1.41 | 90.50 unverified \\[2\\] | +0.50 "
        "| 2 of 3 (seed 1 missing) | 1.5 |",
        "| With teacher | - | - | - | 0 of 3 | - |",
        "| Others | - | 99 \\[3\\] | - | no experiment | - |",
        "",
        "1. a \\<note>",
        "2. its paper",
        "3. their paper",
        "",
        "A note of the table.",
        "",
        "To run:",
        "",
        "```sh",
        f"{command} --set models.model.dst_ckpt=runs/tables/table/plain-bold/seed1/student.pt"
        " --seed 1 --output runs/tables/table/plain-bold/seed1",
        *(
            f"{command} --set 'a.b={{c: 1}}' --set models.model.dst_ckpt=runs/tables/table/with-teacher/{s}/student.pt"
            f" --seed {s[-1]} --output runs/tables/table/with-teacher/{s}"
            for s in ("seed0", "seed1", "seed2")
        ),
        "```",
    ]


def test_the_terminal(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    out = _printed(capsys)
    assert "A [red]table[/red] <b>" in out
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in out.splitlines() if "│" in line]
    assert cells == [
        ["Plain | [bold] [1]", "91.00 ± 1.41", "90.50 unverified [2]", "+0.50", "2 of 3 (seed 1 missing)", "1.5"],
        ["With teacher", "-", "-", "-", "0 of 3", "-"],
        ["Others", "-", "99 [3]", "-", "no experiment", "-"],
    ]
    assert "\n[1] a <note>\n[2] its paper\n[3] their paper\nA note of the table.\n" in out
    shown = [shlex.split(line.removeprefix("to run: ")) for line in out.splitlines() if line.startswith("to run: ")]
    assert shown == [["python", "run.py", *run.arguments] for run in (runs[1], *runs[3:])]


def test_csv(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    plain, teacher, others = csv.DictReader(io.StringIO(_printed(capsys, "--csv")))
    figures = {key: float(plain[key]) for key in ("mean", "std", "n", "published", "difference", "minutes_per_run")}
    assert figures == pytest.approx(
        {"mean": 91, "std": 2**0.5, "n": 2, "published": 90.5, "difference": 0.5, "minutes_per_run": 1.5}
    )
    assert plain["row"] == "Plain | [bold]"
    assert (plain["metric"], plain["source"], plain["verified"]) == ("test.student.top1", "its paper", "false")
    assert (plain["missing_seeds"], plain["note"], plain["config"]) == ("1", "a <note>", "experiment.yaml")
    assert plain["to_run"] == shlex.join(["python", "run.py", *runs[1].arguments])
    assert [teacher[key] for key in ("mean", "std", "n", "published", "verified")] == ["", "", "0", "", ""]
    assert teacher["missing_seeds"] == "0 1 2"
    assert [others[key] for key in ("mean", "n", "published", "verified", "config")] == ["", "0", "99.0", "true", ""]


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    page = _Cells()
    page.feed(_printed(capsys, "--html"))
    assert not {"b", "note", "red", "bold"} & {*page.tags}
    for text in ("A [red]table[/red] <b>", "Plain | [bold] [1]", "91.00 ± 1.41", "90.50 unverified [2]", "a <note>"):
        assert text in page.texts
    assert shlex.join(["python", "run.py", *runs[1].arguments]) in "".join(page.texts)


def test_several_columns(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    text = TABLE.replace("'test.student.top1'", "{'top-1': 'test.student.top1', 'minutes': 'wall_seconds'}")
    text = text.replace("value: 90.50", "value: {'minutes': 80}").replace("value: 99", "value: {'minutes': 7}")
    Path("table.yaml").write_text(text)
    header, _, plain, *_ = _printed(capsys, "--md").splitlines()
    assert header == "|  | top-1 | minutes | minutes published | minutes difference | seeds | minutes per run |"
    assert plain.split(" | ")[1:5] == ["91.00 ± 1.41", "90.00 ± 0.00", "80 unverified \\[2\\]", "+10.00"]
    rows = [*csv.DictReader(io.StringIO(_printed(capsys, "--csv")))]
    assert [(row["metric"], row["mean"], row["published"]) for row in rows[:2]] == [
        ("top-1", "91.0", ""),
        ("minutes", "90.0", "80.0"),
    ]


def test_a_table_without_published_figures_or_without_experiments(
    runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = TABLE.splitlines()
    Path("table.yaml").write_text("\n".join(line for line in lines[:12] if "published" not in line))
    assert _printed(capsys, "--md").splitlines()[0] == "|  | test.student.top1 | seeds | minutes per run |"
    Path("table.yaml").write_text("\n".join(lines[:5] + lines[12:]))
    out = _printed(capsys, "--md")
    assert out.splitlines()[:3:2] == [
        "|  | test.student.top1 published | seeds |",
        "| Others | 99 \\[1\\] | no experiment |",
    ]
    assert "To run" not in out


def test_a_result_counts_wherever_the_student_was_put(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    own = [*runs[3].overrides]
    for overrides, counts in (
        (own, True),
        (["a.b={c: 1}"], True),  # recorded before runs kept their students apart
        (["a.b={c: 1}", "models.model.dst_ckpt=elsewhere.pt"], True),
        (["a.b={c: 2}", own[-1]], False),
        ([own[-1]], False),
    ):
        _finish(runs[3], 80.0, config="experiment.yaml", overrides=overrides)
        assert ("| With teacher | 80.00 |" in _printed(capsys, "--md")) is counts
    _finish(runs[3], 80.0, config="other.yaml", overrides=own)
    assert "| With teacher | - |" in _printed(capsys, "--md")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("test.student.top_1", "has no 'top_1' (did you mean 'top1'?)"),
        ("test.student", 'holds no number, but {"top1": 90.0}'),
        ("wall_seconds.x", "has no 'x'"),
    ],
)
def test_a_metric_that_runs_do_not_record(
    runs: list[Run], capsys: pytest.CaptureFixture[str], metric: str, message: str
) -> None:
    Path("table.yaml").write_text(TABLE.replace("test.student.top1", metric))
    assert main(["table", "table.yaml"]) == 2
    file = "runs/tables/table/plain-bold/seed0/summary.json"
    assert capsys.readouterr().err == f"error: table.yaml:2:9: metric '{metric}': {file} {message}\n"
