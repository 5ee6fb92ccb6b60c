"""A box that is watched while it takes a step: what its loss reads, and what each term comes to."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torchdistill.losses.high_level import AbstractLoss

from ..engine.box import EngineBox
from ..errors import BadValue, ConfigError
from ..losses import NotHookedError
from .fake import NEEDS_CONTENTS
from .noting import Notes
from .places import place_of_read


class Watched(nn.Module):
    """A criterion whose terms are tried one by one: what fails is noted at its place, and the others go on.

    Args:
        inner: the criterion.
        notes: what goes wrong.
        path: where its section stands.

    Attributes:
        values: name of a term -> its value; those that failed are left out.
        io: ``{'student': ..., 'teacher': ...}``, what was hooked.
    """

    def __init__(self, inner: nn.Module, notes: Notes, path: tuple[str, ...]) -> None:
        super().__init__()
        self.inner = inner
        self.values: dict[str, Tensor] = {}
        self.io: dict[str, _Reads] = {}
        self._log: list[str] = []
        self._notes = notes
        self._path = path
        if isinstance(inner, AbstractLoss):
            inner.term_dict = {name: (_Term(self, name, term), w) for name, (term, w) in inner.term_dict.items()}

    @classmethod
    def in_box(cls, box: EngineBox, notes: Notes, path: tuple[str, ...], sides: tuple[str, ...]) -> "Watched":
        """Puts a watched criterion into a box, and has what fails in a model blamed on that model."""
        for side in sides:
            forward = getattr(box, f"{side}_forward_proc")

            model = side if side == "model" else f"{side}_model"

            def blamed(
                *args: Any, _forward: Any = forward, _side: str = side, _model: str = model, **kwargs: Any
            ) -> Any:
                with notes.blaming(*path, _side), naming_the_module(getattr(box, _model)):
                    return _forward(*args, **kwargs)

            setattr(box, f"{side}_forward_proc", blamed)
        box.criterion = cls(box.criterion, notes, (*path, "criterion"))
        return box.criterion

    def forward(self, io_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """The criterion's value."""
        self.io = {side: _Reads(side, hooked, self._log) for side, hooked in io_dict.items()}
        return self.inner(self.io, *args, **kwargs)

    def term(self, name: str, term: nn.Module, *args: Any) -> Any:
        """The value of a term; zero, and a note, where it has none."""
        path = (*self._path, "kwargs", "sub_terms", name)
        self._log.clear()
        with self._notes.collecting(*path):
            value = self._value(term, path, args)
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"the term should be one number, got {found}")
            self.values[name] = value
            return value
        return torch.zeros(())

    def _value(self, term: nn.Module, path: tuple[str | int, ...], args: Any) -> Any:
        """The term's value; what it raises says what it has read."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                value = term(*args)
            except NotHookedError as error:
                place = place_of_read(self._notes.below(path), error)
                is_there = bool(self.io[error.side])  # of a model that is there, at least the output is hooked
                message = error.message if is_there else f"the loss reads the {error.side}, and there is none"
                raise self._notes.experiment.error(message, *path, *place) from error
            except (RuntimeError, TypeError, IndexError) as error:
                if not isinstance(error, NEEDS_CONTENTS) and len(error.args) == 1:
                    targets = [f"targets {_shape(arg)}" for arg in args[2:3] if isinstance(arg, Tensor)]
                    error.args = (f"{error} (it reads {', '.join([*self._log, *targets])})",)
                raise
        for warning in said:
            if "different to the input size" in str(warning.message):  # torch goes on, and broadcasts
                self._notes.warn(str(warning.message).partition(". ")[0], *path)
        return value

    def weight(self, name: str) -> float:
        """Of a term."""
        return float(self.inner.term_dict[name][1]) if isinstance(self.inner, AbstractLoss) else 1.0

    def unread(self, side: str) -> list[str]:
        """Paths that are hooked and that no term has read."""
        hooked = self.io.get(side, _Reads(side, {}, []))
        return [] if hooked.all_read else [path for path in hooked if path not in hooked.read]


class _Term(nn.Module):
    def __init__(self, watched: Watched, name: str, term: nn.Module) -> None:
        super().__init__()
        self.term = term
        self._of = (watched,)  # in a tuple, as a module's module would be registered
        self._name = name

    def forward(self, *args: Any) -> Any:
        """The term's value, or zero."""
        return self._of[0].term(self._name, self.term, *args)


@contextmanager
def naming_the_module(model: nn.Module) -> Iterator[None]:
    """Has what a module of ``model`` raises say which module it was."""
    running: list[nn.Module] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = [
        register_module_forward_pre_hook(lambda module, args: running.append(module)),
        register_module_forward_hook(leave),
    ]
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        names = {module: name for name, module in model.named_modules()}
        innermost = next((names[module] for module in reversed(running) if names.get(module)), None)
        if innermost is not None and not isinstance(error, (*NEEDS_CONTENTS, BadValue)) and len(error.args) == 1:
            error.args = (f"{error} (in module '{innermost}')",)
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Reads(dict[str, Any]):
    """A dictionary of what was hooked, which knows what was asked for."""

    def __init__(self, side: str, hooked: Mapping[str, Any], log: list[str]) -> None:
        super().__init__({path: _Hooked(self, path, io) for path, io in hooked.items()})
        self.side = side
        self.log = log
        self.read: set[str] = set()
        self.all_read = False

    def __getitem__(self, path: str) -> Any:
        self.read.add(path)
        return super().__getitem__(path)

    def __missing__(self, path: str) -> Any:
        raise NotHookedError(self.side, path, "output", {path: list(io) for path, io in self.items() if io})

    def get(self, path: str, default: Any = None) -> Any:
        self.read.add(path)
        return super().get(path, default)

    def values(self) -> Any:
        self.all_read = True
        return super().values()


class _Hooked(dict[str, Any]):
    """The input and output of a module, those that are hooked."""

    def __init__(self, of: _Reads, path: str, io: Mapping[str, Any]) -> None:
        super().__init__(io)
        self.of = of
        self.path = path

    def __getitem__(self, io: str) -> Any:
        value = super().__getitem__(io)
        self.of.log.append(f"{self.of.side} '{self.path}' {_shape(value)}")
        return value

    def __missing__(self, io: str) -> Any:
        raise NotHookedError(self.of.side, self.path, io, {self.path: list(self)})


def _shape(value: object) -> str:
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
