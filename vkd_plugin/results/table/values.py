"""From YAML nodes to the values in a table file; what is wrong is ConfigErrors at its place."""

import math
from typing import Any

import yaml

from vkd_plugin.config.problems import ConfigErrors
from vkd_plugin.config.source import place
from vkd_plugin.errors import ConfigError

from .data import Figure


def text(node: yaml.Node, name: str) -> str:
    """One line of text; line breaks become spaces.

    Raises:
        ConfigErrors: it is none, or nothing that can be printed.
    """
    value = scalar(node, f"{name} should be text")
    line = " ".join(str(value).split())
    if value is None:
        raise error(f"{name} should be text", node)
    if not any(character.isalnum() for character in line):
        raise error(f"{name} should have a letter or a digit", node)
    if not line.isprintable():
        raise error(f"{name} has a character that cannot be printed", node)
    return line


def texts(node: yaml.Node, name: str) -> tuple[str, ...]:
    """One text, or several in a list."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return tuple(text(part, name) for part in parts)


def figure(node: yaml.Node, name: str) -> Figure:
    """A finite number."""
    message = f"{name} should be a number"
    value = scalar(node, message)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise error(message, node)
    return Figure(float(value), str(node.value))


def flag(node: yaml.Node, message: str) -> bool:
    """True or false, else ``message``."""
    value = scalar(node, message)
    if not isinstance(value, bool):
        raise error(message, node)
    return value


def seeds(node: yaml.Node) -> tuple[int, ...]:
    """A list of seeds, each once."""
    message = "'seeds' should be a list of integers, none negative"
    found = [scalar(item, message) for item in items(node, message)]
    if not found or not all(type(seed) is int and 0 <= seed < 2**63 for seed in found):
        raise error(message, node)
    if len(set(found)) < len(found):
        raise error("'seeds' names one seed twice", node)
    return tuple(found)


def overrides(node: yaml.Node) -> list[tuple[str, str]]:
    """Overrides and where each stands."""
    message = "'set' should be a list of 'a.b.c=value'"
    found = [(scalar(item, message), place(item.start_mark)) for item in items(node, message)]
    if not all(isinstance(value, str) for value, _ in found):
        raise error(message, node)
    return found


def items(node: yaml.Node, message: str) -> list[yaml.Node]:
    """The items of a list, else ``message``."""
    if not isinstance(node, yaml.SequenceNode):
        raise error(message, node)
    return node.value


def scalar(node: yaml.Node, message: str) -> Any:
    """What a scalar says, else ``message``.

    Raises:
        ConfigErrors: it is a list or a mapping, or cannot be read (a date that is none, a tag).
    """
    if not isinstance(node, yaml.ScalarNode):
        raise error(message, node)
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as found:
        raise error(str(found.problem), node) from None
    except ValueError as found:
        raise error(str(found), node) from None
    except (LookupError, AttributeError):  # PyYAML's own, for `!!bool x` and `!!timestamp x`
        raise error(f"cannot read '{node.value}' as {node.tag.rpartition(':')[2]}", node) from None


def error(message: str, node: yaml.Node) -> ConfigErrors:
    """``message`` at the place of ``node``."""
    return ConfigErrors([ConfigError(message, place(node.start_mark))])
