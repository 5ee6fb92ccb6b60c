"""Which keyword arguments a class or function takes, also where ``**kwargs`` hides it.

Nearly every loss of torchdistill ends in ``**kwargs`` and drops what it does not know: a misspelt ``alpha``
is never missed. So the function's source is read: where its ``**kwargs`` only goes to a known callee, is
looked up by name, or is dropped, the keywords are known after all.
"""

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from vkd_plugin.config.spec import Flag, Number, Spec, Text

_SPECS: dict[object, Spec] = {int: Number(whole=True), float: Number(), bool: Flag(), str: Text()}
_NAMED = {"int": int, "float": float, "bool": bool, "str": str, "None": None}


@dataclass
class Keywords:
    """Keyword arguments.

    Args:
        names: all that are read, in order.
        required: those without a default.
        open: whether others may be read too.
        positional: names of the leading parameters that can be given without a keyword.
        drops: whether others are taken and dropped, where the set is not open; else they are a TypeError.
        specs: what those with a plain annotation (``int``, ``float | None``) take.
        defaults: of those of which a signature shows it, also that of a callee to which ``**kwargs`` goes.
    """

    names: list[str] = field(default_factory=list)
    required: set[str] = field(default_factory=set)
    open: bool = False
    positional: list[str] = field(default_factory=list)
    drops: bool = False
    specs: dict[str, Spec] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def without(self, count: int, supplied: frozenset[str]) -> "Keywords":
        """What is left to give after ``count`` positional arguments and those ``supplied`` by name."""
        gone = {*self.positional[:count], *supplied}
        names = [name for name in self.names if name not in gone]
        specs = {name: spec for name, spec in self.specs.items() if name not in gone}
        defaults = {name: value for name, value in self.defaults.items() if name not in gone}
        return Keywords(names, self.required - gone, self.open, self.positional[count:], self.drops, specs, defaults)


def keywords(target: Callable[..., Any]) -> Keywords:
    """The keyword arguments of ``target``; open where its signature cannot be read."""
    try:
        parameters = _parameters(target)
    except (TypeError, ValueError):
        return Keywords(open=True)
    found = _declared(parameters)
    if not found.open:
        return found
    if isinstance(target, type):
        if any("__new__" in cls.__dict__ for cls in target.__mro__[:-1]):
            return found
        rest = _from_init(target, 0)
    elif inspect.isfunction(target) and not hasattr(target, "__wrapped__"):
        rest = _from_kwargs(target, None, 0)
    else:
        rest = Keywords(open=True)
    return _joined(found, rest)


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of ``target``, annotations that are text evaluated where they can be."""
    try:
        signature = inspect.signature(target, eval_str=True)
    except (TypeError, ValueError):
        raise
    except Exception:  # a name that is imported for type checkers alone
        signature = inspect.signature(target)
    return list(signature.parameters.values())


def _spec(annotation: object) -> Spec | None:
    """What an annotation of plain types asks for; None for any other."""
    options: tuple[object, ...] = (annotation,)
    if isinstance(annotation, str):
        options = tuple(_NAMED.get(part.strip(), annotation) for part in annotation.split("|"))
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = typing.get_args(annotation)
    kinds = [option for option in options if option not in (None, types.NoneType)]
    return _SPECS.get(kinds[0]) if len(kinds) == 1 and isinstance(kinds[0], type) else None


def _declared(parameters: list[inspect.Parameter]) -> Keywords:
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Keywords(
        names=[p.name for p in named],
        required={p.name for p in named if p.default is p.empty},
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
        positional=[p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)],
        specs={p.name: spec for p in named if (spec := _spec(p.annotation)) is not None},
        defaults={p.name: p.default for p in named if p.default is not p.empty},
    )


def _joined(found: Keywords, rest: Keywords) -> Keywords:
    """``found``, its ``**kwargs`` resolved to ``rest``."""
    names = [*found.names, *(name for name in rest.names if name not in found.names)]
    required = found.required | rest.required
    specs, defaults = rest.specs | found.specs, rest.defaults | found.defaults
    return Keywords(names, required, rest.open, found.positional, rest.drops, specs, defaults)


def _from_init(cls: type, start: int) -> Keywords:
    """What the ``__init__`` methods of ``cls``, from place ``start`` of its method resolution order, read."""
    for place, base in enumerate(cls.__mro__[start:], start):
        if base in (nn.Module, object):
            return Keywords()
        if "__init__" in base.__dict__:
            init = base.__dict__["__init__"]
            if not inspect.isfunction(init):
                return Keywords(open=True)
            found = _declared(_parameters(init)[1:])
            return _joined(found, _from_kwargs(init, cls, place)) if found.open else found
    return Keywords()


def _from_kwargs(function: Callable[..., Any], cls: type | None, place: int) -> Keywords:
    """What ``function`` reads from its ``**kwargs``; ``cls`` and ``place`` say what ``super()`` is."""
    tree = _source(function)
    if not isinstance(tree, ast.FunctionDef) or tree.args.kwarg is None:
        return Keywords(open=True)
    name = tree.args.kwarg.arg
    result = Keywords()
    drops = True
    understood = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(_is_name(k.value, name) and k.arg is None for k in node.keywords):
            understood += 1
            rest = _from_callee(node, function, cls, place)
            if rest is None:
                return Keywords(open=True)
            drops = drops and rest.drops
            result = _joined(result, rest)
            result.open = result.open or rest.open
        elif (key := _lookup(node, name)) is not None:
            understood += 1
            result.names.append(key)
            if isinstance(node, ast.Subscript):
                result.required.add(key)
    uses = sum(1 for node in ast.walk(tree) if _is_name(node, name))
    result.drops = drops
    return result if uses == understood else Keywords(open=True)


@lru_cache(maxsize=1024)  # one experiment asks for the same losses and models again and again
def _source(function: Callable[..., Any]) -> ast.stmt | None:
    """The definition of ``function``, to be read only; None where there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _from_callee(call: ast.Call, function: Callable[..., Any], cls: type | None, place: int) -> Keywords | None:
    """The keywords that ``callee(..., **kwargs)`` leaves to ``**kwargs``; None for an unknown callee."""
    given = frozenset(k.arg for k in call.keywords if k.arg is not None)
    if ast.unparse(call.func) == "super().__init__" and cls is not None:
        found = _from_init(cls, place + 1)
    else:
        target = _resolve(call.func, function)
        if not callable(target):
            return None
        found = keywords(target)
    if any(isinstance(arg, ast.Starred) for arg in call.args):
        return None
    return found.without(len(call.args), given)


def _resolve(node: ast.expr, function: Callable[..., Any]) -> object:
    """What a dotted name means among the globals of ``function``; None where it is anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    value: object = getattr(function, "__globals__", {}).get(node.id)
    for name in reversed(names):
        value = getattr(value, name, None)
    return value


def _lookup(node: ast.AST, name: str) -> str | None:
    """The key of ``name['key']``, ``name.get('key')`` or ``name.pop('key')``."""
    key: ast.expr | None = None
    if isinstance(node, ast.Subscript) and _is_name(node.value, name) and isinstance(node.ctx, ast.Load):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_name(node.func.value, name):
        key = node.args[0] if node.func.attr in ("get", "pop") and node.args else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
