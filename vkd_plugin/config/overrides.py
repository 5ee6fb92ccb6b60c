"""``--set a.b.c=value``: changes to the node graph, before anything is built."""

import yaml

from vkd_plugin.config.graph import substitute
from vkd_plugin.config.nodes import (
    describe,
    empty_mapping,
    entries,
    is_null,
    is_private,
    null,
    plain_key,
    string,
    with_value,
)
from vkd_plugin.config.problems import FLAG, ConfigErrors, KeyPath, Problems, dotted
from vkd_plugin.config.schema import TAGS
from vkd_plugin.config.source import compose
from vkd_plugin.config.spec import Anything, Items, Named, Section, Spec
from vkd_plugin.config.structure import option_for
from vkd_plugin.errors import ConfigError
from vkd_plugin.suggest import nearest


class Override:
    """One ``PATH=VALUE``.

    Args:
        text: as typed after ``--set``. PATH is keys and list indices joined by dots; VALUE is YAML.

    Raises:
        ConfigErrors: no ``=``, an empty part of PATH, or a VALUE that is not YAML.
    """

    def __init__(self, text: str) -> None:
        self.name = FLAG + " ".join(text.split())
        path, equals, value = text.partition("=")
        self.parts = tuple(part.strip() for part in path.split("."))
        if not equals or not all(self.parts):
            message = "expected PATH=VALUE, for example train.num_epochs=3"
            raise ConfigErrors([ConfigError(message, self.name)])
        node = compose(value, self.name)
        self.value = null(self.name) if node is None else node

    @property
    def is_private(self) -> bool:
        """Whether the path leads to an anchor's own place, which only its aliases read."""
        return any(is_private(part) for part in self.parts)

    def apply(self, root: yaml.MappingNode, spec: Section) -> yaml.MappingNode:
        """The graph with the value at the path.

        Only nodes on the path are copied, so an anchor that it goes through keeps its value everywhere else.

        Raises:
            ConfigError: there is no such path, and none may be added.
        """
        changed = self._set(root, spec, self.parts, ())
        assert isinstance(changed, yaml.MappingNode)
        return changed

    def apply_to_anchor(self, root: yaml.MappingNode) -> yaml.MappingNode:
        """The graph with the value at the path and at every alias of what stood there.

        Raises:
            ConfigError: there is no such path.
        """
        node: yaml.Node = root
        parts = self.parts
        while parts:
            step = _step(node, parts)
            if step is None:
                break
            node, parts = step[0], parts[step[1] :]
        done: KeyPath = self.parts[: len(self.parts) - len(parts)]
        new = self._set(node, Anything(), parts, done) if parts else self.value
        if node is root:
            assert isinstance(new, yaml.MappingNode)
            return new
        substitute(root, node, new)
        return root

    def _set(self, node: yaml.Node, spec: Spec, parts: tuple[str, ...], done: KeyPath) -> yaml.Node:
        """``node``, which stands at ``done``, with the value at ``parts`` below it."""
        if not parts:
            return self.value
        spec = option_for(TAGS.get(node.tag, spec), node)
        if is_null(node) and isinstance(spec, Section | Named | Anything):
            node = empty_mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return self._set_item(node, spec, parts, done)
        if not isinstance(node, yaml.MappingNode):
            message = f"{dotted(done)} is {describe(node)}, not a mapping or a list"
            raise ConfigError(message, self.name)
        step = _step(node, parts)
        if step is None:
            child = self._new_child(node, spec, parts, done)
            fresh = self._set(null(self.name), child, parts[1:], (*done, parts[0]))
            return with_value(node, [*node.value, (string(parts[0], self.name), fresh)])
        old, used = step
        name = ".".join(parts[:used])
        new = self._set(old, _child(spec, name) or Anything(), parts[used:], (*done, name))
        # By name: under another key may stand an alias of the same value.
        pairs = [(key, new if str(plain_key(key)) == name else value) for key, value in node.value]
        return with_value(node, pairs)

    def _set_item(self, node: yaml.SequenceNode, spec: Spec, parts: tuple[str, ...], done: KeyPath) -> yaml.Node:
        step = _step(node, parts)
        if step is None:
            count = len(node.value)
            items = f"its items are 0 to {count - 1}" if count else "it is empty"
            raise ConfigError(f"no item '{parts[0]}' in {dotted(done)}: {items}", self.name)
        item = spec.item if isinstance(spec, Items) else Anything()
        index = int(parts[0]) % len(node.value)
        new = self._set(step[0], item, parts[1:], (*done, parts[0]))
        return with_value(node, [new if i == index else old for i, old in enumerate(node.value)])

    def _new_child(self, node: yaml.MappingNode, spec: Spec, parts: tuple[str, ...], done: KeyPath) -> Spec:
        """What may stand at the key ``parts[0]``, which ``node`` does not have."""
        child = _child(spec, parts[0])
        # Where any name would do, a path that goes on below a new one is more likely a misspelt one.
        known = isinstance(spec, Section) and parts[0] in spec.keys
        if child is not None and (known or len(parts) == 1):
            return child
        names = [str(key) for key in entries(node) if not is_private(key)]
        names += [*spec.keys] if isinstance(spec, Section) else []
        place = f" in {dotted(done)}" if done else ""
        raise ConfigError(f"no key '{parts[0]}'{place}{nearest(parts[0], names)}", self.name)


def apply_overrides(
    root: yaml.MappingNode, texts: list[Override], spec: Section, problems: Problems
) -> yaml.MappingNode:
    """``root`` with all of ``texts`` applied in turn; what cannot be applied goes to ``problems``."""
    for override in texts:
        try:
            root = override.apply_to_anchor(root) if override.is_private else override.apply(root, spec)
        except ConfigError as error:
            problems.add(error.message, error.where)
    return root


def _step(node: yaml.Node, parts: tuple[str, ...]) -> tuple[yaml.Node, int] | None:
    """The node one key or index below, and how many parts name it: a key may have dots in it."""
    if isinstance(node, yaml.SequenceNode):
        digits = parts[0].removeprefix("-")
        if digits.isdigit() and -len(node.value) <= int(parts[0]) < len(node.value):
            return node.value[int(parts[0])], 1
        return None
    if isinstance(node, yaml.MappingNode):
        values = {str(key): value for key, (_, value) in entries(node).items()}
        for used in range(len(parts), 0, -1):
            if (name := ".".join(parts[:used])) in values:
                return values[name], used
    return None


def _child(spec: Spec, name: str) -> Spec | None:
    """What may stand at ``name``; None where nothing may."""
    if is_private(name):
        return Anything()
    if isinstance(spec, Section):
        return spec.keys.get(name, Anything() if spec.open else None)
    return spec.entry if isinstance(spec, Named) else Anything()
