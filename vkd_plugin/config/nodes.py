"""Reading, copying and serialising YAML nodes whose tags are torchdistill's.

An *active* tag (``!import_call`` and its like) runs code when it is constructed; a *text* tag (``!join`` and
its like) only makes a string. Everything before construction reads text tags and steps around active ones.
"""

import hashlib
import json
from typing import Any

import yaml
from torchdistill.common import yaml_util

from vkd_plugin.config.problems import ConfigErrors
from vkd_plugin.config.source import MAP_TAG, NULL_TAG, STR_TAG, place
from vkd_plugin.errors import ConfigError

TEXT_TAGS = {
    "!join": yaml_util.yaml_join,
    "!pathjoin": yaml_util.yaml_pathjoin,
    "!expanduser": yaml_util.yaml_expanduser,
    "!abspath": yaml_util.yaml_abspath,
}
ACTIVE_TAGS = {
    "!import_get": yaml_util.yaml_import_get,
    "!import_call": yaml_util.yaml_import_call,
    "!import_call_method": yaml_util.yaml_import_call_method,
    "!call_method": yaml_util.yaml_call_method,
    "!getattr": yaml_util.yaml_getattr,
    "!setattr": yaml_util.yaml_setattr,
    "!access_by_index_or_key": yaml_util.yaml_access_by_index_or_key,
}

MAX_NODES = 200_000
"""More than any experiment needs; a file whose anchors multiply to more is refused, not expanded."""


class TorchdistillLoader(yaml.FullLoader):
    """FullLoader with torchdistill's tags, which torchdistill itself adds to FullLoader for the whole process."""


for _tag, _constructor in (TEXT_TAGS | ACTIVE_TAGS).items():
    TorchdistillLoader.add_constructor(_tag, _constructor)


class _Opaque:
    """The value of a node that cannot be known before its tag runs."""

    def __repr__(self) -> str:
        return "<known only after construction>"


OPAQUE = _Opaque()


def known_tags() -> set[str]:
    """Tags that can be constructed, as they are written in a file."""
    return {tag for tag in TorchdistillLoader.yaml_constructors if tag and tag.startswith("!")}


def is_active(node: yaml.Node) -> bool:
    """Whether constructing this very node runs code."""
    return node.tag.startswith("!") and node.tag not in TEXT_TAGS


def is_null(node: yaml.Node) -> bool:
    """Whether nothing is written after the colon (or ``null``)."""
    return node.tag == NULL_TAG


def is_private(key: object) -> bool:
    """Whether a key only holds an anchor."""
    return isinstance(key, str) and key.startswith("_")


def plain_value(node: yaml.Node) -> Any:
    """The value of a scalar or a text tag; OPAQUE where a tag has to run first, or where it cannot be made.

    What cannot be made (``!!int x``) is reported when everything is constructed.
    """
    if _runs_code(node):
        return OPAQUE
    try:
        return TorchdistillLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return OPAQUE


def plain_key(node: yaml.Node) -> object:
    """The key that a node makes; the node itself where that cannot be known or cannot be a key."""
    value = plain_value(node)
    try:
        hash(value)
    except TypeError:
        return node
    return node if value is OPAQUE else value


def entries(node: yaml.MappingNode) -> dict[object, tuple[yaml.Node, yaml.Node]]:
    """A mapping's ``{key: (key node, value node)}``."""
    return {plain_key(key): (key, value) for key, value in node.value}


