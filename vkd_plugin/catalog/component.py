"""A component that an experiment can name, and the arguments that the experiment can give it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vkd_plugin.config.references import Kind
from vkd_plugin.config.signatures import Keywords, keywords
from vkd_plugin.config.trust import ARGUMENTS

from .docstring import Described, Docstring, read_docstring
from .values import public_name

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "..."})()
"""The default of an argument that no signature shows."""


@dataclass(frozen=True)
class Argument:
    """One keyword argument.

    Args:
        name: as the experiment has it.
        required: whether it has to be given.
        default: its value where it is left out; UNKNOWN where that cannot be told.
        described: what the docstring says.
    """

    name: str
    required: bool
    default: Any = UNKNOWN
    described: Described = field(default_factory=Described)


@dataclass(frozen=True)
class Component:
    """What a name in an experiment file stands for.

    Args:
        name: what the file says.
        kind: the singular of its kind, e.g. ``loss wrapper``.
        target: the class or function.
        note: what tells it from others of its kind, e.g. ``mid-level``.
        takes: how torchdistill calls it; None where the file gives no arguments.
        given: arguments that the name itself stands for, as YAML.
        inferred: arguments that may be left out although the signature has no default.
        text: a docstring in place of the target's.
    """

    name: str
    kind: str
    target: Callable[..., Any]
    note: str = ""
    takes: Kind | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    inferred: frozenset[str] = frozenset()
    text: Docstring | None = None

    @property
    def package(self) -> str:
        """The top-level package that it comes from."""
        return str(getattr(self.target, "__module__", "")).partition(".")[0]

    @property
    def path(self) -> str:
        """Where it can be imported from; the module that defines it where it is private or local."""
        name = public_name(self.target) or public_name(inspect.unwrap(self.target))  # the host wraps optimizers
        return name if name and "._" not in name else str(self.target.__module__)

    @cached_property
    def docstring(self) -> Docstring:
        """What is said about it."""
        return read_docstring(self.target) if self.text is None else self.text

    @cached_property
    def arguments(self) -> list[Argument]:
        """The arguments that the file can give, required ones first; not those that only a trusted file may give."""
        takes = self._keywords
        found = [
            Argument(
                name,
                name in takes.required and name not in self.inferred,
                takes.defaults.get(name, default_of(self.target, name)),
                self.docstring.arguments.get(name, Described()),
            )
            for name in takes.names
            if name not in self.given and name not in ARGUMENTS
        ]
        if takes.open and (built := _built(self.target)) is not None:
            texts = read_docstring(built).arguments
            for name, parameter in inspect.signature(built).parameters.items():
                if parameter.default is not parameter.empty and name not in {*takes.names, *self.given, *ARGUMENTS}:
                    found.append(Argument(name, False, parameter.default, texts.get(name, Described())))
        return sorted(found, key=lambda argument: not argument.required)

    @property
    def takes_others(self) -> bool:
        """Whether it may take arguments besides those."""
        return self._keywords.open

    @cached_property
    def _keywords(self) -> Keywords:
        if self.takes is None:
            return Keywords()
        return keywords(self.target).without(self.takes.positional, self.takes.supplied)


def default_of(target: Callable[..., Any], name: str) -> Any:
    """The default of the argument ``name``, also where ``target`` hands it on to a base class or to what it builds."""
    candidates = [target]
    if isinstance(target, type):
        candidates += [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    elif (built := _built(target)) is not None:
        candidates.append(built)
    for candidate in candidates:
        try:
            parameter = inspect.signature(candidate).parameters.get(name)
        except (TypeError, ValueError):
            continue
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return UNKNOWN


def _built(target: Callable[..., Any]) -> type | None:
    """The class of which a function's annotation says that it returns one: what builds a model hands its rest to it."""
    if isinstance(target, type):
        return None
    annotation = getattr(inspect.unwrap(target), "__annotations__", {}).get("return")
    return annotation if isinstance(annotation, type) and "__init__" in vars(annotation) else None
