"""What importing the plugin changes in its host, torchdistill, and why. Four things, each of them idempotent.

1. ``DistillationBox.setup`` and ``TrainingBox.setup`` announce themselves while they run (:func:`current_setup`),
   so that :class:`vkd_plugin.wrappers.ProjectedStudent` can infer feature sizes from the teacher, the criterion
   and the first training image. torchdistill hands a student's wrapper nothing but the student.
2. After ``DistillationBox.setup`` the frozen parts of the teacher are in evaluation mode and kept there.
   torchdistill leaves them in training mode, where BatchNorm statistics move.
3. The optimizers in torchdistill's registry leave parameters that are marked ``_no_weight_decay`` out of weight
   decay, and take ``weight_decay_of: 'matrices'`` (:mod:`vkd_plugin.decay`). Where none is marked and nothing is
   said they are built exactly as before.
4. A hook path that leads nowhere is an error that names the nearest path. torchdistill says
   ``'NoneType' object has no attribute 'register_forward_hook'``.

Everything works the same under torchdistill's own example scripts and under ``run.py``.
"""

import contextvars
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchdistill.common.module_util import check_if_wrapped
from torchdistill.core import util
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.training import TrainingBox
from torchdistill.optim.registry import OPTIM_DICT

from .decay import has_weight_decay, honouring_no_decay
from .errors import BadValue
from .suggest import nearest
from .teacher import keep_in_eval

_MARK = "_vkd_plugin"
_EVAL_HANDLE = "_vkd_plugin_eval_handle"


@dataclass(frozen=True)
class Setup:
    """A box that is being set up, and the configuration of its present stage."""

    box: DistillationBox | TrainingBox
    train_config: dict[str, Any]


_current: contextvars.ContextVar[Setup | None] = contextvars.ContextVar("vkd_plugin_setup", default=None)


def current_setup() -> Setup | None:
    """The box that is being set up right now, None outside of torchdistill's ``setup``."""
    return _current.get()


def _announced(setup: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup)
    def announced(self: Any, train_config: dict[str, Any]) -> None:
        token = _current.set(Setup(self, train_config))
        try:
            setup(self, train_config)
        finally:
            _current.reset(token)
        if isinstance(self, DistillationBox):
            if hasattr(self, _EVAL_HANDLE):  # the stage before may have frozen other parts
                getattr(self, _EVAL_HANDLE).remove()
            setattr(self, _EVAL_HANDLE, keep_in_eval(_bare(self.org_teacher_model), self.teacher_model))

    setattr(announced, _MARK, True)
    return announced


def _bare(model: nn.Module) -> nn.Module:
    return model.get_submodule("module") if check_if_wrapped(model) else model


def _found(extract: Callable[..., nn.Module | None]) -> Callable[..., nn.Module]:
    @functools.wraps(extract)
    def found(org_model: nn.Module, sub_model: nn.Module, module_path: str) -> nn.Module:
        module = extract(org_model, sub_model, module_path)
        if module is None:
            searched = sub_model if module_path.startswith("+") else org_model
            names = [name for name, _ in searched.named_modules() if name]
            message = f"forward_hook: {type(searched).__name__} has no module '{module_path}'"
            raise BadValue(message + nearest(module_path, names), module_path)
        return module

    setattr(found, _MARK, True)
    return found


def _trained_models() -> list[nn.Module]:
    """The models of the box that is being set up, bare and as they are wrapped, the bare student first."""
    setup = current_setup()
    if setup is None:
        return []
    names = ("org_student_model", "org_model", "student_model", "model", "teacher_model")
    models = [getattr(setup.box, name, None) for name in names]
    return [model for model in models if isinstance(model, nn.Module)]


def install() -> None:
    """Applies the four changes; a second call does nothing."""
    for box in (DistillationBox, TrainingBox):
        if not hasattr(box.setup, _MARK):
            box.setup = _announced(box.setup)
    if not hasattr(util._extract_module, _MARK):
        util._extract_module = _found(util._extract_module)
    for key, optimizer in list(OPTIM_DICT.items()):
        if has_weight_decay(optimizer):
            OPTIM_DICT[key] = honouring_no_decay(optimizer, _trained_models)
