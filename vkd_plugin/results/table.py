"""Tables as data: rows are experiments with overrides, cells are means over seeds of what the runs recorded.

.. code-block:: YAML

    title: 'A student on digits'
    metric: 'test.student.top1'        # a path into each run's summary.json
    seeds: [0, 1, 2, 3, 4]
    rows:
      - name: 'no distillation'
        config: 'configs/digits/ce/vit.yaml'
      - name: 'VkD, Cayley map'
        config: 'configs/digits/vkd/vit_from_cnn.yaml'
        set: ['train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector.orthogonal_map=cayley']
"""

import json
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table as RichTable

from ..engine.signals import STOP_SIGNALS, StoppedError
from ..errors import EXIT_DONE, EXIT_STOPPED, ConfigError, UserError
from ..suggest import nearest

_TABLE_KEYS = ("title", "metric", "seeds", "rows")
_ROW_KEYS = ("name", "config", "set")


@dataclass(frozen=True)
class Row:
    """One line of a table: an experiment, changed by overrides."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The row's name as a folder name."""
        return re.sub(r"[\W_]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Table:
    """A table and where its runs live: ``runs/tables/<file stem>/<row>/seed<N>``."""

    path: Path
    title: str
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...] = field(default_factory=tuple)

    def folder(self, row: Row, seed: int) -> Path:
        """Output folder of one run."""
        return Path("runs", "tables", self.path.stem, row.slug, f"seed{seed}")

    def command(self, row: Row, seed: int) -> list[str]:
        """Arguments of ``run.py`` for one run."""
        changes = [part for override in row.overrides for part in ("--set", override)]
        output = str(self.folder(row, seed))
        return ["--config", row.config, *changes, "--seed", str(seed), "--output", output]


def load_table(path: str | Path) -> Table:
    """Reads a table file.

    Raises:
        ConfigError: what is wrong, with file and line.
    """
    path = Path(path)
    try:
        node = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(str(getattr(error, "problem", None) or error), where) from None
    top = _mapping(path, node, "a table", _TABLE_KEYS, ("title", "metric", "rows"))
    rows = []
    if not isinstance(top["rows"], yaml.SequenceNode) or not top["rows"].value:
        raise ConfigError("'rows' should be a list of rows", _where(path, top["rows"]))
    for item in top["rows"].value:
        row = _mapping(path, item, "a row", _ROW_KEYS, ("name", "config"))
        config = _plain(path, row["config"])
        if not isinstance(config, str) or not Path(config).is_file():
            raise ConfigError(f"no experiment file '{config}'", _where(path, row["config"]))
        changes = _plain(path, row["set"]) if "set" in row else []
        if not isinstance(changes, list) or not all(isinstance(c, str) for c in changes):
            raise ConfigError("'set' should be a list of 'a.b.c=value'", _where(path, row["set"]))
        rows.append(Row(_text(path, row["name"], "name"), config, tuple(changes)))
        if not rows[-1].slug:
            raise ConfigError("'name' should have a letter or a digit", _where(path, row["name"]))
    slugs = [row.slug for row in rows]
    for index, slug in enumerate(slugs):
        if slug in slugs[:index]:
            raise ConfigError(f"two rows are named '{rows[index].name}'", _where(path, top["rows"].value[index]))
    seeds = _plain(path, top["seeds"]) if "seeds" in top else [0]
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise ConfigError("'seeds' should be a list of integers, none negative", _where(path, top["seeds"]))
    if len(set(seeds)) < len(seeds):
        raise ConfigError("'seeds' names one seed twice", _where(path, top["seeds"]))
    title, metric = (_text(path, top[key], key) for key in ("title", "metric"))
    return Table(path, title, metric, tuple(seeds), tuple(rows))


def run_missing(table: Table, device: str | None = None) -> None:
    """Runs, one after another, each row and seed that has no ``summary.json`` yet; one that was interrupted goes on.

    Raises:
        UserError: a run failed; what is done stays and is not run again.
        StoppedError: a signal, which the present run got too, stopped it after saving.
    """
    missing = [(r, s) for r in table.rows for s in table.seeds if not _summary(table, r, s)]
    console = Console(stderr=True, highlight=False)
    for number, (row, seed) in enumerate(missing, 1):
        console.print(f"[{number}/{len(missing)}] {row.name}, seed {seed}", markup=False)
        command = [sys.executable, "-m", "vkd_plugin", *table.command(row, seed)]
        if device is not None:
            command += ["--device", device]
        if _interrupted(table, row, seed):
            command += ["--resume", "auto"]
        code = _run(command)
        if code == EXIT_STOPPED:
            raise StoppedError(f"{row.name}, seed {seed}: stopped and saved; the same command goes on from there")
        if code != EXIT_DONE:
            raise UserError(f"{row.name}, seed {seed}: the run ended with exit code {code}")


