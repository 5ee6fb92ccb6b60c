"""Printing: a terminal, Markdown, HTML and CSV."""

import csv
import html
import io
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from .data import Row, Run, Table
from .measured import Cell, Line, measure
from .paired import Paired

_CSV_HEADER = (
    "row", "metric", "mean", "std", "n", "missing_seeds", "published", "verified", "source", "difference",
    "paired_with", "paired_difference", "paired_p", "paired_n", "minutes_per_run", "config", "note", "to_run",
)  # fmt: skip

_STYLE = """\
body {font-family: sans-serif; margin: 2em}
table {border-collapse: collapse}
th, td {border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: right}
th:first-child, td:first-child {text-align: left}
pre {background: #f4f4f4; overflow-x: auto; padding: 0.8em}"""


def print_table(table: Table, form: str | None = None) -> None:
    """Prints measured means beside published figures, and the commands of what has not run.

    Args:
        table: the table.
        form: ``md``, ``csv`` or ``html``; None for a terminal.

    Raises:
        UserError: a run's summary cannot be read, or has no such metric.
    """
    lines = measure(table)
    if form == "csv":
        print(_csv(table, lines), end="")
        return
    page = _page(table, lines)
    if form == "md":
        print(_markdown(page))
    elif form == "html":
        print(_html(page))
    else:
        _print(page)


@dataclass
class _Page:
    """A table for people, as text.

    Attributes:
        lines: of cells, as many as ``header`` has.
        footnotes: ``[1]`` in a cell is the first of them.
        commands: that make what is missing.
    """

    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    commands: list[str] = field(default_factory=list)

    def mark(self, text: str | None) -> str:
        """`` [N]``, where ``text`` is the N-th footnote; nothing for no text."""
        if text is None:
            return ""
        if text not in self.footnotes:
            self.footnotes.append(text)
        return f" [{self.footnotes.index(text) + 1}]"


def _page(table: Table, lines: list[Line]) -> _Page:
    runs = any(row.config for row in table.rows)
    shown = [(index, kind) for index in range(len(table.columns)) for kind in _kinds(table, index)]
    titles = [_heading(table, index, kind) for index, kind in shown]
    page = _Page(table.title, ["", *titles, "seeds", *(["minutes per run"] if runs else [])], notes=table.notes)
    for line in lines:
        cells = [line.row.name + page.mark(line.row.note)]
        cells += [_text(page, table, line.row, line.cells[index], kind) for index, kind in shown]
        cells += [_seeds(line), *([_figure(line.minutes, ".1f")] if runs else [])]
        page.lines.append(cells)
        page.commands += map(_command, line.missing)
    return page


def _kinds(table: Table, index: int) -> list[str]:
    """What there can be in a column: nothing is measured without an experiment, or compared with nothing."""
    title = table.columns[index].title
    published = [row for row in table.rows if row.published and title in row.published.figures]
    kinds = ["measured"] if any(row.config for row in table.rows) else []
    kinds += ["published"] if published else []
    kinds += ["difference"] if any(row.config for row in published) else []
    return kinds + (["paired"] if _bases(table) else [])


def _heading(table: Table, index: int, kind: str) -> str:
    title = table.columns[index].title
    if kind == "measured":
        return title
    if kind == "paired":
        bases = _bases(table)
        what = f"against {bases.pop()}" if len(bases) == 1 else "paired difference"
        return what if len(table.columns) == 1 else f"{title} {what}"
    return kind if len(table.columns) == 1 and any(row.config for row in table.rows) else f"{title} {kind}"


def _bases(table: Table) -> set[str]:
    """Names of the rows that others are compared with."""
    return {base for row in table.rows if (base := table.base(row))}


def _text(page: _Page, table: Table, row: Row, cell: Cell, kind: str) -> str:
    if kind == "measured":
        return measured_text(cell)
    if kind == "difference":
        return _figure(cell.difference, "+.2f")
    if kind == "paired":
        several = cell.paired is not None and len(_bases(table)) > 1
        return paired_text(cell.paired) + page.mark(f"against {table.base(row)}" if several else None)
    if row.published is None or cell.published is None:
        return "-"
    return f"{cell.published.text}{'' if row.published.verified else ' unverified'}{page.mark(row.published.source)}"


