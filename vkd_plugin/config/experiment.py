"""An experiment file: read, overridden, checked and built, with the line of everything in it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vkd_plugin.config.construct import Build, call, construct
from vkd_plugin.config.graph import check_graph, digest, merge_all, to_text, unshare
from vkd_plugin.config.nodes import entries
from vkd_plugin.config.overrides import Override, apply_overrides
from vkd_plugin.config.problems import ConfigErrors, Problems, dotted
from vkd_plugin.config.references import check_arguments, check_references, import_dependencies
from vkd_plugin.config.schema import experiment
from vkd_plugin.config.source import entry_place, place, read
from vkd_plugin.config.structure import Found, check_structure
from vkd_plugin.config.tags import check_targets, check_text
from vkd_plugin.config.trust import Trust
from vkd_plugin.errors import ConfigError


class Experiment:
    """What ``load_experiment`` gives.

    Attributes:
        path: the file, as the user named it.
        data: what torchdistill's ``yaml_util.load_yaml_file`` gives for it, overrides applied. No two places
            in it hold the same dict or list, except what a tag built.
        root: the file's node graph, overrides applied.
        warnings: what is no mistake for sure but has no effect, ``FILE:LINE:COLUMN: message`` each.
    """

    def __init__(self, path: str, root: yaml.MappingNode, data: dict[str, Any], warnings: Sequence[str] = ()) -> None:
        self.path = path
        self.data = data
        self.warnings = list(warnings)
        self.root = root

    def where(self, *path: object) -> str:
        """``FILE:LINE:COLUMN`` of a key or list item, or of the nearest that exists on the way to it.

        ``where('train', 'teacher', 'forward_hook', 'output', 0)``; for what an override set, the override.
        """
        node: yaml.Node = self.root
        found = place(node.start_mark)
        for part in path:
            if isinstance(node, yaml.MappingNode) and part in (present := entries(node)):
                key, node = present[part]
                found = entry_place(key, node)
            elif (
                isinstance(node, yaml.SequenceNode)
                and isinstance(part, int)
                and -len(node.value) <= part < len(node.value)
            ):
                node = node.value[part]
                found = place(node.start_mark)
            else:
                break
        return found

    def error(self, message: str, *path: object) -> ConfigError:
        """A mistake at ``path``: ``raise experiment.error('no such module', 'train', 'student')``."""
        prefix = f"{dotted(path)}: " if path else ""
        return ConfigError(prefix + message, self.where(*path))

    def with_data(self, data: dict[str, Any]) -> "Experiment":
        """The same places in the file, for other ``data``."""
        return Experiment(self.path, self.root, data, self.warnings)

    def dump(self) -> str:
        """The experiment as YAML, overrides applied; torchdistill's loader makes ``data`` of it again."""
        return to_text(self.root)

    def digest(self) -> str:
        """sha256 of what the experiment says, however it is written: equal digests, equal experiments."""
        return digest(self.root)


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), trusted: Sequence[str] = (), build: Build = call
) -> Experiment:
    """Reads an experiment file, finds what is wrong with it, and builds what it describes.

    Names and types are checked before anything is imported, names of components before anything is built.

    Args:
        path: the YAML file.
        overrides: ``a.b.c=value`` each, applied in turn.
        trusted: packages whose code the file may run besides those that :mod:`vkd_plugin.config.trust` lists.
        build: makes the calls that tags ask for; by default it calls.

    Raises:
        ConfigErrors: all that is wrong, as far as it can be told at once, each problem with its line.
    """
    trust = Trust(trusted)
    root, found = resolve(path, overrides, trust)
    warnings = check_names(root, found, trust)
    return Experiment(str(path), root, construct(root, trust, build), warnings)


def resolve(
    path: str | Path, overrides: Sequence[str] = (), trust: Trust | None = None
) -> tuple[yaml.MappingNode, list[Found]]:
    """The node graph with overrides applied, and what in it has to be looked up; nothing is executed.

    Raises:
        ConfigErrors: the file cannot be read, an override cannot be applied, names or types are wrong, or a name is
            not to be trusted.
    """
    root = read(path)
    if {"title", "rows"} <= entries(root).keys():
        raise ConfigErrors([ConfigError("this is a table, not an experiment: run.py table prints it", str(path))])
    problems = Problems()
    check_graph(root, problems)
    problems.raise_if_any()

    parsed = _parse(overrides, problems)
    # Anchors come first, so that what merges them (<<) gets the new value too.
    root = apply_overrides(root, [o for o in parsed if o.is_private], experiment(root), problems)
    merge_all(root)
    root = apply_overrides(root, [o for o in parsed if not o.is_private], experiment(root), problems)
    problems.raise_if_any()

    copied = unshare(root)
    assert isinstance(copied, yaml.MappingNode)
    check_graph(copied, problems)  # overrides bring nodes of their own
    problems.raise_if_any()
    found = check_structure(copied, experiment(copied), problems)
    check_text(copied, trust or Trust(), problems)
    problems.raise_if_any()
    return copied, found


def check_names(root: yaml.MappingNode, found: list[Found], trust: Trust) -> list[str]:
    """Imports the dependencies, then looks up ``found`` and what tags name.

    Returns:
        Warnings: what is written in the file and read by nothing.

    Raises:
        ConfigErrors: a module that cannot be imported, or names that mean nothing.
    """
    problems = Problems()
    import_dependencies(root, problems)
    problems.raise_if_any()
    check_references(root, found, problems)
    check_targets(root, trust, problems, partial(check_arguments, problems))
    problems.raise_if_any()
    return problems.warnings


def _parse(overrides: Sequence[str], problems: Problems) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            parsed.append(Override(text))
        except ConfigErrors as error:
            problems.add(error.message, error.where)
    return parsed
