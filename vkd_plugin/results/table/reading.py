"""From a table file to a :class:`Table`; everything that is wrong with the file is found at once."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import yaml

from vkd_plugin.config.problems import ConfigErrors, Problems
from vkd_plugin.config.source import NULL_TAG, compose, place, read
from vkd_plugin.errors import UserError
from vkd_plugin.suggest import closest, nearest

from . import values
from .data import Column, Figure, Published, Row, Table

T = TypeVar("T")

_TABLE_KEYS = ("title", "metric", "seeds", "notes", "paired_with", "rows")
_ROW_KEYS = ("name", "config", "set", "seeds", "metric", "paired_with", "published", "note")
_PUBLISHED_KEYS = ("value", "source", "verified")


def load_table(path: str | Path, home: str | Path | None = None) -> Table:
    """Reads a table file. Of its experiments only the models' sections are looked at.

    Args:
        path: the file.
        home: folder of the runs of all tables; None for ``runs/tables``.

    Raises:
        ConfigErrors: all that is wrong, each with file, line and column.
        UserError: the file cannot be read.
    """
    path = Path(path)
    node = compose(_contents(path), str(path))
    if node is None:
        raise UserError(f"{path}: the file is empty")
    table = _Reader().table(path, node)
    return table if home is None else replace(table, home=Path(home))


def _contents(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: {error.strerror}{_nearest_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start})") from None


def _nearest_file(path: Path) -> str:
    """A clause with the nearest YAML file in the folder of a file that does not exist."""
    try:
        return nearest(path.name, [name for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml"))])
    except OSError:
        return ""


class _Reader:
    """Reads one file. Problems are collected; what has one comes out as None or its default."""

    def __init__(self) -> None:
        self.problems = Problems()
        self.models = cache(_models)  # many rows, few experiments
        self.pairs: list[yaml.Node] = []  # names of rows, to be looked up when all rows are known

    def table(self, path: Path, node: yaml.Node) -> Table:
        keys, _ = self.keys(node, "a table", _TABLE_KEYS, ("title", "metric", "rows"))
        title = self.get(keys, "title", lambda value: values.text(value, "'title'"))
        columns = self.get(keys, "metric", _columns)
        seeds = self.get(keys, "seeds", values.seeds)
        notes = self.get(keys, "notes", lambda value: values.texts(value, "'notes'"))
        rows = self.get(keys, "rows", lambda value: self.rows(value, columns or (), seeds or (0,)))
        paired_with = self.get(keys, "paired_with", lambda value: _row_to_pair_with(value, rows or ()))
        self.problems.raise_if_any()
        assert title is not None
        return Table(path, title, columns or (), rows or (), notes or (), paired_with)

    def rows(self, node: yaml.Node, columns: tuple[Column, ...], seeds: tuple[int, ...]) -> tuple[Row, ...]:
        found = values.items(node, "'rows' should be a list of rows")
        if not found:
            raise values.error("'rows' should be a list of rows", node)
        rows = [self.row(item, columns, seeds) for item in found]
        slugs: set[str] = set()
        for row in rows:
            if row.slug in slugs:
                self.problems.add(f"two rows are named '{row.name}' (both have the folder {row.slug})", row.where)
            slugs |= {row.slug} - {""}
        for name in self.pairs:
            self.get({"paired_with": name}, "paired_with", lambda value: _row_to_pair_with(value, rows))
        return tuple(rows)

    def row(self, node: yaml.Node, columns: tuple[Column, ...], seeds: tuple[int, ...]) -> Row:
        keys, misspelt = self.keys(node, "a row", _ROW_KEYS, ("name",))
        where = place(node.start_mark)
        if isinstance(node, yaml.MappingNode) and "config" not in {*keys, *misspelt}:
            if "published" not in {*keys, *misspelt}:
                self.add("a row needs 'config' (an experiment) or 'published' (a figure of others)", node)
            for key in ("set", "seeds", "metric", "paired_with"):
                if key in keys:
                    self.add(f"'{key}' means nothing in a row without 'config'", keys[key])
        config = self.get(keys, "config", _experiment)
        overrides = self.get(keys, "set", values.overrides) or []
        models = self.models(config) if config else {}
        student = "student_model" if "student_model" in models else "model"
        paired_with = self.get(keys, "paired_with", lambda value: values.text(value, "'paired_with'"))
        if config and paired_with is not None:
            self.pairs.append(keys["paired_with"])
        return Row(
            name=self.get(keys, "name", lambda value: values.text(value, "'name'")) or "",
            columns=self.get(keys, "metric", lambda value: _own_columns(value, columns)) or columns,
            config=config,
            overrides=tuple(override for override, _ in overrides),
            seeds=self.get(keys, "seeds", values.seeds) or seeds,
            published=self.get(keys, "published", lambda value: self.published(value, columns)),
            note=self.get(keys, "note", lambda value: values.text(value, "'note'")),
            has_teacher="teacher_model" in models,
            saved=student if models.get(student) else None,
            paired_with=paired_with,
            where=where,
            set_at=tuple(where for _, where in overrides),
        )

    def published(self, node: yaml.Node, columns: tuple[Column, ...]) -> Published:
        keys, _ = self.keys(node, "'published'", _PUBLISHED_KEYS, _PUBLISHED_KEYS)
        source = self.get(keys, "source", lambda value: values.text(value, "'source'"))
        message = "'verified' should be True (somebody has read it in the source) or False"
        verified = self.get(keys, "verified", lambda value: values.flag(value, message))
        figures = self.get(keys, "value", lambda value: _figures(value, columns))
        return Published(figures or {}, source or "", bool(verified))

    def keys(
        self, node: yaml.Node, what: str, known: tuple[str, ...], required: tuple[str, ...]
    ) -> tuple[dict[str, yaml.Node], list[str]]:
        """The values at those of the keys ``known`` that a mapping has, and those that it seems to have misspelt.

        Keys that begin with ``_`` only hold anchors.
        """
        found: dict[str, yaml.Node] = {}
        misspelt: list[str] = []
        if not isinstance(node, yaml.MappingNode):
            self.add(f"{what} should be a mapping with the keys {', '.join(known)}", node)
            return found, misspelt
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.add(f"a key of {what} should be one of {', '.join(known)}", key)
            elif key.value in found:
                self.add(f"key '{key.value}' is written twice", key)
            elif key.value in known:
                found[key.value] = value
            elif not key.value.startswith("_"):
                self.add(f"unknown key '{key.value}' in {what}{nearest(key.value, known)}", key)
                misspelt.append(closest(key.value, known) or "")
        for name in required:
            if name not in {*found, *misspelt}:
                self.add(f"{what} needs '{name}'", node)
        return found, misspelt

    def get(self, keys: Mapping[str, yaml.Node], key: str, read: Callable[[yaml.Node], T]) -> T | None:
        """What ``read`` makes of the value at ``key``; None without one, or if there is something wrong with it."""
        if key not in keys:
            return None
        try:
            return read(keys[key])
        except ConfigErrors as error:
            for problem in error.problems:
                self.problems.add(problem.message, problem.where)
        return None

    def add(self, message: str, node: yaml.Node) -> None:
        self.problems.add(message, place(node.start_mark))


def _columns(node: yaml.Node) -> tuple[Column, ...]:
    """``metric`` of a table: one path, or paths by the columns' titles."""
    if not isinstance(node, yaml.MappingNode):
        metric, where = _metric(node)
        return (Column(metric, metric, where),)
    return tuple(_named(node, "metric", lambda title, value: Column(title, *_metric(value))).values())


