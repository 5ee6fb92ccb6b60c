"""Table files: what can be written in one, and one line for each mistake."""

from pathlib import Path

import pytest
import yaml

from vkd_plugin.cli import main
from vkd_plugin.results.table import load_table

ROOT = Path(__file__).parents[1]

GOOD = """\
title: 'A table'
metric: 'test.student.top1'
seeds: [0, 1]
rows:
  - name: 'Plain, no teacher'
    config: '{config}'
  - name: 'With teacher'
    config: '{config}'
    set: ['train.num_epochs=1']
    published: {{value: 78.30, source: 'paper, Table 2', verified: True}}
"""

COLUMNS = """\
title: 't'
metric: {'AP': 'best.val/AP', 'AP50': 'best.val/AP50'}
rows:
  - name: 'a'
    published: {value: {'AP': 43.0}, source: 's', verified: False}
  - name: 'b'
    config: 'experiment.yaml'
    metric: {'AP': 'last.val/AP'}
"""


@pytest.fixture
def table_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text("{}\n")
    file = Path("table.yaml")
    file.write_text(GOOD.format(config="experiment.yaml"))
    return file


def _errors(text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    Path("table.yaml").write_text(text)
    assert main(["table", "table.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


MISTAKES = [
    ("metric:", "metrik:", "2:1", "unknown key 'metrik' in a table (did you mean 'metric'?)"),
    ("title: 'A table'\n", "", "1:1", "a table needs 'title'"),
    ("title: 'A table'", "title: 'A table", "2:10", ""),
    ("title: 'A table'", "title: '...'", "1:8", "'title' should have a letter or a digit"),
    ("title: 'A table'", 'title: "A\\etable"', "1:8", "'title' has a character that cannot be printed"),
    ("title: 'A table'", "title: {{a: 1}}", "1:8", "'title' should be text"),
    ("title: 'A table'", "title:", "1:7", "'title' should be text"),
    ("title: 'A table'", "title: !!bool x", "1:8", "cannot read 'x' as bool"),
    ("title: 'A table'", "title: 2020-99-99", "1:8", "month must be in 1..12"),
    ("title: 'A table'", "title: !foo x", "1:8", "could not determine a constructor for the tag '!foo'"),
    ("seeds:", "title: 'again'\nseeds:", "3:1", "key 'title' is written twice"),
    ("seeds:", "? [1]\n: 2\nseeds:", "3:3", "a key of a table should be one of title, metric, seeds"),
    ("metric: 'test.student.top1'", "metric: {{}}", "2:9", "'metric' names no column"),
    ("metric: 'test.student.top1'", "metric: {{a: b, a: c}}", "2:16", "column 'a' is written twice"),
    ("metric: 'test.student.top1'", "metric: ['a']", "2:9", "'metric' should be text"),
    ("[0, 1]", "['a']", "3:8", "'seeds' should be a list of integers, none negative"),
    ("[0, 1]", "[true]", "3:8", "'seeds' should be a list of integers, none negative"),
    ("[0, 1]", "[-1]", "3:8", "'seeds' should be a list of integers, none negative"),
    ("[0, 1]", "3", "3:8", "'seeds' should be a list of integers, none negative"),
    ("[0, 1]", "[]", "3:8", "'seeds' should be a list of integers, none negative"),
    ("[0, 1]", "[1, 1]", "3:8", "'seeds' names one seed twice"),
    ("seeds:", "notes: [{{}}]\nseeds:", "3:9", "'notes' should be text"),
    ("With teacher", "plain no teacher", "7:5", "two rows are named 'plain no teacher' (both have the folder"),
    (
        "config: '{config}'\n    set",
        "config: 'experimnt.yaml'\n    set",
        "8:13",
        "no experiment file 'experimnt.yaml' (did you mean 'experiment.yaml'?)",
    ),
    ("config: '{config}'\n    set", "confg: '{config}'\n    set", "8:5", "unknown key 'confg' in a row (did you mean"),
    ("['train.num_epochs=1']", "'train.num_epochs=1'", "9:10", "'set' should be a list of 'a.b.c=value'"),
    ("['train.num_epochs=1']", "[1]", "9:10", "'set' should be a list of 'a.b.c=value'"),
    ("    config: '{config}'\n  -", "    note: 'x'\n  -", "5:5", "a row needs 'config' (an experiment) or 'published'"),
    ("    config: '{config}'\n    set", "    set", "8:10", "'set' means nothing in a row without 'config'"),
    ("value: 78.30, ", "", "10:16", "'published' needs 'value'"),
    ("verified: True", "verified: 'yes'", "10:67", "'verified' should be True (somebody has read it in the source)"),
    (", verified: True", "", "10:16", "'published' needs 'verified'"),
    ("'paper, Table 2'", "''", "10:39", "'source' should have a letter or a digit"),
    ("78.30", "'78.30'", "10:24", "'value' should be a number"),
    ("78.30", ".nan", "10:24", "'value' should be a number"),
    ("78.30", "True", "10:24", "'value' should be a number"),
    ("78.30", "{{'top1': 1}}", "10:25", "no column 'top1' in the table (choose from test.student.top1)"),
    ("rows:\n", "rows:\n  - 'x'\n", "5:5", "a row should be a mapping with the keys name, config,"),
    ("rows:\n", "rows: []\n_:\n", "4:7", "'rows' should be a list of rows"),
]


@pytest.mark.parametrize(("old", "new", "where", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_its_place(
    table_file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, where: str, message: str
) -> None:
    assert old in GOOD
    lines = _errors(GOOD.replace(old, new, 1).format(config="experiment.yaml"), capsys)
    assert len(lines) == 1
    assert lines[0].startswith(f"error: table.yaml:{where}: {message}")


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ("{'AP': 43.0}", "43.0", "5:24", "the table has several columns: write value: {'AP': ...}"),
        ("{'AP': 43.0}", "{'AP5': 43.0}", "5:25", "no column 'AP5' in the table (did you mean 'AP50'?)"),
        ("{'AP': 'last.val/AP'}", "'last.val/AP'", "8:13", "the table has several columns: write metric: {'AP': ...}"),
    ],
)
def test_a_mistake_in_a_table_of_several_columns(
    table_file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, where: str, message: str
) -> None:
    assert _errors(COLUMNS.replace(old, new), capsys) == [f"error: table.yaml:{where}: {message}"]


def test_all_mistakes_are_found_at_once(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GOOD.format(config="experiment.yaml")
    for old, new in (("[0, 1]", "0"), ("name: 'With", "nam: 'With"), ("True", "1"), ("'A table'", "")):
        text = text.replace(old, new)
    assert [line.split(": ")[1] for line in _errors(text, capsys)] == [
        "table.yaml:1:7",
        "table.yaml:3:8",
        "table.yaml:7:5",
        "table.yaml:10:67",
    ]


def test_a_file_that_is_not_there(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (
        ("nowhere/t.yaml", "nowhere/t.yaml: No such file or directory"),
        ("tabel.yaml", "tabel.yaml: No such file or directory (did you mean 'table.yaml'?)"),
        (".", ".: Is a directory"),
    ):
        assert main(["table", name]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"
    assert _errors("", capsys) == ["error: table.yaml: the file is empty"]


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tabel"]) == 2
    assert capsys.readouterr().err == (
        "error: no command 'tabel' (did you mean 'table'?); to train: run.py --config C\n"
    )


def test_a_row_has_its_own_seeds_and_metrics_or_the_tables(table_file: Path) -> None:
    table_file.write_text(COLUMNS.replace("    metric:", "    seeds: [7]\n    metric:"))
    published, own = load_table(table_file).rows
    assert (published.config, published.seeds) == (None, (0,))
    assert own.seeds == (7,)
    assert [(column.title, column.metric) for column in own.columns] == [
        ("AP", "last.val/AP"),
        ("AP50", "best.val/AP50"),
    ]


def test_the_student_of_each_run_has_its_own_file(table_file: Path) -> None:
    Path("experiment.yaml").write_text(
        "models:\n  teacher_model: {dst_ckpt: 'x.pt'}\n  student_model: &s\n    <<: {dst_ckpt: 'y.pt'}\n"
    )
    (run, other, *_) = load_table(table_file).all_runs()
    assert run.overrides == ("models.student_model.dst_ckpt=runs/tables/table/plain-no-teacher/seed0/student.pt",)
    assert run.overrides != other.overrides
    for nothing in ("models: {model: {dst_ckpt: null}}", "models: {model: {}}", "models: []", "- x", "'"):
        Path("experiment.yaml").write_text(nothing)
        assert next(load_table(table_file).all_runs()).overrides == ()


def test_the_teacher_is_tested_where_a_column_asks_for_it(table_file: Path) -> None:
    def alone() -> list[bool]:
        return ["-student_only" in run.arguments for run in load_table(table_file).all_runs()]

    assert not any(alone())
    Path("experiment.yaml").write_text("models: {teacher_model: {key: 'x'}, student_model: {key: 'y'}}")
    assert all(alone())
    table_file.write_text(COLUMNS.replace("best.val/AP50", "test.teacher.AP50"))
    assert not any(alone())


def test_the_home_of_the_runs(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere, usual = (load_table(table_file, home) for home in ("some where", None))
    (run, *_), (other, *_) = elsewhere.all_runs(), usual.all_runs()
    assert run.folder.relative_to("some where") == other.folder.relative_to("runs", "tables")
    assert main(["table", str(table_file), "--runs", "some where", "--csv"]) == 0
    assert f"--output '{run.folder}'" in capsys.readouterr().out


def test_a_name_that_yaml_would_not_take_for_text_is_quoted(table_file: Path) -> None:
    Path("experiment.yaml").write_text("models: {model: {dst_ckpt: 'y.pt'}}")
    odd = table_file.rename("a: b #c.yaml")
    override = next(load_table(odd).all_runs()).overrides[-1]
    assert yaml.safe_load(override.partition("=")[2]) == "runs/tables/a: b #c/plain-no-teacher/seed0/student.pt"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_table(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    table = load_table(path)
    raw = yaml.safe_load(path.read_text())["rows"]
    assert [row.name for row in table.rows] == [row["name"] for row in raw]
    for row, written in zip(table.rows, raw, strict=True):
        assert row.config or row.published
        if row.published:
            assert row.published.figures
            assert len(row.published.source) > 5
            assert row.published.verified is written["published"]["verified"]
            assert row.published.verified or "from memory" in row.published.source or "README" in row.published.source
    assert main(["table", str(path), "--md"]) == 0
    out = capsys.readouterr().out
    unverified = sum(len(row.published.figures) for row in table.rows if row.published and not row.published.verified)
    assert out.count(" unverified ") == unverified


def test_the_papers_figures_are_in_the_shipped_tables() -> None:
    def shown(name: str, column: str) -> dict[str, str]:
        rows = load_table(ROOT / "configs" / "tables" / f"{name}.yaml").rows
        found = {row.name: row.published.figures for row in rows if row.published}
        return {name: figures[column].text for name, figures in found.items() if column in figures}

    imagenet, coco = shown("imagenet", "top-1"), shown("coco", "AP")
    assert [imagenet[f"DeiT-Ti: VkD, {which}"] for which in ("paper", "rerun by its authors")] == ["78.3", "79.2"]
    assert [imagenet[f"DeiT-S: VkD, {which}"] for which in ("paper", "rerun by its authors")] == ["82.3", "82.9"]
    assert [coco[f"Swin-{size}: VkD, teacher base"] for size in ("nano", "tiny", "small")] == ["43.0", "46.9", "48.5"]
    assert shown("imagenet_ablation", "top-1") == {
        "VkD: orthogonal projector, layer norm": "78.3",
        "projector: linear, no normalisation": "76.3",
        "projector: orthogonal, no normalisation": "77.9",
    }
    assert [*shown("ablation_whitening", "FID (lower is better)").values()][:2] == ["13.714", "14.230"]
