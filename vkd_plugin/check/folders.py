"""Whether the files of data sets are where the experiment says, without reading them."""

import os

import yaml

from ..config import Experiment
from ..config.construct import find, target_name
from ..config.nodes import entries, plain_value
from ..config.problems import dotted
from ..config.source import entry_place
from ..config.trust import Trust
from .standin import PATHS, needs_files


def missing_files(experiment: Experiment) -> list[str]:
    """``FILE:LINE:COLUMN: ...`` for each folder or file of a data set that is not here."""
    found: dict[str, None] = {}

    def visit(node: yaml.Node, path: tuple[object, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                visit(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            if node.tag == "!import_call":
                look(node, path)
            for name, (_, value) in entries(node).items():
                visit(value, (*path, name))

    def look(node: yaml.MappingNode, path: tuple[object, ...]) -> None:
        if not needs_files(find(str(target_name(node)), False, Trust())):
            return
        given = _kwargs(node)
        if "download" in given and plain_value(given["download"][1]) is True:
            return
        for name in PATHS:
            if name not in given:
                continue
            key, value = given[name]
            written = plain_value(value)
            if isinstance(written, str) and not os.path.exists(os.path.expanduser(written)):
                place = dotted((*path, "init", "kwargs", name))
                found.setdefault(f"{entry_place(key, value)}: {place}: nothing is at '{written}'")

    datasets = entries(experiment.root).get("datasets")
    if datasets is not None:
        visit(datasets[1], ("datasets",))
    return list(found)


def _kwargs(node: yaml.MappingNode) -> dict[object, tuple[yaml.Node, yaml.Node]]:
    """What an ``!import_call`` passes by name."""
    found = entries(node)
    for name in ("init", "kwargs"):
        inner = found[name][1] if name in found else None
        if not isinstance(inner, yaml.MappingNode):
            return {}
        found = entries(inner)
    return found