def describe(node: yaml.Node) -> str:
    """A node's value for the *got* of a message."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if is_null(node):
        return "nothing"
    value = plain_value(node)
    return "a list" if isinstance(value, list) else repr(value)


def merge_all(root: yaml.Node) -> None:
    """Writes out every ``<<``, as FullLoader does on construction, and drops what a merge overrode."""
    loader, done = TorchdistillLoader(""), set()

    def visit(node: yaml.Node) -> None:
        if id(node) in done:
            return
        done.add(id(node))
        if isinstance(node, yaml.MappingNode):
            loader.flatten_mapping(node)
            latest: dict[object, tuple[yaml.Node, yaml.Node]] = {}
            for key, value in node.value:
                latest[plain_key(key)] = (key, value)
            node.value = list(latest.values())
        for child in children(node):
            visit(child)

    try:
        visit(root)
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark is not None
        raise ConfigErrors([ConfigError(str(error.problem), place(error.problem_mark))]) from None


def children(node: yaml.Node) -> list[yaml.Node]:
    """Keys and values of a mapping, items of a list."""
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def with_value(node: yaml.Node, value: Any) -> yaml.Node:
    """A copy of ``node`` (tag, style, marks) that holds ``value``."""
    style = node.style if isinstance(node, yaml.ScalarNode) else node.flow_style
    return type(node)(node.tag, value, node.start_mark, node.end_mark, style)


def unshare(root: yaml.Node) -> yaml.Node:
    """A copy of the graph in which only active tags are shared.

    torchdistill changes the mappings it is given (``requires_supp``, ``lr``), so no two places may hold the same
    one; while a data set under an anchor is built once, and every alias means that object. Keys that begin with
    ``_`` are left out of ``kwargs``: they hold anchors, and would otherwise be passed to the function.
    """
    built: dict[int, yaml.Node] = {}
    count = 0

    def copy(node: yaml.Node, in_kwargs: bool = False) -> yaml.Node:
        nonlocal count
        if id(node) in built:
            return built[id(node)]
        count += 1
        if count > MAX_NODES:
            message = f"its anchors expand to more than {MAX_NODES} values"
            raise ConfigErrors([ConfigError(message, root.start_mark.name)])
        value: Any = node.value
        if isinstance(node, yaml.MappingNode):
            pairs = [(plain_key(key), key, child) for key, child in node.value]
            kept = [entry for entry in pairs if not (in_kwargs and is_private(entry[0]))]
            value = [(copy(key), copy(child, name == "kwargs")) for name, key, child in kept]
        elif isinstance(node, yaml.SequenceNode):
            value = [copy(child) for child in node.value]
        duplicate = with_value(node, value)
        if is_active(node):
            built[id(node)] = duplicate
        return duplicate

    return copy(root)


def scalar(text: str, name: str) -> yaml.ScalarNode:
    """A string node that stands in the override ``name``."""
    mark = yaml.Mark(name, 0, 0, 0, None, 0)
    return yaml.ScalarNode(STR_TAG, text, mark, mark)


def empty_mapping(like: yaml.Node) -> yaml.MappingNode:
    """A mapping without keys, standing where ``like`` stands."""
    return yaml.MappingNode(MAP_TAG, [], like.start_mark, like.end_mark, False)


def to_text(root: yaml.Node) -> str:
    """The graph as YAML that torchdistill's loader reads; tags stay tags, what they build once is an anchor."""
    return str(yaml.serialize(root, Dumper=yaml.Dumper, width=120, allow_unicode=True))


def digest(root: yaml.Node) -> str:
    """sha256 of what the graph says: not of its comments, order of keys, ``_`` keys or ways to write a number."""

    def canonical(node: yaml.Node) -> object:
        content: object
        if isinstance(node, yaml.MappingNode):
            named = [(plain_key(key), key, value) for key, value in node.value]
            content = sorted(
                (json.dumps(canonical(key)), canonical(value)) for name, key, value in named if not is_private(name)
            )
            content = {"mapping": content}
        elif isinstance(node, yaml.SequenceNode):
            content = [canonical(item) for item in node.value]
        elif node.tag.startswith("!"):
            content = node.value
        else:
            content = plain_value(node)
            content = content if isinstance(content, str | int | float | None) else repr(content)
        # Tags are not resolved: a digest with somebody's home folder in it would be another on each machine.
        return {node.tag: content} if node.tag.startswith("!") else content

    return hashlib.sha256(json.dumps(canonical(root), sort_keys=True).encode()).hexdigest()


def _runs_code(node: yaml.Node) -> bool:
    return is_active(node) or any(_runs_code(child) for child in children(node))
