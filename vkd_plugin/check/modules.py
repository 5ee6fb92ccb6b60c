"""Modules that an experiment names and that are not there, of which torchdistill says little or nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch import nn
from torchdistill.common.module_util import get_module
from torchdistill.core import distillation, training, util
from torchdistill.models import util as models_util

from ..errors import BadValue
from ..suggest import nearest
from ..wrappers import ProjectedStudent


@contextmanager
def named() -> Iterator[None]:
    """Within it, looking up a module that is not there is a BadValue with the nearest that is.

    torchdistill takes no notice of such a name under ``frozen_modules``, and fails with ``NoneType`` elsewhere.
    """

    def hooked(whole: nn.Module, redesigned: nn.Module, path: str) -> nn.Module:
        return _found(redesigned if path.startswith("+") else whole, path.removeprefix("+"))

    with ExitStack() as stack:
        for place in (distillation, training, models_util):
            stack.enter_context(patch.object(place, "get_module", _found))
        stack.enter_context(patch.object(util, "_extract_module", hooked))
        yield


def _found(root: nn.Module, path: str) -> nn.Module:
    lookup: Callable[[nn.Module, str], nn.Module | None] = get_module
    try:
        module = lookup(root, path)
    except IndexError:  # of a sequence that is too short
        module = None
    if module is None:
        names = [name for name, _ in root.named_modules() if name]
        raise BadValue(f"{type(root).__name__} has no module '{path}'{_hint(root, path, names)}", path)
    return module


def _hint(root: nn.Module, path: str, names: Iterable[str]) -> str:
    """The nearest name: first of all the same one with more or less in front of it, such as a wrapper's ``model``."""
    same = [name for name in names if name.endswith(f".{path}") or path.endswith(f".{name}")]
    if same:
        return f" (did you mean '{min(same, key=lambda name: abs(len(name) - len(path)))}'?)"
    if path.startswith("features.") and not isinstance(root, ProjectedStudent):
        return ": features are a ProjectedStudent's (auxiliary_model_wrapper)"
    return nearest(path, names)
