"""Checks a graph against the tables of schema: names of keys, what is missing, types. Nothing is executed."""

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from vkd_plugin.config.nested import with_arguments
from vkd_plugin.config.nodes import (
    OPAQUE,
    TEXT_TAGS,
    Entries,
    describe,
    entries,
    is_active,
    is_null,
    is_private,
    plain_value,
)
from vkd_plugin.config.problems import KeyPath, Problems, dotted
from vkd_plugin.config.schema import TAGS
from vkd_plugin.config.source import STR_TAG, entry_place, place
from vkd_plugin.config.spec import Anything, Either, Flag, Function, Items, Named, Number, Section, Spec, Text
from vkd_plugin.suggest import closest, nearest

# YAML 1.1 as PyYAML has it: without a dot and a signed exponent it is a string.
_EXPONENT = re.compile(r"([-+]?[0-9][0-9_]*)(\.[0-9_]*)?[eE]([-+]?)([0-9]+)$")
_LEFT_OPEN = re.compile(r"<[^<>]+>$")


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
    checker = _Checker(spec, problems)
    checker.visit(root, spec, (), place(root.start_mark))
    checker.say_missing()
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
    return fits_value(spec, plain_value(node))


def is_left_open(value: object) -> bool:
    """Whether a value is a place to fill in, as in what ``run.py list`` prints: ``<int>``."""
    return isinstance(value, str) and _LEFT_OPEN.match(value) is not None


def fits(spec: Spec, node: yaml.Node) -> bool:
    """Whether a scalar is, or may turn out to be, what ``spec`` asks for."""
    return fits_value(spec, plain_value(node))


def mismatch(spec: Spec, node: yaml.Node) -> str:
    """The message about a value that is not what ``spec`` asks for."""
    hint = ""
    value = plain_value(node)
    choices = [choice for option in _options(spec) if isinstance(option, Text) for choice in option.choices]
    if isinstance(value, str) and isinstance(spec, Number):
        hint = number_hint(value)
    elif isinstance(value, str) and (near := closest(value, choices)):
        hint = f" (did you mean '{near}'?)"
    elif isinstance(value, str) and isinstance(spec, Items):
        hint = f"; write ['{value}']"
    elif isinstance(spec, Section) and (names := [*(spec.required or spec.keys)][:3]):
        hint = f"; write {{{', '.join(f'{name}: ...' for name in names)}}}"
    shown = "a list" if isinstance(node, yaml.SequenceNode) and node.tag not in TEXT_TAGS else describe(node)
    return f"expected {spec.expected}, got {shown}{hint}"


def _options(spec: Spec) -> tuple[Spec, ...]:
    return spec.options if isinstance(spec, Either) else (spec,)


class _Checker:
    def __init__(self, root: Section, problems: Problems) -> None:
        self.root = root
        self.problems = problems
        self.found: list[Found] = []
        self._missing: list[tuple[str, str, KeyPath]] = []
        self._astray: set[KeyPath] = set()  # where keys belong that stand elsewhere

    def say_missing(self) -> None:
        """Adds the missing keys, but for those that stand in another place, which has been reported."""
        for name, where, path in self._missing:
            if (*path, name) not in self._astray:
                self.problems.add(f"missing key '{name}'", where, path)

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
            spec = with_arguments(spec, node)
        if node.tag not in TEXT_TAGS:
            self._visit_content(node, spec, path, where)
        elif not fits_value(spec, plain_value(node)) or isinstance(spec, Section | Named | Items):
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
        elif not isinstance(node, yaml.ScalarNode) or not fits_value(
            spec, node.value if node.tag in TAGS else plain_value(node)
        ):
            self._mismatch(node, spec, path, where)

    def _visit_section(self, node: yaml.MappingNode, spec: Section, path: KeyPath, where: str) -> None:
        present = entries(node)
        unknown, explained = [], []
        for name, (key, value) in present.items():
            if is_private(name):
                continue
            child: KeyPath = (*path, name)
            if isinstance(name, str) and name in spec.keys:
                self.visit(value, spec.keys[name], child, entry_place(key, value))
            elif isinstance(name, str) and name in spec.elsewhere:
                message = f"'{name}' is not read here: {spec.elsewhere[name]}"
                self.problems.add(message, entry_place(key, value), path)
                explained.append(message)
            elif spec.open:
                self.visit(value, Anything(), child, entry_place(key, value))
            else:
                unknown.append(name)
                self.problems.add(self._unknown(name, key, spec, path, present), entry_place(key, value), path)
        for name in spec.required:
            # Of a misspelt key, and of one with another name here, the name has been said that is now missing.
            said = any(closest(wrong, [name]) for wrong in unknown) or any(f"'{name}'" in text for text in explained)
            if name not in present and not said:
                self._missing.append((name, where, path))

    def _unknown(self, name: object, key: yaml.Node, spec: Section, path: KeyPath, present: Entries) -> str:
        """The message about a key that nobody reads here: the nearest that is read, or the place for this one."""
        shown = describe(key) if isinstance(name, yaml.Node) else f"'{name}'"
        homes = [] if isinstance(name, yaml.Node) or closest(name, spec.keys) else _homes(name, self.root)
        if homes:
            home = max(homes, key=lambda other: _shared(other, path))
            self._astray.add((*home, name))
            return f"{shown} is not read here: it belongs {f'in {dotted(home)}' if home else 'at the top level'}"
        if spec.component and "key" in present and "kwargs" in spec.keys and not closest(name, spec.keys):
            return f"unknown key {shown}: arguments of {plain_value(present['key'][1])} belong under kwargs"
        return f"unknown key {shown}{nearest(name, [*spec.keys])}"

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
        self.problems.add(mismatch(spec, node), where, path)


def _homes(name: object, spec: Section, path: KeyPath = ()) -> list[KeyPath]:
    """The sections below ``spec`` that have a key ``name`` of their own."""
    found = [path] if name in spec.keys and name not in ("key", "kwargs", "args") else []
    for key, value in spec.keys.items():
        if isinstance(value, Section):
            found += _homes(name, value, (*path, key))
    return found


def _shared(path: KeyPath, other: KeyPath) -> int:
    """With how many steps both begin."""
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other)))


def fits_value(spec: Spec, value: Any) -> bool:
    """Whether the value of a scalar is, or may turn out to be, what ``spec`` asks for."""
    if value is OPAQUE or isinstance(spec, Anything) or is_left_open(value):
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
