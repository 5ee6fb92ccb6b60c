"""torchdistill's boxes under our engine: its sections and keys, with the engine's guarantees.

The boxes build models, hooks, criterion, optimizer and scheduler from the YAML as torchdistill does. What differs:

* checkpoints of a stage (``src_ckpt``) are read without executing anything in them;
* data loaders address their randomness (:mod:`vkd_plugin.engine.loaders`);
* under several processes whatever trains is in DistributedDataParallel or in shards, on CPUs too;
* each loss term and the gradient's norm are seen, without a device synchronisation;
* the optimizer step knows gradient scaling, leaves out gradient averaging between accumulated batches, and can
  be left out where a number is not finite.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ReduceLROnPlateau
from torchdistill.common.module_util import check_if_wrapped
from torchdistill.core.distillation import DistillationBox, MultiStagesDistillationBox
from torchdistill.core.training import MultiStagesTrainingBox, TrainingBox
from torchdistill.losses.high_level import AbstractLoss
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from ..errors import BadValue, UserError
from ..models.weights import load_if_there
from .build import is_staged
from .meter import TermMeter
from .precision import Precision
from .sharding import (
    FSDP2,
    Anchor,
    asks_for_shards,
    clip_gradients,
    gradient_norms,
    local,
    parameters_of,
    refuse_unsupported,
    shard,
)

# What EngineBox is mixed into. torchdistill has no types, so a checker lets all of a box's attributes through.
if TYPE_CHECKING:
    from ..teacher_cache import TeacherCache

    _Box: TypeAlias = Any
else:
    _Box = object


class EngineBox(_Box):
    """Mixed into each of torchdistill's boxes; see the module's docstring.

    Args:
        load: builds data loaders, called like ``torchdistill.datasets.util.build_data_loaders``.
        precision: autocast and gradient scaler.
        terms: sees the loss terms.
        compile_modes: ``student`` and ``teacher``: True, or a mode of ``torch.compile``, compiles that side.
        spare: leave the optimizer step out where the loss or a gradient is not finite (``skip_nonfinite``).
        args: arguments of torchdistill's box.

    Attributes:
        gradient_norm: of the last optimizer step, before clipping, on the device; None until there is one, and
            after a forward pass.
        gradient_norms: the parameters that have a gradient, and the norm of each, (P,).
        left_out: whether the last optimizer step was, on the device; None without ``spare``.
        teacher_cache: where the teacher's outputs are looked up; None computes them.
    """

    def __init__(
        self,
        load: Callable[..., list[Any]],
        precision: Precision,
        terms: TermMeter,
        compile_modes: Mapping[str, bool | str | None],
        spare: bool,
        *args: Any,
    ) -> None:
        self._load = load
        self.precision = precision
        self.terms = terms
        self.compile_modes = compile_modes
        self.spare = spare
        self.optimizer_steps = 0
        self.gradient_norm: Tensor | None = None
        self.gradient_norms: tuple[list[nn.Parameter], Tensor] | None = None
        self._spoilt: Tensor | None = None
        self._buffers_before: list[Tensor] = []
        self._has_stepped = False
        self.left_out: Tensor | None = None
        self._own_post_forward: Callable[..., None] | None = None
        self._alone: list[nn.Parameter] = []
        self._anchor: Anchor | None = None
        self.teacher_cache: TeacherCache | None = None
        super().__init__(*args)

    # What differs between torchdistill's box with a teacher and its box without one.

    @property
    def student(self) -> nn.Module:
        """What trains: student, wrapper and DistributedDataParallel, whichever are there; it may be sharded."""
        return self.student_model if isinstance(self, DistillationBox) else self.model

    @property
    def bare_student(self) -> nn.Module:
        """The student alone, under its own names."""
        return self.org_student_model if isinstance(self, DistillationBox) else self.org_model

    @property
    def wrapper(self) -> Any:
        """The student's auxiliary wrapper (an ``AuxiliaryModelWrapper``), None if it has none."""
        student = self.student
        inner = student.module if check_if_wrapped(student) and not isinstance(student, FSDPModule) else student
        return inner if isinstance(inner, AuxiliaryModelWrapper) else None

    # Set-up, called by torchdistill for each stage.

    def setup_data_loaders(self, train_config: dict[str, Any]) -> None:
        """Train and validation loaders of the stage; a stage without them keeps those of the one before."""
        configs = [
            {"requires_supp": True, **(train_config.get("train_data_loader") or {})},
            train_config.get("val_data_loader") or {},
        ]
        train, val = self._load(self.dataset_dict, configs, self.distributed, None)
        if train is not None:
            self.train_data_loader = train
        if val is not None:
            self.val_data_loader = val

    def setup_teacher_student_models(self, teacher_config: dict[str, Any], student_config: dict[str, Any]) -> None:
        """torchdistill's, but checkpoints are read without unpickling, and have to fit."""
        sides = ({**teacher_config}, {**student_config})
        sources = [side.pop("src_ckpt", None) for side in sides]
        super().setup_teacher_student_models(*sides)
        load_if_there(self.teacher_model, sources[0])
        load_if_there(self.student_model, sources[1])

    def setup_model(self, model_config: dict[str, Any]) -> None:
        """The same in a box without a teacher."""
        side = {**model_config}
        source = side.pop("src_ckpt", None)
        super().setup_model(side)
        load_if_there(self.model, source)

    def setup_loss(self, train_config: dict[str, Any]) -> None:
        """The criterion, its terms watched, and what it holds on the device (torchdistill leaves it behind).

        And the student in shards where that is asked for: torchdistill goes on with the optimizer, which has to be
        given those.
        """
        side = train_config.get("student" if isinstance(self, DistillationBox) else "model") or {}
        if self.distributed and asks_for_shards(side):
            if not _can_be_wrapped(self.student):
                own = type(self.student).__name__
                raise BadValue(f"{FSDP2} cannot be combined with {own}, take DistributedDataParallel", FSDP2)
            shard(self.student, self.device, side)
            self._anchor = Anchor(self.student)
        super().setup_loss(train_config)
        self.terms.attach(self.criterion)
        if isinstance(self.criterion, AbstractLoss):
            for term, _ in self.criterion.term_dict.values():
                term.to(self.device)

    def setup_pre_post_processes(self, train_config: dict[str, Any]) -> None:
        """Notes a post-forward process of the user's own, which then replaces the engine's."""
        super().setup_pre_post_processes(train_config)
        base = DistillationBox if isinstance(self, DistillationBox) else TrainingBox
        own = train_config.get("post_forward_process") is not None
        self._own_post_forward = base.post_forward_process if own else None
        if own and self.precision.scaler.is_enabled():
            raise UserError("a post_forward_process of one's own cannot be combined with amp: {dtype: float16}")
        if own and self.spare:
            raise UserError("a post_forward_process of one's own cannot be combined with skip_nonfinite")

    def setup(self, train_config: dict[str, Any]) -> None:
        """torchdistill's set-up of a stage, then DistributedDataParallel around what still needs it."""
        super().setup(train_config)
        self._has_stepped = False
        # A scaler may leave out the first step, and a run may go on behind an epoch's last: torch takes both for a
        # wrong order of optimizer and scheduler.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
        if self.distributed:
            self._average_gradients()
        if self._own_post_forward is not None:
            self.optimizer.register_step_pre_hook(lambda *_: self._before_own_step())
        _compile(self.student, self.compile_modes.get("student"))
        if isinstance(self, DistillationBox):
            _compile(self.teacher_model, self.compile_modes.get("teacher"))

    def _average_gradients(self) -> None:
        if _needs_ddp(self.student):
            # Without find_unused_parameters: it takes what only hooked features lead to, such as a projector,
            # for unused. What is frozen is no part of it anyway.
            wrapped = DistributedDataParallel(self.student, device_ids=self.device_ids)
            if isinstance(self, DistillationBox):
                self.student_model = wrapped
            else:
                self.model = wrapped
        self._alone = _outside_of_ddp(self.optimizer, self.student, getattr(self, "teacher_model", None))
        for parameter in self._alone:
            dist.broadcast(parameter.data, 0)

    # A step.

    def forward_process(self, *args: Any, **kwargs: Any) -> Tensor:
        """Teacher, student and criterion under autocast; gradients are averaged once per optimizer step."""
        self.gradient_norm = self.gradient_norms = None
        last = (self.stage_grad_count + 1) % self.grad_accum_step == 0
        if self.spare and not self._buffers_before:
            self._buffers_before = [buffer.clone() for buffer in self._buffers()]
        model = self.student
        averaging = model.no_sync() if not last and isinstance(model, DistributedDataParallel) else nullcontext()
        try:
            with averaging, self.precision.autocast():
                loss = super().forward_process(*args, **kwargs)
            return loss if self._anchor is None else self._anchor(loss)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            raise UserError(
                "parts of the student get no gradient from the criterion, which DistributedDataParallel has to know: "
                "name them under frozen_modules, or end the student before them by sequential"
            ) from error

    def get_teacher_output(
        self, sample_batch: Any, targets: Any, supp_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The teacher's forward pass, unless its outputs are kept."""

        forward, own = super().get_teacher_output, self.precision

        def compute(samples: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
            with own.autocast_teacher():
                found, io_dict = forward(samples, targets, supp_dict, **kwargs)
            return own.from_teacher(found), own.from_teacher(io_dict)

        def compute_some(places: Tensor) -> dict[str, Any]:
            whole = len(places) == len(sample_batch)
            return compute(sample_batch if whole else sample_batch[places.to(self.device)], None)[1]

        if self.teacher_cache is None:
            return compute(sample_batch, targets)
        return self.teacher_cache.outputs(supp_dict, self.device, compute_some)

    def post_forward_process(self, loss: Tensor, metrics: Any = None, **kwargs: Any) -> None:
        """Backward, and at the end of an accumulation: unscale, clip, step, scheduler. torchdistill's semantics."""
        if self._own_post_forward is not None:
            self._own_post_forward(self, loss=loss, metrics=metrics, **kwargs)
            self.optimizer_steps += 1
            return
        self.stage_grad_count += 1
        scaler, optimizer = self.precision.scaler, self.optimizer
        scaler.scale(loss / self.grad_accum_step).backward()
        stepped = self.stage_grad_count % self.grad_accum_step == 0
        if self.spare:
            bad = ~loss.detach().isfinite().all()
            self._spoilt = bad if self._spoilt is None else self._spoilt | bad
        if stepped:
            self._average_alone()  # before the scaler looks for infinities, so that all processes find the same
            if self.spare:
                self._agree_on_losses()
            scaler.unscale_(optimizer)
            self._measure_gradients()
            if self.max_grad_norm is not None and self.gradient_norm is not None:
                clip_gradients(parameters_of(self.optimizer), self.max_grad_norm, self.gradient_norm)
            if self.spare:
                self._step_unless_spoilt()
            else:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            self.optimizer_steps += 1
        scheduler, every = self.lr_scheduler, self.scheduling_step
        if scheduler is not None and every > 0 and stepped and self.stage_grad_count % every == 0:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(metrics)
            elif isinstance(scheduler, CosineAnnealingWarmRestarts):
                scheduler.step(self.stage_grad_count // every)
            else:
                scheduler.step()

    def _before_own_step(self) -> None:
        self._average_alone()
        self._measure_gradients()

    def _measure_gradients(self) -> None:
        """Takes the gradients' norms; nothing is waited for."""
        trained = {p: p.grad for p in parameters_of(self.optimizer) if p.grad is not None}
        if trained:
            norms = gradient_norms(list(trained.values()))
            self.gradient_norm, self.gradient_norms = torch.linalg.vector_norm(norms), (list(trained), norms)

    def _buffers(self) -> list[Tensor]:
        """What a forward pass may change: BatchNorm's statistics, a contrastive loss's memory."""
        modules = [self.student, self.criterion]
        if isinstance(self.criterion, AbstractLoss):
            modules += [term for term, _ in self.criterion.term_dict.values()]
        if getattr(self, "teacher_updatable", False):
            modules.append(self.teacher_model)
        return [buffer for module in modules for buffer in module.buffers()]

    def accumulation(self) -> dict[str, Any]:
        """What ``spare`` has to know of an accumulation that is not complete, for :meth:`load_accumulation`."""
        return {"spoilt": self._spoilt, "buffers_before": [buffer.clone() for buffer in self._buffers_before]}

    def load_accumulation(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`accumulation` returned."""
        if not self.spare or state["spoilt"] is None:
            return
        self._spoilt = state["spoilt"].to(self.device)
        self._buffers_before = [
            before.to(now.device) for before, now in zip(state["buffers_before"], self._buffers(), strict=True)
        ]

    def _step_unless_spoilt(self) -> None:
        """The optimizer step, if loss and gradients are finite; else everything stays as it was before the batch.

        Fused optimizers are told on the device, from their second step on: a first one that is left out would leave
        them with uninitialised state. The others have to be called or not, for which a GPU is waited for.
        """
        optimizer, scaler = self.optimizer, self.precision.scaler
        assert self._spoilt is not None
        spoilt = self._spoilt
        if self.gradient_norm is not None and not scaler.is_enabled():  # else the scaler sees to gradients
            spoilt = spoilt | ~self.gradient_norm.isfinite()
        for buffer, before in zip(self._buffers(), self._buffers_before, strict=True):
            buffer.copy_(torch.where(spoilt, before, buffer))
        if scaler.is_enabled():
            scaler.step(optimizer)
        elif self._has_stepped and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, spoilt.float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not spoilt:
            optimizer.step()
            self._has_stepped = True
        self.left_out, self._spoilt, self._buffers_before = spoilt, None, []

    def _agree_on_losses(self) -> None:
        """Has all processes leave out the step of a batch that was bad in one of them, the gradient scaler too."""
        assert self._spoilt is not None
        if self.distributed:
            votes = self._spoilt.int()
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            self._spoilt = votes.bool()
        gradient = next((p.grad for p in parameters_of(self.optimizer) if p.grad is not None), None)
        if self.precision.scaler.is_enabled() and gradient is not None:  # it goes by infinities among the gradients
            here = local(gradient)
            here.copy_(torch.where(self._spoilt, torch.inf, here))

    def _average_alone(self) -> None:
        """Averages over the processes the gradients that no DistributedDataParallel averages."""
        gradients = [parameter.grad for parameter in self._alone if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def post_epoch_process(self, *args: Any, **kwargs: Any) -> None:
        """torchdistill's, which does not see an auxiliary wrapper inside DistributedDataParallel."""
        wrapper = self.wrapper
        if wrapper is not None and wrapper is not self.student:
            wrapper.post_epoch_process()
        super().post_epoch_process(*args, **kwargs)


class _Training(EngineBox, TrainingBox):
    pass


class _StagedTraining(EngineBox, MultiStagesTrainingBox):
    pass


class _Distillation(EngineBox, DistillationBox):
    pass


class _StagedDistillation(EngineBox, MultiStagesDistillationBox):
    pass


def build_box(
    load: Callable[..., list[Any]],
    precision: Precision,
    terms: TermMeter,
    compile_modes: Mapping[str, bool | str | None],
    spare: bool,
    teacher: nn.Module | None,
    student: nn.Module,
    *args: Any,
) -> EngineBox:
    """The box for a configuration: with or without teacher, one stage or several.

    Args:
        load, precision, terms, compile_modes, spare: see :class:`EngineBox`.
        teacher: None trains the student alone.
        student: the bare student.
        args: ``dataset_dict, train_config, device, device_ids, distributed, lr_factor`` as torchdistill takes them.
    """
    _, train_config, _, _, distributed, _ = args
    if distributed:
        refuse_unsupported(train_config)
    staged = is_staged(train_config)
    if teacher is None:
        return (_StagedTraining if staged else _Training)(load, precision, terms, compile_modes, spare, student, *args)
    return (_StagedDistillation if staged else _Distillation)(
        load, precision, terms, compile_modes, spare, teacher, student, *args
    )


def _compile(model: nn.Module, mode: bool | str | None) -> None:
    if mode:
        model.compile(mode=mode if isinstance(mode, str) else None)


def _needs_ddp(model: nn.Module) -> bool:
    """Whether gradients of ``model`` would stay on their process."""
    return _can_be_wrapped(model) and any(p.requires_grad for p in model.parameters())


def _can_be_wrapped(model: nn.Module) -> bool:
    """Whether the whole of ``model`` can be inside DistributedDataParallel, or be sharded.

    torchdistill's own auxiliary wrappers bring their DistributedDataParallel. One with a ``secondary_forward``
    cannot be inside another, as torchdistill would not find it there.
    """
    if any(check_if_wrapped(module) for module in model.modules()):
        return False
    own_forward = type(model).secondary_forward if isinstance(model, AuxiliaryModelWrapper) else None
    return own_forward in (None, AuxiliaryModelWrapper.secondary_forward)


def _outside_of_ddp(optimizer: torch.optim.Optimizer, *models: nn.Module | None) -> list[nn.Parameter]:
    """What ``optimizer`` trains and nothing in ``models`` averages: DistributedDataParallel, or torch's FSDP."""
    modules = [module for model in models if model is not None for module in model.modules()]
    averaging = [m for m in modules if check_if_wrapped(m) and not isinstance(m, nn.DataParallel)]
    cared_for = {id(p) for m in averaging for p in m.parameters()}
    return [p for p in parameters_of(optimizer) if p.requires_grad and id(p) not in cared_for]
