"""Where in a stage's section an error belongs that torchdistill's set-up raised."""

from types import FrameType, TracebackType

_PARTS = {
    "get_high_level_loss": ("criterion",),
    "get_optimizer": ("optimizer",),
    "get_scheduler": ("scheduler",),
    "set_hooks": ("forward_hook",),
    "build_auxiliary_model_wrapper": ("auxiliary_model_wrapper",),
    "redesign_model": ("sequential",),
    "load_ckpt": ("src_ckpt",),
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
    return place


def _side(frame: FrameType, student: str) -> str:
    """``teacher`` or what the student is called, by what the function was given."""
    values = frame.f_locals
    is_teacher = "teacher_model" in values.get("kwargs", {}) or values.get("model_label") == "teacher"
    above = frame.f_back.f_locals if frame.f_back is not None else {}
    given = values.get("model", values.get("org_model"))
    is_teacher = is_teacher or (given is not None and given is above.get("teacher_ref_model"))
    return "teacher" if is_teacher else student
