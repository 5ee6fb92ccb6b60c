"""Passes over a whole graph of YAML nodes: soundness, merging, unsharing, and back to text."""

import hashlib
import json
import re
from typing import Any

import yaml

from vkd_plugin.config.nodes import (
    NodeConstructor,
    children,
    is_active,
    is_private,
    known_tags,
    plain_key,
    plain_value,
    unset_variable,
    with_value,
)
from vkd_plugin.config.problems import ConfigErrors, Problems
from vkd_plugin.config.source import STR_TAG, place
from vkd_plugin.errors import ConfigError
from vkd_plugin.suggest import nearest

_URL_WITH_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*\$\{")
MERGE_TAG = "tag:yaml.org,2002:merge"
MAX_NODES = 200_000
MAX_DEPTH = 100
"""More than any experiment needs. A file whose anchors multiply to more is refused, not expanded."""


def check_graph(root: yaml.Node, problems: Problems) -> None:
    """Finds what would break a walk through the graph, or be dropped without a word.

    That is: keys written twice, tags that nobody knows, dates and numbers that are none, anchors that contain
    themselves, nesting without end.
    """
    done: set[int] = set()
    unfinished: set[int] = set()
    tags = known_tags()

    def visit(node: yaml.Node) -> None:
        where = place(node.start_mark)
        if id(node) in unfinished:
            problems.add("this anchor contains itself", where)
        if len(unfinished) == MAX_DEPTH:
            problems.add("nested too deeply", where)
        if id(node) in unfinished or id(node) in done or len(unfinished) == MAX_DEPTH:
            return
        unfinished.add(id(node))
        if node.tag.startswith("!"):
            if node.tag not in tags:
                problems.add(f"unknown tag '{node.tag}'{nearest(node.tag, tags)}", where)
        elif node.tag not in NodeConstructor.yaml_constructors and node.tag != MERGE_TAG:
            written = node.tag.replace("tag:yaml.org,2002:", "!!")
            why = "refused, it runs code" if written.startswith("!!python/") else "unknown"
            problems.add(f"tag '{written}': {why}", where)
        elif isinstance(node, yaml.ScalarNode) and (message := _unreadable(node)):
            problems.add(message, where)
        for child in children(node):
            visit(child)
        if isinstance(node, yaml.MappingNode):
            _check_duplicates(node, problems)
        unfinished.remove(id(node))
        done.add(id(node))

    visit(root)


def _unreadable(node: yaml.ScalarNode) -> str | None:
    """Why a scalar has no value: a date such as 2020-99-99, or ``!!int x``."""
    if node.tag == STR_TAG:
        if _URL_WITH_VARIABLE.match(node.value):
            return "an environment variable cannot stand in a URL, to which it would be sent"
        name = unset_variable(node.value)
        return f"environment variable '{name}' is not set (a default: ${{{name}:-...}})" if name else None
    if node.tag == MERGE_TAG:
        return None
    try:
        NodeConstructor().construct_document(node)
    except yaml.MarkedYAMLError as error:
        return f"cannot read '{node.value}': {error.problem}"
    except ValueError as error:
        return f"cannot read '{node.value}': {error}"
    except (KeyError, AttributeError):  # PyYAML's own, for `!!bool x` and `!!timestamp x`
        return f"cannot read '{node.value}' as {node.tag.rpartition(':')[2]}"
    return None


def _check_duplicates(node: yaml.MappingNode, problems: Problems) -> None:
    first: dict[object, yaml.Mark] = {}
    for key, _ in node.value:
        # `<<` may be written more than once: PyYAML merges them in turn.
        if key.tag == MERGE_TAG:
            continue
        name = plain_key(key)
        if name in first:
            message = f"key '{name}' is written twice (first on line {first[name].line + 1})"
            problems.add(message, place(key.start_mark))
        first.setdefault(name, key.start_mark)


def merge_all(root: yaml.Node) -> None:
    """Writes out every ``<<`` in place, as FullLoader does on construction, without what was overridden."""
    loader = NodeConstructor()
    done: set[int] = set()

    def visit(node: yaml.Node) -> None:
        if id(node) in done:
            return
        done.add(id(node))
        if isinstance(node, yaml.MappingNode):
            loader.flatten_mapping(node)
            latest = {plain_key(key): (key, value) for key, value in node.value}
            node.value = list(latest.values())
        for child in children(node):
            visit(child)

    try:
        visit(root)
    except yaml.MarkedYAMLError as error:
        where = place(error.problem_mark) if error.problem_mark else None
        raise ConfigErrors([ConfigError(str(error.problem), where)]) from None


def substitute(root: yaml.Node, old: yaml.Node, new: yaml.Node) -> None:
    """Puts ``new`` wherever the graph holds ``old``: at its anchor and at every alias."""
    done: set[int] = set()

    def swap(node: yaml.Node) -> yaml.Node:
        return new if node is old else node

    def visit(node: yaml.Node) -> None:
        if id(node) in done:
            return
        done.add(id(node))
        if isinstance(node, yaml.MappingNode):
            node.value = [(swap(key), swap(value)) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            node.value = [swap(item) for item in node.value]
        for child in children(node):
            visit(child)

    visit(root)


def unshare(root: yaml.Node) -> yaml.Node:
    """A copy of the graph in which only active tags are shared.

    torchdistill changes the mappings it is given (``requires_supp``, ``lr``), so no two places may hold the
    same one; while a data set under an anchor is built once, and every alias means that object. Keys that
    begin with ``_`` are left out of ``kwargs``, at any depth: they hold anchors, and would be passed to the function.
    """
    built: dict[int, tuple[yaml.Node, int]] = {}
    count = 0

    def add(number: int) -> None:
        nonlocal count
        count += number
        if count > MAX_NODES:
            message = f"its anchors expand to more than {MAX_NODES} values"
            raise ConfigErrors([ConfigError(message, root.start_mark.name)])

    def copy(node: yaml.Node, depth: int, in_kwargs: bool = False) -> yaml.Node:
        if id(node) in built:
            shared, size = built[id(node)]
            add(size)  # whoever walks through the graph meets it again
            return shared
        before = count
        add(1)
        if depth > MAX_DEPTH:
            raise ConfigErrors([ConfigError("nested too deeply", place(node.start_mark))])
        value: Any = node.value
        if isinstance(node, yaml.MappingNode):
            pairs = [(plain_key(key), key, child) for key, child in node.value]
            kept = [pair for pair in pairs if not (in_kwargs and is_private(pair[0]))]
            value = [
                (copy(key, depth + 1), copy(child, depth + 1, in_kwargs or name == "kwargs"))
                for name, key, child in kept
            ]
        elif isinstance(node, yaml.SequenceNode):
            value = [copy(child, depth + 1, in_kwargs) for child in node.value]
        duplicate = with_value(node, value)
        if is_active(node):
            built[id(node)] = duplicate, count - before
        return duplicate

    return copy(root, 0)


def to_text(root: yaml.Node) -> str:
    """The graph as YAML that torchdistill's loader reads; what an active tag builds once is an anchor."""
    return str(yaml.serialize(root, Dumper=yaml.Dumper, width=120, allow_unicode=True))


def digest(root: yaml.Node) -> str:
    """sha256 of what the graph says, whatever its comments, order of keys, anchors, and forms of numbers."""
    return hashlib.sha256(json.dumps(_canonical(root)).encode()).hexdigest()


def _canonical(node: yaml.Node) -> object:
    """``node`` as JSON."""
    content: object
    if isinstance(node, yaml.MappingNode):
        pairs = [(key, value) for key, value in node.value if not is_private(plain_key(key))]
        content = {"mapping": sorted([json.dumps(_canonical(k)), json.dumps(_canonical(v))] for k, v in pairs)}
    elif isinstance(node, yaml.SequenceNode):
        content = [_canonical(item) for item in node.value]
    elif node.tag.startswith("!") or node.tag == STR_TAG:
        content = node.value  # as written: a home folder or a variable would change the digest
    else:
        value = plain_value(node)
        content = value if isinstance(value, str | int | float | None) else repr(value)
    return {node.tag: content} if node.tag.startswith("!") else content
