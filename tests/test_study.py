"""The study's page, tables and runs fit each other: no table is typed by hand, and all methods are tuned alike."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Row, Table
from vkd_plugin.results.table.measured import measure, summary

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "study"
TUNING = {"fashion_mnist_methods": "fashion_mnist_tuning", "fashion_mnist_short_grid": "fashion_mnist_short_tuning"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # tables name their experiments from there


@pytest.fixture(scope="module")
def study_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_tables", ROOT / "docs" / "study_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_of(name: str) -> Table:
    return load_table(ROOT / "configs" / "tables" / f"{name}.yaml", STUDY)


def test_the_page_shows_what_the_runs_came_to(study_tables: ModuleType) -> None:
    page = (ROOT / "docs" / "study.md").read_text("utf-8")
    for name in study_tables.MAKERS:
        assert f"<!-- {name} -->" in page
    assert study_tables.written_anew(page) == page, "run python docs/study_tables.py"


def test_a_changed_figure_would_be_found(study_tables: ModuleType) -> None:
    page = f"before <!-- methods -->\n\n{study_tables.methods()}\n\n<!-- end --> after"
    assert study_tables.written_anew(page) == page
    assert (
        study_tables.written_anew(page.replace("logits + linear projector | 80", "logits + linear projector | 81"))
        == page
    )


def test_every_run_belongs_to_a_row_as_it_is_now() -> None:
    known: set[Path] = set()
    for folder in STUDY.iterdir():
        for run in table_of(folder.name).all_runs():
            if (run.folder / "summary.json").is_file():
                assert summary(run) is not None, f"{run.folder}: another experiment than the row is now"
                known.add(run.folder / "summary.json")
    assert set(STUDY.rglob("summary.json")) == known


def test_every_run_was_made_with_the_seed_of_its_folder() -> None:
    for file in STUDY.rglob("summary.json"):
        assert f"seed{json.loads(file.read_text())['seed']}" == file.parent.name


def weights(table: Table) -> Iterator[tuple[Row, str]]:
    """The rows that have a weight to choose, and the weight."""
    for row in table.rows:
        for override in row.overrides:
            path, _, value = override.partition("=")
            if path.endswith(".weight"):
                yield row, value


@pytest.mark.parametrize("name", TUNING)
def test_each_row_has_the_weight_that_was_best_in_tuning(name: str) -> None:
    """Chosen by one rule: among the same values for all, by validation accuracy."""
    found: dict[str, dict[str, float]] = {}
    tried: dict[str, set[str]] = {}
    for line in measure(table_of(TUNING[name])):
        method, _, weight = line.row.name.rpartition(": ")
        tried.setdefault(method, set()).add(weight)
        if line.cells[0].mean is not None:
            found.setdefault(method, {})[weight] = line.cells[0].mean
    assert len({frozenset(values) for values in tried.values()}) == 1
    compared = 0
    for row, weight in weights(table_of(name)):
        method = method_of(row.name)
        values = found[method]
        assert values.keys() == tried[method], f"{method}: not all weights have been tried"
        assert weight == max(values, key=lambda w: values[w]), row.name
        compared += 1
    assert compared > 5


def method_of(row: str) -> str:
    """How tuning calls what a row has: the weight of one orthogonal map is that of all, and of the released one."""
    if row.startswith("logits + "):
        kind = row.removeprefix("logits + ").partition(" projector")
        projector = {"released": "orthogonal"}.get(kind[0], kind[0])
        return f"{projector}, layer_norm" if kind[1] else projector
    projector, _, normalization = row.rpartition(", ")
    return f"{projector.partition(' (')[0]}, {normalization}"


def test_seeds_of_tuning_are_used_for_nothing_else() -> None:
    for name in (*TUNING, "fashion_mnist_data"):
        seeds = {run.seed for run in table_of(name).all_runs()}
        assert len(seeds) >= 5
        for tuning in TUNING.values():
            assert not seeds & {run.seed for run in table_of(tuning).all_runs()}
