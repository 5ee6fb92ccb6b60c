"""Writes the tables of docs/study.md anew, from the runs whose summary.json is in docs/study.

    python docs/study_tables.py

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; the rest of the page is left as it is.
"""

import re
from collections.abc import Callable
from pathlib import Path

from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.measured import Line, measure
from vkd_plugin.results.table.rendering import measured_text, paired_text

HOME = Path(__file__).parent / "study"
PAGE = Path(__file__).parent / "study.md"
TABLES = Path(__file__).parents[1] / "configs" / "tables"

NORMALIZATIONS = ("layer_norm", "none", "l2", "standardize", "whiten")
PROJECTORS = (
    "linear",
    "MLP",
    *(f"orthogonal ({name})" for name in ("matrix_exp", "cayley", "householder", "cholesky_qr", "polar")),
)
SIZES = ("5 %", "10 %", "20 %", "100 %")


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(written_anew(PAGE.read_text("utf-8")), "utf-8")


def written_anew(page: str) -> str:
    """The page with its tables as the runs in docs/study make them.

    Raises:
        KeyError: a name between ``<!--`` and ``-->`` is none of a table.
    """

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match['name']} -->\n\n{MAKERS[match['name']]()}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>(?!end)[\w -]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def methods() -> str:
    """Every method's accuracy, and what it is above the linear projector."""
    lines = lines_of("fashion_mnist_methods")
    rows = [[line.row.name, accuracy(line), difference(line)] for line in lines.values()]
    return markdown(["", "test top-1, five seeds", "against the linear projector"], rows)


def tuning() -> str:
    """Validation accuracy of the methods whose weights have all been tried."""
    return by_weight(
        "fashion_mnist_tuning",
        {"orthogonal, layer_norm": "orthogonal", "linear, layer_norm": "linear", "MLP, layer_norm": "MLP"},
    )


def short_tuning() -> str:
    """The same of projectors by normalisations."""
    return by_weight("fashion_mnist_short_tuning")


def grid() -> str:
    """Projector by normalisation, and what each is above the linear projector with the same normalisation."""
    lines = lines_of("fashion_mnist_short_grid")
    rows = []
    for projector in PROJECTORS:
        of_this = [lines[f"{projector}, {normalization}"] for normalization in NORMALIZATIONS]
        rows.append([projector, *map(accuracy, of_this)])
        if projector != "linear":
            rows.append(["", *map(difference, of_this)])
    return markdown(["", *(f"`{name}`" for name in NORMALIZATIONS)], rows)


def data() -> str:
    """Methods by train-set size, and what each is above the linear projector at this size."""
    lines = lines_of("fashion_mnist_data")
    names = [name.partition(": ")[2] for name in lines if name.startswith("5 %")]
    rows = []
    for name in names:
        of_this = [lines[f"{size}: {name}"] for size in SIZES]
        rows.append([name, *map(accuracy, of_this)])
        if "linear" not in name:
            rows.append(["", *map(difference, of_this)])
    return markdown(["", *SIZES], rows)


def followup() -> str:
    """What was run to find reasons."""
    lines = lines_of("fashion_mnist_followup")
    rows = [[line.row.name, accuracy(line), difference(line)] for line in lines.values()]
    return markdown(["", "test top-1, five seeds", "against the linear projector above it"], rows)


MAKERS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "tuning": tuning,
    "projector by normalisation": grid,
    "short tuning": short_tuning,
    "train-set size": data,
    "follow-up": followup,
}


def lines_of(table: str) -> dict[str, Line]:
    """What the rows of a table have come to, by their names."""
    return {line.row.name: line for line in measure(load_table(TABLES / f"{table}.yaml", HOME))}


def by_weight(table: str, short: dict[str, str] | None = None) -> str:
    """Methods by weights, of rows named ``METHOD: WEIGHT``; the best of each method in bold."""
    found: dict[str, dict[str, float | None]] = {}
    for name, line in lines_of(table).items():
        method, _, weight = name.rpartition(": ")
        found.setdefault(method, {})[weight] = line.cells[0].mean
    weights = list(next(iter(found.values())))
    rows = []
    for method, values in found.items():
        known = [value for value in values.values() if value is not None]
        if known:
            texts = (None if v is None else f"**{v:.2f}**" if v == max(known) else f"{v:.2f}" for v in values.values())
            rows.append([(short or {}).get(method, method), *(text or "-" for text in texts)])
    return markdown(["", *weights], rows)


def accuracy(line: Line) -> str:
    """Mean and standard deviation; how many seeds have run where some are missing."""
    seeds = f" ({line.done} of {len(line.row.seeds)} seeds)" if line.done and line.missing else ""
    return measured_text(line.cells[0]) + seeds


def difference(line: Line) -> str:
    """To the row that it is compared with, and p of the paired t-test."""
    return paired_text(line.cells[0].paired)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    main()
