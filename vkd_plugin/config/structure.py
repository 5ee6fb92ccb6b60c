"""Checks a graph against the tables of schema: names of keys, what is missing, types. Nothing is executed."""

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from vkd_plugin.config.nodes import (
    OPAQUE,
    TEXT_TAGS,
    describe,
    entries,
    is_active,
    is_null,
    is_private,
    plain_value,
)
from vkd_plugin.config.problems import KeyPath, Problems
from vkd_plugin.config.schema import TAGS
from vkd_plugin.config.source import STR_TAG, entry_place, place
from vkd_plugin.config.spec import Anything, Either, Flag, Function, Items, Named, Number, Section, Spec, Text
from vkd_plugin.suggest import nearest

# YAML 1.1 as PyYAML has it: without a dot and a signed exponent it is a string.
_EXPONENT = re.compile(r"([-+]?[0-9][0-9_]*)(\.[0-9_]*)?[eE]([-+]?)([0-9]+)$")


@dataclass(frozen=True)
class Found:
    """A value in its place, kept where references has something to look up.

    Args:
        path: the way to it.
        node: the value.
        spec: a Section with a ``component``, or a Text with a ``role``.
        where: its place, for messages.
    """

    path: KeyPath
    node: yaml.Node
    spec: Spec
    where: str


def check_structure(root: yaml.MappingNode, spec: Section, problems: Problems) -> list[Found]:
    """Adds to ``problems`` all that does not fit ``spec``; returns what has to be looked up in registries."""
    checker = _Checker(problems)
    checker.visit(root, spec, (), place(root.start_mark))
    return checker.found


def option_for(spec: Spec, node: yaml.Node) -> Spec:
    """The option of an Either that this value can be, or nothing can grow into; else the Either."""
    if not isinstance(spec, Either):
        return spec
    for option in spec.options:
        if is_null(node) and isinstance(option, Section | Named):
            return option
        option = option_for(option, node)
        if _same_kind(option, node):
            return option
    return spec


def number_hint(value: str) -> str:
    """How YAML has the number that ``value`` was meant to be, as the end of a message; nothing for other text."""
    match = _EXPONENT.match(value)
    if not match:
        return ""
    digits, fraction, sign, exponent = match.groups()
    fraction = fraction if fraction and fraction != "." else ".0"
    return f"; YAML reads it as a string, write {digits}{fraction}e{sign or '+'}{exponent}"


def _meant_as_number(node: yaml.ScalarNode) -> bool:
    """Whether it is an unquoted string such as 1e-4."""
    return node.tag == STR_TAG and not node.style and bool(number_hint(node.value))


def _same_kind(spec: Spec, node: yaml.Node) -> bool:
    if isinstance(spec, Section | Named):
        return isinstance(node, yaml.MappingNode)
    if isinstance(spec, Items):
        return isinstance(node, yaml.SequenceNode) and node.tag not in TEXT_TAGS
    # Options of one kind are told apart by their values: a flag or a mode.
    return _fits(spec, plain_value(node))


