"""What can stand at a place in an experiment file."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """What stands at a place. ``nullable``: nothing may stand there, as in ``adaptations:``."""

    nullable: bool = field(default=False, kw_only=True)

    @property
    def expected(self) -> str:
        return "a value"


@dataclass(frozen=True)
class Anything(Spec):
    """Whatever YAML allows; handed on to somebody else's code."""


@dataclass(frozen=True)
class Number(Spec):
    """A number, perhaps whole, perhaps within bounds (both included)."""

    low: float | None = None
    high: float | None = None
    whole: bool = False

    @property
    def expected(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low} to {self.high}"
        return kind if self.low is None else f"{kind} of at least {self.low}"


@dataclass(frozen=True)
class Flag(Spec):
    """true or false."""

    @property
    def expected(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Function(Spec):
    """A class or function, which only a tag can name."""

    @property
    def expected(self) -> str:
        return "a class or function (!import_get {key: 'torch.utils.data.RandomSampler'})"


@dataclass(frozen=True)
class Text(Spec):
    """A string, perhaps one of ``choices``.

    ``role`` says what it names (see references): a registry, ``dataset``, or ``checkpoint``.
    """

    choices: tuple[str, ...] = ()
    role: str | None = None

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else "a string"


@dataclass(frozen=True)
class Items(Spec):
    """A list of ``item``."""

    item: Spec = Anything()

    @property
    def expected(self) -> str:
        return "a list"


@dataclass(frozen=True)
class Named(Spec):
    """A mapping from names of the user's choice to ``entry``."""

    entry: Spec = Anything()

    @property
    def expected(self) -> str:
        return "a mapping"


@dataclass(frozen=True)
class Section(Spec):
    """A mapping with known keys.

    Args:
        keys: what stands at each.
        required: the keys that may not be left out.
        open: whether other keys are somebody else's business (``kwargs``).
        component: what ``key`` and ``kwargs`` in here build (see references).
        elsewhere: keys that nobody reads here though one might think so, with the reason.
    """

    keys: Mapping[str, Spec] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    open: bool = False
    component: str | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def expected(self) -> str:
        return "a mapping"


@dataclass(frozen=True)
class Either(Spec):
    """One of ``options``, which a value's kind (scalar, list, mapping) tells apart."""

    options: tuple[Spec, ...] = ()

    @property
    def expected(self) -> str:
        return " or ".join(option.expected for option in self.options)
