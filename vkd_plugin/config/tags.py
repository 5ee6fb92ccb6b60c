"""What torchdistill's tags would import and call, judged and looked up before any of them runs."""

from collections.abc import Callable
from typing import Any

import yaml

from vkd_plugin.config.construct import find, one_line, target_name
from vkd_plugin.config.nodes import OPAQUE, Entries, children, entries, is_null, plain_value
from vkd_plugin.config.problems import KeyPath, Problems
from vkd_plugin.config.source import entry_place, place
from vkd_plugin.config.trust import Trust

IMPORTS = ("!import_get", "!import_call", "!import_call_method")
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

    def visit(node: yaml.Node, path: KeyPath) -> None:
        if node.tag in IMPORTS:
            _check_name(node, trust, problems, path)
        elif node.tag in ("!getattr", "!setattr", "!call_method"):
            _check_attribute(node, trust, problems, path)
        if isinstance(node, yaml.MappingNode):
            _check_mapping(node, trust, problems, path)
        else:
            for index, item in enumerate(children(node)):
                visit(item, (*path, index))

    def _check_mapping(node: yaml.MappingNode, trust: Trust, problems: Problems, path: KeyPath) -> None:
        for name, (key, value) in entries(node).items():
            here = (*path, "?" if isinstance(name, yaml.Node) else name)
            if isinstance(name, yaml.Node):
                visit(key, here)
                if (node.tag in IMPORTS) or path[-1:] == ("kwargs",):
                    problems.add("a tag cannot make a key here", place(key.start_mark), path)
            if refusal := trust.of_argument(name, plain_value(value)):
                problems.add(refusal, entry_place(key, value), path)
            if name == "repo_or_dir" and not is_null(value) and (refusal := trust.of_hub()):
                problems.add(refusal, entry_place(key, value), here)
            visit(value, here)

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
        elif node.tag != "!import_get":
            init = present["init"][1] if "init" in present else node
            if is_null(init):
                init = yaml.MappingNode(node.tag, [], init.start_mark, init.end_mark)
            if isinstance(init, yaml.MappingNode):
                check_arguments(target, name, init, where, path)

    visit(root, ())
