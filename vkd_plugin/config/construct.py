"""From the node graph to objects: the only place where tags run."""

import copy
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import yaml
from torch import nn

from vkd_plugin.config.nodes import ACTIVE_TAGS, NodeConstructor, children, entries, is_active, plain_value
from vkd_plugin.config.problems import ConfigErrors
from vkd_plugin.config.source import place, syntax_problem
from vkd_plugin.config.trust import Trust, is_plain
from vkd_plugin.errors import BadValue, ConfigError, UserError
from vkd_plugin.suggest import nearest

Build: TypeAlias = Callable[[Callable[..., Any], list[Any], dict[str, Any]], Any]
"""Calls a target with arguments, or makes something in its place."""


NOT_OWN = "refused: only what an !import_call of a class made may be changed"
"""Why ``!setattr`` may not change an object."""


class Refused(Exception):
    """What a tag was about to do is not to be trusted."""


class _Constructor(NodeConstructor):
    """PyYAML's constructor, which goes on after a failure: what a failed node is needed for is not built.

    Args:
        trust: judges what tags find on the way; names were judged before (:mod:`vkd_plugin.config.tags`).
        build: makes the calls of ``!import_call`` and ``!import_call_method``.
    """

    def __init__(self, trust: Trust, build: Build) -> None:
        super().__init__()
        self.trust = trust
        self.build = build
        self.failures: list[tuple[yaml.Node, Exception]] = []
        self._failed: dict[int, bool] = {}  # of the nodes that were asked for so far
        self._own: dict[int, Any] = {}  # objects that calls of classes made, by identity

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's, but a failure is remembered with the innermost node that it belongs to."""
        if not is_active(node):
            return super().construct_object(node, deep)
        if id(node) not in self._failed:
            for child in children(node):
                self.construct_object(child, deep=True)
        if self._has_failed(node):
            return None
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # tags call whatever the user names
            self.failures.append((node, error))
            self._failed[id(node)] = True
            return None

    def _has_failed(self, node: yaml.Node) -> bool:
        """Whether ``node``, whose tags have run, could not be built in all its parts."""
        if id(node) not in self._failed:
            self._failed[id(node)] = any(self._has_failed(child) for child in children(node))
        return self._failed[id(node)]

    # Tags, which mean what they do in torchdistill.

    def import_get(self, node: yaml.MappingNode) -> Any:
        """``!import_get {key, package}``."""
        self.construct_mapping(node, deep=True)
        return judged(self.trust, self._target(node), str(target_name(node)))

    def import_call(self, node: yaml.MappingNode) -> Any:
        """``!import_call {key, package, init: {args, kwargs}}``, and the same for a method."""
        init = self.construct_mapping(node, deep=True).get("init") or {}
        target, args, kwargs = self._target(node), init.get("args", []), init.get("kwargs", {})
        self._judge_call(target, args, kwargs)
        result = judged(self.trust, self.build(target, args, kwargs), str(target_name(node)))
        if inspect.isclass(target):
            self._own[id(result)] = result
        return result

    def call_method(self, node: yaml.MappingNode) -> Any:
        """``!call_method {obj, method_name, args, kwargs, returns_obj}``."""
        entry = self.construct_mapping(node, deep=True)
        method = read_attribute(self.trust, entry["obj"], entry["method_name"])
        args, kwargs = entry.get("args") or [], entry.get("kwargs") or {}
        self._judge_call(method, args, kwargs)
        result = method(*args, **kwargs)
        return entry["obj"] if entry.get("returns_obj") else judged(self.trust, result, entry["method_name"])

    def getattr(self, node: yaml.SequenceNode) -> Any:
        """``!getattr [obj, name]``, or with a default."""
        return read_attribute(self.trust, *self.construct_sequence(node, deep=True))

    def setattr(self, node: yaml.SequenceNode) -> Any:
        """``!setattr [obj, name, value]``; only of what the experiment made, as others share all else."""
        owner, name, value = self.construct_sequence(node, deep=True)
        read_attribute(self.trust, owner, name, None)
        if id(owner) not in self._own:
            raise Refused(NOT_OWN)
        setattr(owner, name, value)
        return owner

    def access_by_index_or_key(self, node: yaml.MappingNode) -> Any:
        """``!access_by_index_or_key {data, index_or_key}``."""
        entry = self.construct_mapping(node, deep=True)
        return judged(self.trust, entry["data"][entry["index_or_key"]], str(entry["index_or_key"]))

    def _target(self, node: yaml.Node) -> Any:
        name = target_name(node)
        if name is None:
            raise ImportError("it names nothing to import")
        refusal = self.trust.of_name(name)
        if refusal is None:
            target = find(name, node.tag == "!import_call_method", self.trust)
            refusal = self.trust.of_value(target, name)
        if refusal is not None:
            raise Refused(refusal)
        return target

    def _judge_call(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        refusal = self.trust.of_call(target, args, kwargs)
        if refusal is not None:
            raise Refused(refusal)


for _tag in ACTIVE_TAGS:
    _method = "import_call" if _tag == "!import_call_method" else _tag[1:]
    _Constructor.add_constructor(_tag, getattr(_Constructor, _method))


def call(target: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``target(*args, **kwargs)``."""
    return target(*args, **kwargs)


def construct(root: yaml.Node, trust: Trust | None = None, build: Build = call) -> Any:
    """What the graph means, its tags executed.

    Args:
        root: the graph.
        trust: what tags may reach.
        build: makes the calls of ``!import_call``; by default it calls.

    Raises:
        ConfigErrors: tags that failed, each with its line and what was raised. What such a tag was needed for is not
            built; all else is.
    """
    loader = _Constructor(trust or Trust(), build)
    try:
        value = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ConfigErrors([syntax_problem(error, root.start_mark.name, {})]) from None
    problems = [
        ConfigError(f"{_title(node)}{_explain(error, node)}", _place_of(error, node)) for node, error in loader.failures
    ]
    problems += _refused_entries(value, root, loader.trust)
    if problems:
        raise ConfigErrors(problems) from (loader.failures[0][1] if loader.failures else None)
    return value


def read_attribute(trust: Trust, owner: Any, name: Any, *default: Any) -> Any:
    """``getattr(owner, name)``, or with a default.

    Raises:
        Refused: owner, name or value are not for the experiment.
    """
    refusal = trust.of_attribute(name) or trust.of_value(owner, type(owner).__name__)
    if refusal is not None:
        raise Refused(refusal)
    return judged(trust, getattr(owner, name, *default), name)


def judged(trust: Trust, value: Any, name: str) -> Any:
    """``value``, which a tag found as ``name``; a copy of data, as the original may belong to a module or class.

    Raises:
        Refused: it is, or holds, a module, class or function from where the experiment may not go.
    """
    if is_plain(value):
        return copy.deepcopy(value) if isinstance(value, list | dict | set) else value
    if isinstance(value, dict | list | tuple | set | frozenset):
        for item in value.values() if isinstance(value, dict) else value:
            if item is not value:
                judged(trust, item, name)
    elif inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        own = getattr(value, "__self__", None)
        bound_to_plain = inspect.isbuiltin(value) and isinstance(own, str | bytes | int | float | list | dict)
        if not bound_to_plain and (refusal := trust.of_value(value, name)):
            raise Refused(refusal)
    return value


def _refused_entries(value: Any, node: yaml.Node, trust: Trust) -> list[ConfigError]:
    """What tags have put into the mappings of ``value``, which ``node`` means, and nobody may write there."""
    found: list[ConfigError] = []
    seen: set[int] = set()

    def visit(value: Any, node: yaml.Node) -> None:
        if isinstance(value, nn.ModuleDict | nn.ParameterDict):  # ** takes them too
            value = dict(value.items())
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            return
        seen.add(id(value))
        written = entries(node) if isinstance(node, yaml.MappingNode) and not is_active(node) else {}
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            part = written[key][1] if key in written else node
            if isinstance(value, dict) and (refusal := trust.of_argument(key, item)):
                found.append(ConfigError(refusal, place(part.start_mark)))
            visit(item, part)

    visit(value, node)
    return found


def one_line(error: Exception) -> str:
    """What ``error`` says, in one line, with the nearest right name where one is missing."""
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError) and error.name and error.obj is not None:
        return text + nearest(error.name, [name for name in dir(error.obj) if not name.startswith("_")])
    if isinstance(error, ModuleNotFoundError) and error.name:
        return text + nearest(error.name.rpartition(".")[2], _sibling_modules(error.name))
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: '{error.filename}'"  # without the [Errno 2]
    if isinstance(error, OSError | ImportError | AttributeError | Refused | UserError | BadValue) and text:
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
        names = list(inspect.signature(find(target, False, Trust())).parameters)
    except Exception:  # only a hint is lost
        return text
    return text + nearest(match[1], names)


def _place_of(error: Exception, node: yaml.Node) -> str:
    """Where the value below ``node`` stands that ``error`` is about; ``node`` itself where it is about none."""
    if isinstance(error, BadValue):
        below = [node]
        for part in below:  # which grows
            if isinstance(part, yaml.ScalarNode) and plain_value(part) == error.value:
                return place(part.start_mark)
            below += children(part)
    return place(node.start_mark)


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
    names = ("package", "class_name", "method_name") if node.tag == "!import_call_method" else ("package", "key")
    parts = [values.get(name) for name in names]
    return ".".join(part for part in parts if isinstance(part, str) and part) or None


def find(name: str, is_method: bool, trust: Trust) -> Any:
    """What ``name`` means: an attribute of a module, or of a class in one.

    Raises:
        Exception: there is none, or whatever importing its module raises.
    """
    package, _, key = name.rpartition(".")
    if not package:
        raise ImportError(f"'{name}' names no module; write it in full, for example 'torch.nn.Linear'")
    if not is_method:
        return getattr(import_module(package), key)
    package, _, owner = package.rpartition(".")
    if not package:
        raise ImportError(f"'{name}' should be the name of a module, a class and a method")
    cls = getattr(import_module(package), owner)
    if refusal := trust.of_value(cls, f"{package}.{owner}"):
        raise ImportError(refusal)
    return getattr(cls, key)


def _sibling_modules(name: str) -> Iterable[str]:
    """Modules beside the missing ``name``: in its package, or among those that are imported."""
    package = sys.modules.get(name.rpartition(".")[0])
    if isinstance(package, ModuleType):
        return [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return {module.partition(".")[0] for module in sys.modules if not module.startswith("_")}