class _Checker:
    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.found: list[Found] = []

    def visit(self, node: yaml.Node, spec: Spec, path: KeyPath, where: str) -> None:
        """Checks ``node`` at ``path`` against ``spec``; ``where`` is its line as a user sees it."""
        if node.tag in TAGS:
            self._visit_content(node, TAGS[node.tag], path, where)
        if is_active(node):
            return  # what it makes is known only after construction
        if is_null(node) and not isinstance(spec, Anything):
            if not spec.nullable:
                self.problems.add(f"expected {spec.expected}, got nothing", where, path)
            return
        spec = option_for(spec, node)
        if isinstance(spec, Text) and spec.role:
            self.found.append(Found(path, node, spec, where))
        if isinstance(spec, Section) and spec.component and isinstance(node, yaml.MappingNode):
            self.found.append(Found(path, node, spec, where))
        if node.tag not in TEXT_TAGS:
            self._visit_content(node, spec, path, where)
        elif not _fits(spec, plain_value(node)) or isinstance(spec, Section | Named | Items):
            self._mismatch(node, spec, path, where)

    def _visit_content(self, node: yaml.Node, spec: Spec, path: KeyPath, where: str) -> None:
        """Checks what stands in ``node``, whatever its tag."""
        if isinstance(spec, Anything):
            self._visit_anything(node, path, where)
        elif isinstance(spec, Section) and isinstance(node, yaml.MappingNode):
            self._visit_section(node, spec, path, where)
        elif isinstance(spec, Named) and isinstance(node, yaml.MappingNode):
            for name, (key, value) in entries(node).items():
                if not is_private(name):
                    self.visit(value, spec.entry, (*path, name), entry_place(key, value))
        elif isinstance(spec, Items) and isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, spec.item, (*path, index), place(item.start_mark))
        elif not _fits(spec, node.value if node.tag in TAGS else plain_value(node)):
            self._mismatch(node, spec, path, where)

    def _visit_section(self, node: yaml.MappingNode, spec: Section, path: KeyPath, where: str) -> None:
        present = entries(node)
        unknown = []
        for name, (key, value) in present.items():
            if is_private(name):
                continue
            child: KeyPath = (*path, name)
            if isinstance(name, str) and name in spec.keys:
                self.visit(value, spec.keys[name], child, entry_place(key, value))
            elif isinstance(name, str) and name in spec.elsewhere:
                message = f"'{name}' is not read here: {spec.elsewhere[name]}"
                self.problems.add(message, entry_place(key, value), path)
            elif spec.open:
                self.visit(value, Anything(), child, entry_place(key, value))
            else:
                unknown.append(name)
                shown = describe(key) if isinstance(name, yaml.Node) else f"'{name}'"
                message = f"unknown key {shown}{nearest(name, [*spec.keys])}"
                self.problems.add(message, entry_place(key, value), path)
        for name in spec.required:
            # A misspelt key has been reported, with the name that is now missing.
            if name not in present and not any("did you mean" in nearest(wrong, [name]) for wrong in unknown):
                self.problems.add(f"missing key '{name}'", where, path)

    def _visit_anything(self, node: yaml.Node, path: KeyPath, where: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, (key, value) in entries(node).items():
                if not is_private(name):
                    self.visit(value, Anything(), (*path, name), entry_place(key, value))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, Anything(), (*path, index), place(item.start_mark))
        elif isinstance(node, yaml.ScalarNode) and _meant_as_number(node):
            self.problems.add(f"expected a number, got '{node.value}'{number_hint(node.value)}", where, path)

    def _mismatch(self, node: yaml.Node, spec: Spec, path: KeyPath, where: str) -> None:
        hint = ""
        value = plain_value(node)
        if isinstance(value, str) and isinstance(spec, Number):
            hint = number_hint(value)
        elif isinstance(value, str) and isinstance(spec, Text) and spec.choices:
            hint = nearest(value, spec.choices)
        elif isinstance(value, str) and isinstance(spec, Items):
            hint = f"; write ['{value}']"
        self.problems.add(f"expected {spec.expected}, got {describe(node)}{hint}", where, path)


def _fits(spec: Spec, value: Any) -> bool:
    """Whether the value of a scalar is, or may turn out to be, what ``spec`` asks for."""
    if value is OPAQUE or isinstance(spec, Anything):
        return True
    if isinstance(spec, Number):
        if isinstance(value, bool) or not isinstance(value, int if spec.whole else int | float):
            return False
        low = -math.inf if spec.low is None else spec.low
        high = math.inf if spec.high is None else spec.high
        return low <= value <= high  # .nan is within no bounds
    if isinstance(spec, Flag):
        return isinstance(value, bool)
    if isinstance(spec, Text):
        return isinstance(value, str) and (not spec.choices or value in spec.choices)
    return isinstance(spec, Function) and callable(value)
