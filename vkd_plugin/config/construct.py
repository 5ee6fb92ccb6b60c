"""From the node graph to objects: the only place where tags run."""

import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import yaml
from torchdistill.common.main_util import import_get

from vkd_plugin.config.nodes import TorchdistillLoader, entries, plain_value
from vkd_plugin.config.problems import ConfigErrors
from vkd_plugin.config.source import place, syntax_problem
from vkd_plugin.errors import ConfigError
from vkd_plugin.suggest import nearest


class _Failure(Exception):
    """``error`` was raised by the construction of ``node``."""

    def __init__(self, node: yaml.Node, error: Exception) -> None:
        self.node = node
        self.error = error
        super().__init__()


class _Constructor(TorchdistillLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's, but a failure is remembered with the innermost node that it belongs to."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, _Failure):
            raise
        except Exception as error:  # tags call whatever the user names
            raise _Failure(node, error) from error


def construct(root: yaml.Node) -> Any:
    """What the graph means, its tags executed.

    Raises:
        ConfigErrors: a tag failed; with its line, and what was raised.
    """
    try:
        return _Constructor("").construct_document(root)
    except _Failure as failure:
        message = f"{_title(failure.node)}{_explain(failure.error, failure.node)}"
        raise ConfigErrors([ConfigError(message, place(failure.node.start_mark))]) from failure.error
    except yaml.MarkedYAMLError as error:
        raise ConfigErrors([syntax_problem(error, root.start_mark.name, {})]) from None


def one_line(error: Exception) -> str:
    """What ``error`` says, in one line, with the nearest right name where one is missing."""
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError) and error.name and error.obj is not None:
        return text + nearest(error.name, [name for name in dir(error.obj) if not name.startswith("_")])
    if isinstance(error, ModuleNotFoundError) and error.name:
        return text + nearest(error.name.rpartition(".")[2], _sibling_modules(error.name))
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: '{error.filename}'"  # without the [Errno 2]
    if isinstance(error, OSError | ImportError | AttributeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _explain(error: Exception, node: yaml.Node) -> str:
    """``one_line``, with the nearest argument where the call in ``node`` got one that does not exist."""
    text = one_line(error)
    match = re.search(r"unexpected keyword argument '(\w+)'", text)
    target = target_name(node)
    if match is None or target is None:
        return text
    try:
        names = list(inspect.signature(import_get(target)).parameters)
    except Exception:  # only a hint is lost
        return text
    return text + nearest(match[1], names)


def _title(node: yaml.Node) -> str:
    """``!import_call torchvision.transforms.Resize: ``; a standard tag has none."""
    if not node.tag.startswith("!"):
        return ""
    target = target_name(node)
    return f"{node.tag} {target}: " if target else f"{node.tag}: "


def target_name(node: yaml.Node) -> str | None:
    """The dotted name in an import tag; None where there is none."""
    if not isinstance(node, yaml.MappingNode):
        return None
    values = {name: plain_value(value) for name, (_, value) in entries(node).items()}
    parts = [values.get("package"), values.get("class_name"), values.get("method_name"), values.get("key")]
    return ".".join(part for part in parts if isinstance(part, str)) or None


def _sibling_modules(name: str) -> Iterable[str]:
    """Modules beside the missing ``name``: in its package, or among those that are imported."""
    package = sys.modules.get(name.rpartition(".")[0])
    if isinstance(package, ModuleType):
        return [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return {module.partition(".")[0] for module in sys.modules if not module.startswith("_")}
