"""A table in memory: what its file says, and which command makes which of its results."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Column:
    """One measured quantity.

    Attributes:
        title: as it is printed.
        metric: path into a run's ``summary.json``, joined by dots.
        where: ``FILE:LINE:COLUMN`` of the path.
    """

    title: str
    metric: str
    where: str


@dataclass(frozen=True)
class Figure:
    """A published number, and how it is written: 77.0 has been measured to a tenth."""

    value: float
    text: str


@dataclass(frozen=True)
class Published:
    """What others have measured.

    Attributes:
        figures: by the columns' titles; not every column needs one.
        source: where it is printed.
        verified: whether it was read there.
    """

    figures: Mapping[str, Figure]
    source: str
    verified: bool


@dataclass(frozen=True)
class Row:
    """One line of a table: an experiment changed by overrides, published figures, or both.

    Attributes:
        columns: the table's, with the row's own metrics where it has some.
        config: the experiment file; None where only published figures are shown.
        overrides: ``a.b.c=value`` each.
        has_teacher: whether the experiment has one.
        saved: the key under ``models`` of a student that the experiment saves at a ``dst_ckpt``, else None.
        paired_with: name of the row that it is compared with, instead of the table's.
        where: ``FILE:LINE:COLUMN`` of the row.
        set_at: the same for each of ``overrides``.
    """

    name: str
    columns: tuple[Column, ...]
    config: str | None = None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    published: Published | None = None
    note: str | None = None
    has_teacher: bool = False
    saved: str | None = None
    paired_with: str | None = None
    where: str = ""
    set_at: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The row's name as a folder name."""
        return slug(self.name)


@dataclass(frozen=True)
class Run:
    """One seed of a row that has an experiment.

    Attributes:
        folder: the run's output folder.
        config: the row's.
    """

    row: Row
    seed: int
    folder: Path
    config: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """The row's, and one that keeps the student with the run: rows and seeds would write to one file otherwise."""
        if self.row.saved is None:
            return self.row.overrides
        path = yaml.safe_dump(str(self.folder / "student.pt"), width=2**20).partition("\n")[0]  # quoted where need be
        return (*self.row.overrides, f"models.{self.row.saved}.dst_ckpt={path}")

    @property
    def arguments(self) -> list[str]:
        """Of ``run.py``."""
        changes = [part for override in self.overrides for part in ("--set", override)]
        alone = ["-student_only"] if self._leaves_teacher_out else []
        return ["--config", self.config, *changes, "--seed", str(self.seed), "--output", str(self.folder), *alone]

    @property
    def _leaves_teacher_out(self) -> bool:
        """Whether no column asks how good the teacher is: every run would measure the same again."""
        return self.row.has_teacher and not any("teacher" in c.metric for c in self.row.columns)


@dataclass(frozen=True)
class Table:
    """A table, and where its runs live: ``<home>/<file stem>/<row>/seed<N>``.

    Attributes:
        paired_with: name of the row that the others are compared with, seed by seed, unless they name another.
        home: of the runs of all tables.
    """

    path: Path
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    paired_with: str | None = None
    home: Path = Path("runs", "tables")

    def runs(self, row: Row) -> list[Run]:
        """The row's, one for each seed; none where it has no experiment."""
        if row.config is None:
            return []
        folder = self.home / self.path.stem / row.slug
        return [Run(row, seed, folder / f"seed{seed}", row.config) for seed in row.seeds]

    def base(self, row: Row) -> str | None:
        """Name of the row that ``row`` is compared with; None for no other, and where nothing can be compared."""
        name = row.paired_with or self.paired_with
        return None if name == row.name or row.config is None else name

    def all_runs(self) -> Iterator[Run]:
        """Of all rows, in order."""
        for row in self.rows:
            yield from self.runs(row)


def slug(name: str) -> str:
    """``name`` as a folder name: letters and digits, all else a hyphen."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")
