"""What has changed between an experiment as it was saved and as it is now, key by key."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest

import yaml

from vkd_plugin.config.experiment import Experiment
from vkd_plugin.config.graph import check_graph, digest
from vkd_plugin.config.nodes import is_null, is_private, plain_key, plain_value
from vkd_plugin.config.problems import ConfigErrors, KeyPath, Problems, dotted
from vkd_plugin.config.source import STR_TAG, compose

LOADERS = (
    "train.train_data_loader",
    "train.val_data_loader",
    "train.stage*.train_data_loader",
    "train.stage*.val_data_loader",
    "test.test_data_loader",
)
WORKERS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "timeout",
    "multiprocessing_context",
    "pin_memory_device",
)
FREE = (
    # How batches get to the device, not what is in them.
    *(f"{loader}.kwargs.{name}" for loader in LOADERS for name in WORKERS),
    # How often something is logged or saved.
    "train.log_freq",
    "test.log_freq",
    "test.pictures",
    "train.checkpoint",
    "train.validate_every",
    "train.teacher_cache.folder",
    # What happens to a step that went wrong: how a run that ended with it goes on.
    "train.skip_nonfinite",
    # Where weights are put afterwards.
    "**.dst_ckpt",
)
"""Keys that do not decide what is trained, with all that is below them.

