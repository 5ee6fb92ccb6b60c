"""What torchdistill's tags would import and call, judged and looked up before any of them runs."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from vkd_plugin.config.construct import NOT_OWN, Refused, find, judged, one_line, read_attribute, target_name
from vkd_plugin.config.nodes import OPAQUE, Entries, children, entries, is_null, plain_value
from vkd_plugin.config.problems import KeyPath, Problems
from vkd_plugin.config.source import entry_place, place
from vkd_plugin.config.trust import ARGUMENTS, Trust

IMPORTS = ("!import_get", "!import_call", "!import_call_method")
READS = ("!getattr", "!setattr", "!call_method", "!access_by_index_or_key")
_NAMES = ("key", "package", "class_name", "method_name")


def dependencies(root: yaml.MappingNode) -> list[tuple[str, str | None, str]]:
    """Name, package (for a relative name) and place of every module under ``dependencies``."""
    top = entries(root)
    if "dependencies" not in top:
        return []
    key, node = top["dependencies"]
    is_list = isinstance(node, yaml.SequenceNode) and not node.tag.startswith("!")
    found: list[tuple[str, str | None, str]] = []
    for item in node.value if is_list else [node]:
        # In any of the three forms that torchdistill takes: a name, a pair, a mapping.
        if isinstance(item, yaml.MappingNode):
            known = {name: plain_value(value) for name, (_, value) in entries(item).items()}
            values = [known.get("name"), known.get("package")]
        else:
            value = plain_value(item)
            values = value if isinstance(value, list) else [value]
        name, package, *_ = [*values, None, None]
        if isinstance(name, str) and name:
            where = place(item.start_mark) if is_list else entry_place(key, item)
            found.append((name, package if isinstance(package, str) else None, where))
    return found


def check_text(root: yaml.MappingNode, trust: Trust, problems: Problems) -> None:
    """Adds to ``problems`` every name in the graph that ``trust`` refuses as text; nothing is imported.

    All of the graph is looked at, anchors under private keys included: they are constructed like the rest.
    """

    seen: set[int] = set()

    def visit(node: yaml.Node, path: KeyPath) -> None:
        if id(node) in seen:  # aliases of one tag, which may hold aliases of others
            return
        seen.add(id(node))
        if node.tag in IMPORTS:
            _check_name(node, trust, problems, path)
        elif node.tag in ("!getattr", "!setattr", "!call_method"):
            _check_attribute(node, trust, problems, path)
        if isinstance(node, yaml.MappingNode):
            visit_mapping(node, path)
        else:
            for index, item in enumerate(children(node)):
                visit(item, (*path, index))

    def visit_mapping(node: yaml.MappingNode, path: KeyPath) -> None:
        for name, (key, value) in entries(node).items():
            here = (*path, "?" if isinstance(name, yaml.Node) else name)
            if isinstance(name, yaml.Node):
                visit(key, here)
                if (node.tag in IMPORTS) or path[-1:] == ("kwargs",):
                    problems.add("a tag cannot make a key here", place(key.start_mark), path)
            if name in ARGUMENTS and (refusal := trust.of_argument(name, plain_value(value))):
                problems.add(refusal, entry_place(key, value), path)
            visit(value, here)

    if "dependencies" in (top := entries(root)) and plain_value(top["dependencies"][1]) is OPAQUE:
        problems.add("'dependencies' has to be written out", entry_place(*top["dependencies"]))
    for name, package, where in dependencies(root):
        absolute = f"{package}.{name.lstrip('.')}" if name.startswith(".") and package else name
        if refusal := trust.of_dependency(absolute):
            problems.add(refusal, where, ("dependencies",))
    visit(root, ())


def _check_name(node: yaml.Node, trust: Trust, problems: Problems, path: KeyPath) -> None:
    if not isinstance(node, yaml.MappingNode):
        return  # the structure's check says so
    present = entries(node)
    for part in _NAMES:
        if part in present and plain_value(present[part][1]) is OPAQUE:
            problems.add(f"'{part}' has to be written out", entry_place(*present[part]), path)
            return
    name = target_name(node)
    refusal = trust.of_name(name) if name else None
    if refusal:
        problems.add(refusal, _name_place(node, present), path)


def _check_attribute(node: yaml.Node, trust: Trust, problems: Problems, path: KeyPath) -> None:
    name: yaml.Node | None = None
    if isinstance(node, yaml.SequenceNode) and len(node.value) > 1:
        name = node.value[1]
    elif isinstance(node, yaml.MappingNode) and "method_name" in entries(node):
        name = entries(node)["method_name"][1]
    if name is not None and (refusal := trust.of_attribute(plain_value(name))):
        problems.add(refusal, place(name.start_mark), path)


def _name_place(node: yaml.Node, present: Entries) -> str:
    """Where the name in a tag stands."""
    return next((entry_place(*present[name]) for name in _NAMES if name in present), place(node.start_mark))


def check_targets(
    root: yaml.MappingNode,
    trust: Trust,
    problems: Problems,
    check_arguments: Callable[[Any, str, yaml.MappingNode, str, KeyPath], None],
) -> None:
    """Imports what the tags name, and adds to ``problems`` what is missing, refused, or called with wrong arguments.

    Args:
        root: a graph whose names :func:`check_text` has found nothing against.
        trust: judges what the names mean.
        problems: where to.
        check_arguments: called with a callable, its name, the mapping that holds ``args`` and ``kwargs``, and that
            mapping's place and path.
    """
    seen: set[int] = set()
    reached: dict[int, Any] = {}  # what is known without a call: imported, or read of what was

    def visit(node: yaml.Node, path: KeyPath) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if node.tag in IMPORTS and isinstance(node, yaml.MappingNode):
            look_up(node, path)
        if isinstance(node, yaml.MappingNode):
            for name, (key, value) in entries(node).items():
                visit(key, path)
                visit(value, (*path, name))
        else:
            for index, item in enumerate(children(node)):
                visit(item, (*path, index))
        if node.tag in READS:
            read(node, path)

    def read(node: yaml.Node, path: KeyPath) -> None:
        """Reads what needs no call to be known, so that it is refused before there is any."""
        parts = _read_parts(node)
        if parts is None or id(parts[0]) not in reached:
            return
        owner, name = reached[id(parts[0])], plain_value(parts[1])
        try:
            if node.tag == "!setattr":
                raise Refused(NOT_OWN)
            if node.tag == "!access_by_index_or_key":
                value = judged(trust, owner[name], str(name))
            else:
                value = read_attribute(trust, owner, name)
        except Refused as error:
            problems.add(f"{node.tag}: {error}", place(node.start_mark), path)
        except Exception:  # the tag says so when it runs
            pass
        else:
            if node.tag != "!call_method":
                reached[id(node)] = value

    def look_up(node: yaml.MappingNode, path: KeyPath) -> None:
        name, present = target_name(node), entries(node)
        if name is None:
            return
        where = _name_place(node, present)
        try:
            target = find(name, is_method=node.tag == "!import_call_method", trust=trust)
        except Exception as error:  # a module may raise anything while it is imported
            problems.add(f"{name}: {one_line(error)}", where, path)
            return
        if refusal := trust.of_value(target, name):
            problems.add(refusal, where, path)
        elif node.tag != "!import_get" and not callable(target):
            problems.add(f"{name} is {target!r}, which cannot be called", where, path)
        elif node.tag == "!import_get":
            reached[id(node)] = target
        else:
            init = present["init"][1] if "init" in present else node
            if is_null(init):
                init = yaml.MappingNode(node.tag, [], init.start_mark, init.end_mark)
            if isinstance(init, yaml.MappingNode):
                check_positional(target, init, path)
                check_arguments(target, name, init, where, path)

    def check_positional(target: Any, init: yaml.MappingNode, path: KeyPath) -> None:
        """Judges what stands under ``args`` by the names that the callee has for it."""
        present = entries(init)
        items = present["args"][1] if "args" in present else None
        with suppress(TypeError, ValueError):  # it has no signature
            names = list(inspect.signature(target).parameters)
            for name, item in zip(names, items.value if isinstance(items, yaml.SequenceNode) else [], strict=False):
                if name in ARGUMENTS and (refusal := trust.of_argument(name, plain_value(item))):
                    problems.add(refusal, place(item.start_mark), path)

    visit(root, ())


def _read_parts(node: yaml.Node) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of the object that a tag reads, and of the attribute, index or key; None if they are not there."""
    if node.tag in ("!getattr", "!setattr"):
        parts = children(node)
        return (parts[0], parts[1]) if len(parts) > 1 else None
    present = entries(node) if isinstance(node, yaml.MappingNode) else {}
    names = ("data", "index_or_key") if node.tag == "!access_by_index_or_key" else ("obj", "method_name")
    if not all(name in present for name in names):
        return None
    return present[names[0]][1], present[names[1]][1]
