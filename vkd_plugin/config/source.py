"""From text to a graph of YAML nodes that know their line; nothing is executed here."""

import os
from pathlib import Path

import yaml

from vkd_plugin.config.problems import FLAG, ConfigErrors
from vkd_plugin.errors import ConfigError
from vkd_plugin.suggest import nearest

NULL_TAG = "tag:yaml.org,2002:null"
MAP_TAG = "tag:yaml.org,2002:map"
STR_TAG = "tag:yaml.org,2002:str"


def place(mark: yaml.Mark) -> str:
    """``FILE:LINE:COLUMN`` of a mark, counted from 1; for one in an override, the override itself."""
    return mark.name if mark.name.startswith(FLAG) else f"{mark.name}:{mark.line + 1}:{mark.column + 1}"


def entry_place(key: yaml.Node, value: yaml.Node) -> str:
    """Where ``key: value`` stands: the key's line, also where the value is an anchor from elsewhere.

    A value that came from an override is the override's doing, whoever wrote the key.
    """
    return place(value.start_mark if value.start_mark.name.startswith(FLAG) else key.start_mark)


def read(path: str | Path) -> yaml.MappingNode:
    """The node graph of an experiment file.

    Args:
        path: the file; its name appears in messages as it is given here.

    Raises:
        ConfigErrors: no such file, not UTF-8, not YAML, or not a mapping.
    """
    name = str(path)
    root = compose(_text(name), name)
    if root is None:
        raise ConfigErrors([ConfigError("the file is empty", name)])
    if not isinstance(root, yaml.MappingNode):
        got = "a list" if isinstance(root, yaml.SequenceNode) else f"'{root.value}'"
        message = f"expected a mapping with the sections datasets, models, train and test, got {got}"
        raise ConfigErrors([ConfigError(message, place(root.start_mark))])
    return root


def compose(text: str, name: str) -> yaml.Node | None:
    """The node graph of ``text``, its marks named ``name``; None for an empty document."""
    loader = None
    try:
        loader = yaml.FullLoader(text)
        loader.name = name
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position) - 1
        where = place(yaml.Mark(name, error.position, line, column, None, 0))
        raise ConfigErrors([ConfigError(f"unprintable character #x{error.character:04x}", where)]) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigErrors([syntax_problem(error, name, getattr(loader, "anchors", {}))]) from None
    except RecursionError:
        raise ConfigErrors([ConfigError("nested too deeply", name)]) from None
    except (OverflowError, ValueError) as error:  # an escape such as "\\UFFFFFFFF", which is no character
        raise ConfigErrors([ConfigError(f"not valid YAML: {error}", name)]) from None


def syntax_problem(error: yaml.MarkedYAMLError, name: str, anchors: dict[str, object]) -> ConfigError:
    """PyYAML's error, which takes four lines, in one."""
    mark = error.problem_mark or error.context_mark
    message = error.problem or error.context or "not valid YAML"
    if error.context and error.problem and not isinstance(error, yaml.composer.ComposerError):
        message += f" {error.context}"
    if message.startswith("found undefined alias"):
        message += nearest(message.split("'")[1], anchors)
    return ConfigError(" ".join(message.split()), place(mark) if mark else name)


def _text(name: str) -> str:
    """The contents of the file, or one clear line on why there are none."""
    path = os.path.expanduser(name)
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        message = "no such file"
        folder = os.path.dirname(path) or "."
        if os.path.isdir(folder):
            siblings = [entry for entry in os.listdir(folder) if entry.endswith((".yaml", ".yml"))]
            message += nearest(os.path.basename(path), siblings)
    except IsADirectoryError:
        message = "is a folder, not an experiment file"
    except UnicodeDecodeError as error:
        message = f"not a UTF-8 text file (byte {error.start})"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        message = getattr(error, "strerror", None) or str(error)
    raise ConfigErrors([ConfigError(message, name)])
