"""What the runs of a table have recorded."""

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vkd_plugin.errors import ConfigError
from vkd_plugin.suggest import nearest

from ..summary import read_summary
from .data import Column, Figure, Row, Run, Table
from .paired import Paired, compare

_PLACE_OF_STUDENT = re.compile(r"\s*models\.\w+\.dst_ckpt\s*=")
"""Of an override that decides nothing but where the trained student is put."""


@dataclass(frozen=True)
class Cell:
    """One row's figures in one column.

    Attributes:
        by_seed: a value of each seed that has run.
        published: None where nobody has published one.
        paired: against the same column of the row that the table or the row itself names; None where there is nothing
            to compare.
    """

    column: Column
    by_seed: Mapping[int, float]
    published: Figure | None
    paired: Paired | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """In the order of the seeds."""
        return tuple(self.by_seed.values())

    @property
    def mean(self) -> float | None:
        """None without values."""
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None of less than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Measured mean minus published figure; None where one of them is missing."""
        return None if self.mean is None or self.published is None else self.mean - self.published.value


@dataclass(frozen=True)
class Line:
    """One row with what its runs have come to.

    Attributes:
        cells: one for each column.
        done: how many of the row's seeds have run.
        missing: the runs of the others.
        minutes: of a run, on average; None without one.
    """

    row: Row
    cells: tuple[Cell, ...]
    done: int
    missing: tuple[Run, ...]
    minutes: float | None


def measure(table: Table) -> list[Line]:
    """All rows of a table.

    Raises:
        UserError: a summary that cannot be read, or has no such metric.
    """
    lines = [_line(table, row) for row in table.rows]
    by_name = {line.row.name: line for line in lines}
    bases = [table.base(line.row) for line in lines]
    return [line if base is None else _compared(line, by_name[base]) for line, base in zip(lines, bases, strict=True)]


def missing_runs(table: Table) -> list[Run]:
    """Those that have no result yet."""
    return [run for run in table.all_runs() if summary(run) is None]


def summary(run: Run) -> dict[str, Any] | None:
    """What the run recorded; None without one, or where it was another experiment than the row is now.

    Raises:
        UserError: its ``summary.json`` cannot be read.
    """
    file = run.folder / "summary.json"
    if not file.is_file():
        return None
    found = read_summary(file)
    recorded = found.get("overrides", [*run.overrides])
    ran = (found.get("config", run.config), _deciding(recorded if isinstance(recorded, list) else [recorded]))
    return found if ran == (run.config, _deciding([*run.overrides])) else None


def _deciding(overrides: list[Any]) -> list[Any]:
    """Overrides without those that only say where the student is put."""
    return [override for override in overrides if not _PLACE_OF_STUDENT.match(str(override))]


def _line(table: Table, row: Row) -> Line:
    runs = [(run, summary(run)) for run in table.runs(row)]
    done = [(run, found) for run, found in runs if found is not None]
    published = row.published.figures if row.published else {}
    cells = tuple(
        Cell(column, {run.seed: _value(run, found, column) for run, found in done}, published.get(column.title))
        for column in row.columns
    )
    seconds = [found["wall_seconds"] for _, found in done if isinstance(found.get("wall_seconds"), (int, float))]
    minutes = statistics.mean(seconds) / 60 if seconds else None
    return Line(row, cells, len(done), tuple(run for run, found in runs if found is None), minutes)


def _compared(line: Line, base: Line) -> Line:
    pairs = zip(line.cells, base.cells, strict=True)
    return replace(line, cells=tuple(replace(cell, paired=compare(cell.by_seed, to.by_seed)) for cell, to in pairs))


def _value(run: Run, found: dict[str, Any], column: Column) -> float:
    value: Any = found
    file = run.folder / "summary.json"
    for key in column.metric.split("."):
        if not isinstance(value, dict) or key not in value:
            choices = value if isinstance(value, dict) else ()
            raise ConfigError(f"metric '{column.metric}': {file} has no '{key}'{nearest(key, choices)}", column.where)
        value = value[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"metric '{column.metric}': {file} holds no number, but {json.dumps(value)}", column.where)
    return float(value)