``*`` stands for any text within one key, ``**`` in front for any way to it.
"""

LONGEST = 80
"""Of a value, so that a change fits a line of a message."""


@dataclass(frozen=True)
class Change:
    """One key that says something else than before, or is on one side only.

    Attributes:
        key: as ``--set`` takes it: ``train.optimizer.kwargs.lr``, items of lists by index.
        before: the value as it was: a scalar so that ``--set`` takes it, unless it is very long; ``{...}`` for
            a mapping and ``[...]`` for a list; the tag in front if there is one. None where the key was missing.
        now: the same for the value as it is; None where the key is missing.
    """

    key: str
    before: str | None
    now: str | None

    def __str__(self) -> str:
        """``train.optimizer.kwargs.lr: 0.002 -> 0.001``, ``train.ema: added`` or ``train.amp: removed``."""
        key = " ".join(self.key.split())  # a line break in a key would break the message's line
        if self.before is None:
            return f"{key}: added"
        return f"{key}: removed" if self.now is None else f"{key}: {self.before} -> {self.now}"


def changes(before: str, now: Experiment) -> list[Change]:
    """What ``now`` would train otherwise than the experiment that ``before`` is the text of.

    Values are compared as by ``Experiment.digest``: how they are written makes no difference, what they say
    does, tags included. What is FREE may differ. Nothing in ``before`` is executed.

    Args:
        before: what ``Experiment.dump`` gave.
        now: the experiment to compare with it.

    Returns:
        The changes in the order of ``before``, what was added to a mapping after the rest of it. A mapping or
        list that is on one side only is one change. Empty if both train the same.

    Raises:
        ValueError: ``before`` cannot be read as an experiment's text.
    """
    return [*_changes(_root(before), _root(now.dump()), ())]


def sentence(changes: Sequence[Change], show: int = 5) -> str:
    """``changes`` in one line, joined by '; ': the first ``show`` of them, then how many more there are."""
    parts = [str(change) for change in changes[:show]]
    if len(changes) > show:
        parts.append(f"and {len(changes) - show} more")
    return "; ".join(parts)


def _root(text: str) -> yaml.MappingNode:
    problems = Problems()
    try:
        root = compose(text, "the saved experiment")
        if not isinstance(root, yaml.MappingNode) or _tag(root):
            raise ValueError("the saved experiment is not a mapping")
        check_graph(root, problems)
        problems.raise_if_any()
    except ConfigErrors as error:
        raise ValueError(str(error.problems[0])) from None
    except (KeyError, AttributeError, OverflowError) as error:  # PyYAML's for `!!bool x` and other damage
        raise ValueError(f"the saved experiment cannot be read: {error}") from None
    return root


def _changes(before: yaml.Node, now: yaml.Node, path: KeyPath) -> Iterator[Change]:
    if type(before) is not type(now) or _tag(before) != _tag(now):
        yield _change(path, before, now)
    elif isinstance(before, yaml.MappingNode) and isinstance(now, yaml.MappingNode):
        old, new = _entries(before), _entries(now)
        for name in old | new:
            part = (old.get(name) or new[name])[0]
            yield from _changes_at((*path, part), *(side[name][1] if name in side else None for side in (old, new)))
    elif isinstance(before, yaml.SequenceNode):
        for index, (item, other) in enumerate(zip_longest(before.value, now.value)):
            yield from _changes_at((*path, index), item, other)
    elif digest(before) != digest(now):
        yield _change(path, before, now)


def _changes_at(path: KeyPath, before: yaml.Node | None, now: yaml.Node | None) -> Iterator[Change]:
    """The changes of a key or item, which may be missing on one side."""
    if _is_free(path):
        return
    if before is not None and now is not None:
        yield from _changes(before, now, path)
    elif (only := before or now) is not None and not _is_all_free(only, path):
        yield _change(path, before, now)


def _change(path: KeyPath, before: yaml.Node | None, now: yaml.Node | None) -> Change:
    old, new = (None if node is None else _text(node) for node in (before, now))
    short = [text if text is None or len(text) <= LONGEST else _shortened(text) for text in (old, new)]
    if short[0] == short[1]:  # what differs was in the part that was left out
        short = [old, new]
    return Change(dotted(path), *short)


def _shortened(text: str) -> str:
    """``text`` without its middle: of a path, the end tells more than the rest."""
    half = (LONGEST - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _text(node: yaml.Node) -> str:
    tag = f"{node.tag} " if _tag(node) else ""
    if isinstance(node, yaml.MappingNode):
        return tag + ("{...}" if node.value else "{}")
    if isinstance(node, yaml.SequenceNode):
        return tag + ("[...]" if node.value else "[]")
    if is_null(node):
        return "null"
    # What a tag is given, not what it makes of it: `!expanduser '~/x'` says the same on every machine.
    return tag + _scalar(node.value if tag or node.tag == STR_TAG else plain_value(node))


def _scalar(value: object) -> str:
    if isinstance(value, str) and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, str):
        return yaml.dump(value, default_style='"', width=sys.maxsize).strip()
    if isinstance(value, float):
        return yaml.dump(value).partition("\n")[0]  # not Python's 1e-05 and nan, which YAML takes for strings
    return str(value)


def _tag(node: yaml.Node) -> str:
    """The tag if the file names one of torchdistill's; the others belong to the kind of the value."""
    return node.tag if node.tag.startswith("!") else ""


def _entries(node: yaml.MappingNode) -> dict[str, tuple[object, yaml.Node]]:
    """``{key's digest: (key, value)}`` without anchors' own places, whose aliases are compared instead."""
    found = {}
    for key, value in node.value:
        name = plain_key(key)
        if not is_private(name):
            found[digest(key)] = (_text(key) if isinstance(name, yaml.Node) else name, value)
    return found


def _is_all_free(node: yaml.Node, path: KeyPath) -> bool:
    """Whether a mapping is only there for free keys, such as ``train.student: {dst_ckpt: ...}`` with stages."""
    if not isinstance(node, yaml.MappingNode) or _tag(node):
        return False
    inside = [((*path, name), value) for name, value in _entries(node).values()]
    return bool(inside) and all(_is_free(below) or _is_all_free(value, below) for below, value in inside)


def _is_free(path: KeyPath) -> bool:
    return any(_matches(path, pattern.split(".")) for pattern in FREE)


def _matches(path: KeyPath, pattern: list[str]) -> bool:
    if pattern[0] == "**":
        pattern = pattern[1:]
        path = path[-len(pattern) :]
    return len(path) == len(pattern) and all(
        fnmatchcase(str(part), glob) for part, glob in zip(path, pattern, strict=True)
    )