def _run(command: Sequence[str]) -> int:
    """Exit code of a command that gets the signals that stop a run."""
    # In a session of its own: Ctrl-C would reach it twice otherwise, from the terminal and from here, and the second
    # signal ends a run at once.
    child = subprocess.Popen(command, start_new_session=True)
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in STOP_SIGNALS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()


def _interrupted(table: Table, row: Row, seed: int) -> bool:
    """Whether the run's folder holds an unfinished run of the experiment that the row describes now."""
    from ..config import load_experiment  # here: printing a table needs no torch
    from ..config.changes import changes
    from ..engine.checkpoint import LAST, has_checkpoint

    folder = table.folder(row, seed)
    if (folder / "summary.json").exists() or not has_checkpoint(folder / "checkpoints" / LAST):
        return False
    try:
        return not changes((folder / "config.yaml").read_text("utf-8"), load_experiment(row.config, row.overrides))
    except (OSError, ValueError, UserError):
        return False


def print_table(table: Table, markdown: bool = False) -> None:
    """Prints mean and standard deviation per row, or the commands of rows that have not run."""
    lines = [_cells(table, row) for row in table.rows]
    header = ["", table.metric, "seeds", "minutes per run"]
    if markdown:
        print("| " + " | ".join(header) + " |")
        print("| --- " * len(header) + "|")
        for cells in lines:
            print("| " + " | ".join(cells) + " |")
        return
    grid = RichTable(title=table.title)
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right")
    for cells in lines:
        grid.add_row(*cells)
    Console().print(grid)
    for row in table.rows:
        for seed in table.seeds:
            if not _summary(table, row, seed):
                print("to run: python run.py " + " ".join(_quoted(a) for a in table.command(row, seed)))


def _cells(table: Table, row: Row) -> list[str]:
    summaries = [s for s in (_summary(table, row, seed) for seed in table.seeds) if s]
    values = [_value(summary, table.metric) for summary in summaries]
    if not values:
        return [row.name, "-", "0", "-"]
    minutes = statistics.mean(_value(summary, "wall_seconds") for summary in summaries) / 60
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return [row.name, f"{statistics.mean(values):.2f}{deviation}", str(len(values)), f"{minutes:.1f}"]


def _summary(table: Table, row: Row, seed: int) -> dict[str, Any] | None:
    """What the row's run recorded; None without one, or where it was another experiment than the row is now."""
    file = table.folder(row, seed) / "summary.json"
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a run's summary: {error}") from None
    if not isinstance(summary, dict):
        raise UserError(f"{file}: not a run's summary: no mapping")
    ran = (summary.get("config", row.config), summary.get("overrides", [*row.overrides]))
    return summary if ran == (row.config, [*row.overrides]) else None


def _value(summary: dict[str, Any], metric: str) -> float:
    value: Any = summary
    for key in metric.split("."):
        if not isinstance(value, dict) or key not in value:
            choices = value if isinstance(value, dict) else ()
            raise UserError(f"metric '{metric}': the runs' summary.json has no '{key}'{nearest(key, choices)}")
        value = value[key]
    if not isinstance(value, (int, float)):
        raise UserError(f"metric '{metric}': the runs' summary.json holds no number there, but {json.dumps(value)}")
    return float(value)


def _mapping(
    path: Path, node: yaml.Node | None, what: str, known: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{what} should be a mapping with the keys {', '.join(known)}", _where(path, node))
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"a key of {what} should be one of {', '.join(known)}", _where(path, key))
        if key.value not in known:
            raise ConfigError(f"unknown key '{key.value}' in {what}{nearest(key.value, known)}", _where(path, key))
        if key.value in found:
            raise ConfigError(f"key '{key.value}' is written twice", _where(path, key))
        found[key.value] = value
    for name in required:
        if name not in found:
            raise ConfigError(f"{what} needs '{name}'", _where(path, node))
    return found


def _plain(path: Path, node: yaml.Node) -> Any:
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(str(error.problem), _where(path, node)) from None
    except ValueError as error:  # a date or a number that is none
        raise ConfigError(str(error), _where(path, node)) from None


def _text(path: Path, node: yaml.Node, key: str) -> str:
    value = _plain(path, node)
    if value is None or isinstance(value, (dict, list)):
        raise ConfigError(f"'{key}' should be text", _where(path, node))
    return str(value)


def _where(path: Path, node: yaml.Node | None) -> str:
    return f"{path}:{node.start_mark.line + 1}" if node is not None else str(path)


def _quoted(argument: str) -> str:
    return f"'{argument}'" if re.search(r"[\s*?\[\]{}$&|;<>()]", argument) else argument
