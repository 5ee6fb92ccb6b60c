"""Reading single YAML nodes whose tags are torchdistill's.

An *active* tag (``!import_call`` and its like) runs code when it is constructed; a *text* tag (``!join`` and
its like) only makes a string. Everything before construction reads text tags and steps around active ones.
"""

import os
import re
from typing import Any, ClassVar, TypeAlias

import yaml
from torchdistill.common import yaml_util

from vkd_plugin.config.source import MAP_TAG, NULL_TAG, STR_TAG

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


class NodeConstructor(yaml.constructor.FullConstructor):
    """FullLoader's constructor with torchdistill's tags; torchdistill adds them to FullLoader, for all its users.

    It takes nodes, not text: every key and value of a file is made by one, several times, and setting up a reader, a
    scanner and a parser for each took as long again.

    Text that is a path may begin with ``~/``, and name environment variables (:func:`expanded`). Without
    ``!!python/name:``, which finds whatever Python has imported.
    """

    yaml_multi_constructors: ClassVar[dict[str | None, Any]] = {}


for _tag, _constructor in (TEXT_TAGS | ACTIVE_TAGS).items():
    NodeConstructor.add_constructor(_tag, _constructor)

# In a path: ${NAME} or ${NAME:-default} anywhere, $NAME only as a whole first part, so that other text keeps its $.
_VARIABLE = re.compile(r"\$\{(?P<braced>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|^\$(?P<plain>[A-Z_][A-Z0-9_]*)(?=/|$)")


def expanded(text: str) -> str:
    """``text`` with the home folder and environment variables put in.

    Raises:
        KeyError: a variable that is not set, and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"]
        default: str | None = match["default"]
        return os.environ[name] if default is None else os.environ.get(name) or default

    text = _VARIABLE.sub(value, text)
    return os.path.expanduser(text) if text.startswith("~/") else text


def _construct_str(loader: Any, node: yaml.ScalarNode) -> str:
    text: str = loader.construct_scalar(node)
    return expanded(text)


NodeConstructor.add_constructor(STR_TAG, _construct_str)


def unset_variable(text: str) -> str | None:
    """The first environment variable that ``text`` needs and that is not set."""
    try:
        expanded(text)
    except KeyError as error:
        return str(error.args[0])
    return None


class _Opaque:
    """The value of a node that cannot be known before its tag runs."""

    def __repr__(self) -> str:
        return "<known only after construction>"


OPAQUE = _Opaque()


def known_tags() -> set[str]:
    """Tags that can be constructed, as they are written in a file."""
    return {tag for tag in NodeConstructor.yaml_constructors if tag and tag.startswith("!")}


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
    try:
        if _runs_code(node):
            return OPAQUE
        return NodeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return OPAQUE


TUPLES = (*TEXT_TAGS, "tag:yaml.org,2002:python/tuple")
"""Tags of lists that make something that can be a key."""


def plain_key(node: yaml.Node) -> object:
    """The key that a node makes; the node itself where that cannot be known or cannot be a key."""
    if isinstance(node, yaml.MappingNode) or (isinstance(node, yaml.SequenceNode) and node.tag not in TUPLES):
        return node
    value = plain_value(node)
    try:
        hash(value)
    except TypeError:
        return node
    return node if value is OPAQUE else value


Entries: TypeAlias = dict[object, tuple[yaml.Node, yaml.Node]]


def entries(node: yaml.MappingNode) -> Entries:
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


def children(node: yaml.Node) -> list[yaml.Node]:
    """Keys and values of a mapping, items of a list."""
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def with_value(node: yaml.Node, value: Any) -> yaml.Node:
    """A copy of ``node`` (tag, style, marks) that holds ``value``."""
    kind: Any = type(node)
    style = node.style if isinstance(node, yaml.ScalarNode) else getattr(node, "flow_style", None)
    return kind(node.tag, value, node.start_mark, node.end_mark, style)


def string(text: str, name: str) -> yaml.ScalarNode:
    """A string that stands in the override ``name``."""
    mark = yaml.Mark(name, 0, 0, 0, None, 0)
    return yaml.ScalarNode(STR_TAG, text, mark, mark)


def null(name: str) -> yaml.ScalarNode:
    """Nothing, standing in the override ``name``."""
    mark = yaml.Mark(name, 0, 0, 0, None, 0)
    return yaml.ScalarNode(NULL_TAG, "null", mark, mark)


def empty_mapping(like: yaml.Node) -> yaml.MappingNode:
    """A mapping without keys, standing where ``like`` stands."""
    return yaml.MappingNode(MAP_TAG, [], like.start_mark, like.end_mark, False)


def _runs_code(node: yaml.Node) -> bool:
    return is_active(node) or any(_runs_code(child) for child in children(node))