def measured_text(cell: Cell) -> str:
    """Mean and standard deviation."""
    return _figure(cell.mean, ".2f") + ("" if cell.deviation is None else f" ± {cell.deviation:.2f}")


def paired_text(found: Paired | None) -> str:
    """The difference, and p of the t-test."""
    if found is None:
        return "-"
    chance = "" if found.p is None else f" (p {'< 0.001' if found.p < 0.001 else f'{found.p:.3f}'})"
    return f"{found.difference:+.2f}{chance}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seeds(line: Line) -> str:
    if line.row.config is None:
        return "no experiment"
    if not line.missing:
        return str(line.done)
    names = ", ".join(str(run.seed) for run in line.missing)
    missing = f" ({'seed' if len(line.missing) == 1 else 'seeds'} {names} missing)" if line.done else ""
    return f"{line.done} of {len(line.row.seeds)}{missing}"


def _command(run: Run) -> str:
    return shlex.join(["python", "run.py", *run.arguments])


def _print(page: _Page) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # in a file or a pipe nothing has to be folded
    grid = Grid(title=Text(page.title))
    for index, name in enumerate(page.header):
        grid.add_column(Text(name), justify="left" if index == 0 else "right")
    for cells in page.lines:
        grid.add_row(*map(Text, cells))
    console.print(grid)
    for number, footnote in enumerate(page.footnotes, 1):
        console.print(Text(f"[{number}] {footnote}"))
    for note in page.notes:
        console.print(Text(note))
    for command in page.commands:
        print(f"to run: {command}")  # in one line, to be copied


def _markdown(page: _Page) -> str:
    header, *lines = ([*map(_escaped, cells)] for cells in (page.header, *page.lines))
    lines = [header, ["---"] * len(header), *lines]
    blocks = ["\n".join("| " + " | ".join(cells) + " |" for cells in lines)]
    if page.footnotes:
        blocks.append("\n".join(f"{number}. {_escaped(text)}" for number, text in enumerate(page.footnotes, 1)))
    blocks += [_escaped(note) for note in page.notes]
    if page.commands:
        blocks.append("\n".join(["To run:", "", "```sh", *page.commands, "```"]))
    return "\n\n".join(blocks)


def _escaped(text: str) -> str:
    """Text that means itself in Markdown."""
    return re.sub(r"([\\|*_<`\[\]])", r"\\\1", text)


def _html(page: _Page) -> str:
    escape = html.escape

    def rows(lines: Iterable[list[str]], tag: str) -> str:
        cells = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) for line in lines)
        return "\n".join(f"<tr>{line}</tr>" for line in cells)

    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(page.title)}</title>',
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(page.title)}</h1>",
        f"<table>\n<thead>\n{rows([page.header], 'th')}\n</thead>",
        f"<tbody>\n{rows(page.lines, 'td')}\n</tbody>\n</table>",
    ]
    if page.footnotes:
        parts.append("<ol>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in page.footnotes) + "\n</ol>")
    parts += [f"<p>{escape(note)}</p>" for note in page.notes]
    if page.commands:
        parts.append("<p>To run:</p>\n<pre>" + "\n".join(map(escape, page.commands)) + "</pre>")
    return "\n".join([*parts, "</body>\n</html>"])


def _csv(table: Table, lines: list[Line]) -> str:
    """One line for each row and metric; what does not exist is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for line in lines:
        row, published = line.row, line.row.published
        for cell in line.cells:
            source = published if cell.published else None
            writer.writerow(
                (
                    row.name,
                    cell.column.title,
                    cell.mean,
                    cell.deviation,
                    line.done,
                    " ".join(str(run.seed) for run in line.missing),
                    cell.published.value if cell.published else None,
                    str(source.verified).lower() if source else None,
                    source.source if source else None,
                    cell.difference,
                    table.base(row),
                    cell.paired.difference if cell.paired else None,
                    cell.paired.p if cell.paired else None,
                    cell.paired.n if cell.paired else None,
                    line.minutes,
                    row.config,
                    row.note,
                    "; ".join(map(_command, line.missing)),
                )
            )
    return file.getvalue()
