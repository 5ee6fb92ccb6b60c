"""Which keywords a callable takes, where ``**kwargs`` hides them."""

import functools
from typing import Any

import pytest
from torch import nn, optim
from torchdistill.losses import high_level, mid_level
from torchdistill.models import wrapper

from vkd_plugin.config.signatures import keywords


class Base(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()


class Passes(Base):
    def __init__(self, extra: int, **kwargs: Any) -> None:
        super().__init__(depth=1, **kwargs)


class Drops(nn.Module):
    def __init__(self, a: int = 1, **kwargs: Any) -> None:
        super().__init__()


class Looks(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.b = options["a"], options.get("b", 1)


class Keeps(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs


class CallsOther(nn.Module):
    def __init__(self, reduction: str = "mean", **kwargs: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(reduction=reduction, **kwargs)


class CallsUnknown(nn.Module):
    def __init__(self, factory: Any, **kwargs: Any) -> None:
        super().__init__()
        self.loss = factory(**kwargs)


def plain(a: int, /, b: int, *, c: int = 3) -> None: ...


def passes_on(x: int, **kwargs: Any) -> None:
    plain(x, **kwargs)


def drops_or_passes(x: int, strictly: bool, **kwargs: Any) -> None:
    if strictly:
        plain(x, **kwargs)
    else:
        Drops(**kwargs)


@functools.wraps(passes_on)
def decorated(*args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("target", "names", "required", "is_open"),
    [
        (Base, {"width", "depth"}, {"width"}, False),
        (Passes, {"extra", "width"}, {"extra", "width"}, False),
        (Drops, {"a"}, set(), False),
        (Looks, {"a", "b"}, {"a"}, False),
        (Keeps, set(), set(), True),
        (
            CallsOther,
            {"reduction", "weight", "size_average", "ignore_index", "reduce", "label_smoothing"},
            set(),
            False,
        ),
        (CallsUnknown, {"factory"}, {"factory"}, True),
        (plain, {"b", "c"}, {"b"}, False),
        (passes_on, {"x", "b", "c"}, {"x", "b"}, False),
        (decorated, {"x"}, {"x"}, True),
        (functools.partial(plain, 1), {"b", "c"}, {"b"}, False),
        (high_level.WeightedSumLoss, {"model_term", "sub_terms"}, set(), False),
        (
            mid_level.SimpleLossWrapper,
            {"low_level_loss", "input", "target"},
            {"low_level_loss", "input"},
            False,
        ),
        (wrapper.EmptyModule, set(), set(), False),
        (dict, set(), set(), True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_keywords(target: Any, names: set[str], required: set[str], is_open: bool) -> None:
    found = keywords(target)
    assert (set(found.names), found.required, found.open) == (names, required, is_open)


@pytest.mark.parametrize(
    ("target", "drops"),
    [
        (Base, False),
        (Passes, False),
        (Drops, True),
        (Looks, True),
        (CallsOther, False),
        (passes_on, False),
        (drops_or_passes, False),
        (mid_level.VIDLoss, True),
        (wrapper.EmptyModule, True),
    ],
)
def test_whether_an_unknown_keyword_is_dropped_or_a_type_error(target: Any, drops: bool) -> None:
    assert keywords(target).drops == drops


def test_what_the_caller_gives_is_not_asked_for() -> None:
    found = keywords(optim.SGD).without(1, frozenset({"lr"}))
    assert "params" not in found.names
    assert "lr" not in found.names
    assert "momentum" in found.names
    assert not found.required


def test_no_loss_of_torchdistill_takes_a_keyword_that_is_not_there() -> None:
    losses = [value for value in vars(mid_level).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    ours = [loss for loss in losses if loss.__module__ == mid_level.__name__]
    assert len(ours) > 25
    assert [loss.__name__ for loss in ours if keywords(loss).open] == []