def _own_columns(node: yaml.Node, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """``metric`` of a row: as the table's, for all of its columns or some."""
    if isinstance(node, yaml.MappingNode):
        own = _named(node, "metric", lambda title, value: Column(title, *_metric(value)), columns)
        return tuple(own.get(column.title, column) for column in columns)
    return tuple(Column(column.title, *_metric(node)) for column in _only(columns, "metric", node))


def _metric(node: yaml.Node) -> tuple[str, str]:
    return values.text(node, "'metric'"), place(node.start_mark)


def _figures(node: yaml.Node, columns: tuple[Column, ...]) -> dict[str, Figure]:
    """``value`` of published figures: one number, or numbers by the columns' titles."""
    if isinstance(node, yaml.MappingNode):
        return _named(node, "value", lambda _, value: values.figure(value, "'value'"), columns)
    return {column.title: values.figure(node, "'value'") for column in _only(columns, "value", node)}


def _only(columns: tuple[Column, ...], key: str, node: yaml.Node) -> tuple[Column, ...]:
    """``columns``, which have to be one (or none, where there is something wrong with the table's metric)."""
    if len(columns) > 1:
        raise values.error(f"the table has several columns: write {key}: {{'{columns[0].title}': ...}}", node)
    return columns


def _named(
    node: yaml.MappingNode, name: str, read: Callable[[str, yaml.Node], T], columns: tuple[Column, ...] = ()
) -> dict[str, T]:
    """What ``read`` makes of a mapping's values, by title; ``columns`` are those that there are, if it is settled."""
    found: dict[str, T] = {}
    if not node.value:
        raise values.error(f"'{name}' names no column", node)
    for key, value in node.value:
        title = values.text(key, "the title of a column")
        if title in found:
            raise values.error(f"column '{title}' is written twice", key)
        if columns and title not in (titles := [column.title for column in columns]):
            raise values.error(f"no column '{title}' in the table{nearest(title, titles)}", key)
        found[title] = read(title, value)
    return found


def _row_to_pair_with(node: yaml.Node, rows: Sequence[Row]) -> str:
    """The name of a row that has runs."""
    name = values.text(node, "'paired_with'")
    names = [row.name for row in rows if row.config]
    if name not in names:
        raise values.error(f"no row '{name}' with an experiment in the table{nearest(name, names)}", node)
    return name


def _experiment(node: yaml.Node) -> str:
    """The name of an experiment file that exists."""
    name = values.text(node, "'config'")
    if not Path(name).expanduser().is_file():
        raise values.error(f"no experiment file '{name}'{_nearest_file(Path(name).expanduser())}", node)
    return name


def _models(config: str) -> dict[str, bool]:
    """The models of an experiment: key -> whether it is saved, at a ``dst_ckpt``.

    What is wrong with the experiment is not said here, but before it is to be run.
    """
    found = {}
    try:
        models = _at(read(config), "models")
        for key in ("teacher_model", "student_model", "model"):
            section = _at(models, key)
            if section is not None and section.tag != NULL_TAG:
                target = _at(section, "dst_ckpt")
                found[key] = target is not None and target.tag != NULL_TAG
    except (ConfigErrors, yaml.YAMLError):
        pass
    return found


def _at(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value at a mapping's key, merged ones included."""
    if not isinstance(node, yaml.MappingNode):
        return None
    yaml.SafeLoader("").flatten_mapping(node)
    return next((value for name, value in reversed(node.value) if name.value == key), None)
