"""Where in an experiment an error belongs that somebody's code raised."""

import re
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from ..config.signatures import keywords
from ..errors import BadValue
from ..losses import NotHookedError
from ..suggest import nearest

Path = tuple[str | int, ...]

_REFUSAL = re.compile(r"(?P<name>\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(?P<argument>\w+)'")

_PARTS = {
    "get_high_level_loss": ("criterion",),
    "get_optimizer": ("optimizer",),
    "get_scheduler": ("scheduler",),
    "set_hooks": ("forward_hook",),
    "build_auxiliary_model_wrapper": ("auxiliary_model_wrapper",),
    "redesign_model": ("sequential",),
}
"""Functions of torchdistill, and the key below the stage, or below a model's part of it, that they read."""


def place_in_stage(error: BaseException, has_teacher: bool) -> tuple[str, ...]:
    """The way from a stage's section to what torchdistill was reading when it raised ``error``."""
    place: tuple[str, ...] = ()
    side = "student" if has_teacher else "model"
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        name = frame.f_code.co_name
        if name in _PARTS and not place:
            place = _PARTS[name]
            if place[0] not in ("criterion", "optimizer", "scheduler"):
                place = (_side(frame, side), *place)
        elif place == ("criterion",) and isinstance(term := frame.f_locals.get("loss_name"), str):
            place = ("criterion", "kwargs", "sub_terms", term)
        trace = trace.tb_next
    if isinstance(error, BadValue):  # a module's name, if it is none of a wrapper's or of a hook's
        return place[:1] if place[1:] == ("sequential",) else place or ("optimizer",)
    return place


def place_of_read(term: Any, error: NotHookedError) -> Path:
    """The way from a term's section to the name of what it reads and nobody hooks."""
    for value in (error.io, error.module):
        for at, leaf in leaves(term):
            if leaf is not None and leaf == value and _side_of(term, at) == error.side:
                return at
    return ()


def _side_of(term: Any, path: Path) -> str:
    """Whether what stands at ``path`` in a term's section is about the student or the teacher."""
    for part in path[:-1]:
        term = term[part]
    if isinstance(term, dict) and "is_from_teacher" in term:  # SimpleLossWrapper's
        return "teacher" if term["is_from_teacher"] else "student"
    return "teacher" if any(str(part).startswith("teacher") for part in path) else "student"


def refused_argument(error: TypeError) -> tuple[str, str] | None:
    """The argument that a class or function does not take, and a message with the nearest that it does."""
    match = _REFUSAL.search(str(error))
    if match is None:
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # The call stands in the innermost frame, which can name the class.
    known = {**trace.tb_frame.f_globals, **trace.tb_frame.f_locals} if trace is not None else {}
    target = next((value for value in known.values() if getattr(value, "__name__", None) == match["name"]), None)
    hint = nearest(match["argument"], keywords(target).names) if callable(target) else ""
    return match["argument"], f"{match['name']} takes no such argument{hint}"


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """``(path, value)`` of all that is neither a mapping nor a list in ``data``, which stands at ``path``."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    else:
        yield path, data


def _side(frame: FrameType, student: str) -> str:
    """``teacher`` or what the student is called, by what the function was given."""
    values = frame.f_locals
    is_teacher = "teacher_model" in values.get("kwargs", {}) or values.get("model_label") == "teacher"
    above = frame.f_back.f_locals if frame.f_back is not None else {}
    given = values.get("model", values.get("org_model"))
    is_teacher = is_teacher or (given is not None and given is above.get("teacher_ref_model"))
    return "teacher" if is_teacher else student
