"""The training loop: data, teacher, student, losses, backward, step, record."""

import logging
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from ..config import Experiment
from ..errors import ConfigError, NotFiniteError, UserError
from ..models.weights import is_url, read_checkpoint
from ..tasks.classification import Classification
from ..teacher import state_digest
from ..wrappers import ProjectedStudent
from .box import EngineBox, TermMeter, build_box
from .build import blame
from .checkpoint import load_projectors, projectors_state, read_run_checkpoint, save_atomically
from .ema import StudentEMA
from .loaders import loader_factory, set_epoch
from .precision import Precision
from .processes import Processes
from .progress import EpochProgress, epoch_line
from .randomness import address
from .records import RunFolder
from .signals import StoppedError, StopRequest

logger = logging.getLogger("vkd_plugin")

ORTHOGONALITY_LIMIT = 1e-3


@dataclass
class Result:
    """What training comes to: records of the best and of the last epoch, and sizes for the summary."""

    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    steps: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    teacher_digest: str | None = None


class Trainer:
    """Trains the student of an experiment, with or without a teacher, in one stage or several.

    Args:
        experiment: the configuration.
        teacher, student: bare models on the device; the teacher may be None.
        processes: this process among its peers.
        folder: where the main process writes; None in the others.
        seed: the root of all randomness.
        lr_factor: multiplies learning rates (``-adjust_lr``).
    """

    def __init__(
        self,
        experiment: Experiment,
        teacher: nn.Module | None,
        student: nn.Module,
        processes: Processes,
        folder: RunFolder | None,
        seed: int,
        lr_factor: int = 1,
    ) -> None:
        self.experiment = experiment
        self.config: dict[str, Any] = experiment.data["train"]
        self.teacher = teacher
        self.processes = processes
        self.folder = folder
        self.seed = seed
        self.task = Classification()
        self.terms = TermMeter()
        device = processes.device
        with blame(experiment, "train", "amp"):
            self.precision = Precision(self.config.get("amp"), device)
        self._use_channels_last(teacher, student)
        with blame(experiment, "train"):
            self.box: EngineBox = build_box(
                loader_factory(seed, processes.rank, processes.world_size),
                self.precision,
                self.terms,
                self.config.get("compile") or {},
                teacher,
                student,
                experiment.data["datasets"],
                self.config,
                device,
                processes.device_ids,
                processes.distributed,
                lr_factor,
            )
        decay = (self.config.get("ema") or {}).get("decay")
        with blame(experiment, "train", "ema"):
            self.ema = StudentEMA(student, decay) if decay is not None else None
        self._train_loader()  # that there is one, before anything is written
        self.epoch = 0  # epochs done
        self.batch = 0  # batches done of the present epoch
        self.step = 0  # batches done in all
        self.stop = StopRequest()
        checkpoint = self.config.get("checkpoint") or {}
        self.save_every_steps: int | None = checkpoint.get("every_steps")
        self.keep_every_epochs: int | None = checkpoint.get("keep")
        self.result = Result(parameters=self._count_parameters())
        if teacher is not None and _is_frozen(teacher):
            self.result.teacher_digest = state_digest(teacher)

    # The run.

    def train(self) -> Result:
        """All epochs that are left, then the proof that a frozen teacher has not moved."""
        box = self.box
        box_epochs: int = box.num_epochs
        writer = SummaryWriter(self.folder.path) if self.folder else None
        try:
            with self.stop:
                while self.epoch < box_epochs:
                    record = self._epoch(box_epochs)
                    improved = self._select(record)
                    if self.folder and writer:
                        self.folder.append_metrics(record)
                        for name, value in record.items():
                            if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                                writer.add_scalar(name, value, self.step)
                        logger.info(epoch_line(record, box_epochs))
                    self._post_epoch(record)
                    self._save(improved)  # last: a run cut off before repeats the epoch, its record included
                    if self.processes.any(self.stop.requested) and self.epoch < box_epochs:
                        self.processes.barrier()  # see _save_within_epoch
                        raise StoppedError(f"stopped after epoch {self.epoch}, all saved; --resume auto goes on")
        finally:
            if writer:
                writer.close()
        self._prove_teacher_unchanged()
        return self.result

    def _epoch(self, epochs: int) -> dict[str, Any]:
        box, device = self.box, self.processes.device
        loader = self._train_loader()
        box.pre_epoch_process(epoch=self.epoch)
        set_epoch(loader, self.epoch, first_batch=self.batch)
        log_every = int(self.config.get("log_freq") or 100)
        progress = EpochProgress(self.epoch, epochs, len(loader), self.processes.is_main)
        with progress:
            for index, batch in enumerate(loader, self.batch):
                samples, targets, supplement = self.task.unpack(batch, device)
                samples = self._channels_last(samples)
                address(self.seed, self.step, self.processes.rank)
                loss = self._forward(samples, targets, supplement)
                if device.type == "cpu" and not math.isfinite(loss.item()):
                    self._stop_on_bad_numbers(loss)
                self.terms.count(loss)
                steps_before = box.optimizer_steps
                with blame(self.experiment, "train"):
                    box.post_forward_process(loss=loss)
                if self.ema is not None and box.optimizer_steps > steps_before:
                    self.ema.update(box.bare_student)
                self.step, self.batch = self.step + 1, index + 1
                progress.advance(len(samples) * self.processes.world_size)
                if index % log_every == 0:
                    self._check_numbers(loss)
                    progress.show({name: value.item() for name, value in self.terms.now.items()})
                if self.batch < len(loader) and box.stage_grad_count % box.grad_accum_step == 0:
                    self._save_within_epoch(loss)
            self._check_numbers(loss)
            speed = progress.images_per_second
        errors = self._orthogonality()
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": box.optimizer.param_groups[0]["lr"],
        }
        means = self._mean_over_processes(self.terms.epoch_means())
        record |= {name if name == "loss" else f"loss/{name}": value for name, value in means.items()}
        record |= self._validate()
        record |= {f"orthogonality_error/{name}": value for name, value in errors.items()}
        if self.precision.scaler.is_enabled():
            record["scaler_scale"] = self.precision.scaler.get_scale()
        record["images_per_s"] = round(speed, 1)
        self.epoch, self.batch = self.epoch + 1, 0
        return record

    def _train_loader(self) -> DataLoader[Any]:
        """The present stage's, which has at least one batch."""
        loader = self.box.train_data_loader
        if loader is None:
            raise self.experiment.error("train_data_loader names no dataset", "train")
        if not len(loader):
            count = len(loader.dataset)
            why = f"no batch: {count} samples, batch size, drop_last and the number of processes leave none"
            raise self.experiment.error(why, "train", "train_data_loader")
        return loader

    def _forward(self, *batch: Any) -> Tensor:
        """Loss of a batch. What a library raises here is the configuration's fault, unless weights are not finite."""
        try:
            with blame(self.experiment, "train"):
                return self.box.forward_process(*batch)
        except ConfigError as error:
            # After a device-side assertion, which is how a projector says it on a GPU, nothing can be read back.
            asserted = "device-side assert" in str(error)
            if not asserted and all(bool(p.isfinite().all()) for p in self.box.student.parameters()):
                raise
            raise NotFiniteError(self._stopped("a weight of the student is not finite")) from error

    def _post_epoch(self, record: dict[str, Any]) -> None:
        stage = getattr(self.box, "stage_number", None)
        with blame(self.experiment, "train"):
            self.box.post_epoch_process(metrics=record.get("val/" + self.task.metric, record["loss"]))
        if getattr(self.box, "stage_number", None) != stage:
            logger.info("stage %s", self.box.stage_number)
            if not _is_frozen(self.teacher):
                self.result.teacher_digest = None  # this stage trains it

    def _validate(self) -> dict[str, float]:
        loader = self.box.val_data_loader
        if loader is None:
            return {}
        models = {"val": self.box.bare_student}
        if self.ema is not None:
            models["val_ema"] = self.ema.model
        metrics: dict[str, float] = {}
        for prefix, model in models.items():
            self._share_buffers(model)
            with self.precision.autocast():
                found = self.task.evaluate(model, loader, self.processes.device)
            metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
        return metrics

    def _share_buffers(self, model: nn.Module) -> None:
        """BatchNorm statistics of rank 0 for all, so that every rank evaluates the model that is saved."""
        if self.processes.distributed:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def _select(self, record: dict[str, Any]) -> bool:
        """Notes the record; True where it is the best so far by the validation metric (else by the loss)."""
        self.result.last, self.result.steps = record, self.step
        best = self.result.best
        improved = best is None or _score(record, self.task.metric) > _score(best, self.task.metric)
        if improved:
            self.result.best = record
        return improved

    # State.

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`resume` needs, tensors and plain values alone."""
        box = self.box
        scheduler = box.lr_scheduler
        return {
            "model": box.bare_student.state_dict(),
            "projectors": projectors_state(box.wrapper, box.bare_student),
            "ema": self.ema.averaged.state_dict() if self.ema else None,
            "optimizer": box.optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "batches": len(box.train_data_loader),
            "step": self.step,
            "terms": self.terms.state(),
            "stage_grad_count": box.stage_grad_count,
            "best": self.result.best,
            "best_value": _score(self.result.best, self.task.metric) if self.result.best else 0.0,
            "seed": self.seed,
            "config_digest": self.experiment.digest(),
        }

    def _save_within_epoch(self, loss: Tensor) -> None:
        """Every so many steps, and before a stop that a signal to any of the processes asks for."""
        due = self.save_every_steps is not None and self.step % self.save_every_steps == 0
        stopping = self.processes.any(self.stop.requested)
        if not due and not stopping:
            return
        self._check_numbers(loss)
        terms = self._terms_of_all()
        if self.folder is not None:
            save_atomically(self.state() | {"terms": terms}, self.folder.last)
        if stopping:
            self.processes.barrier()  # a launcher ends the others when one process ends: not before all is saved
            raise StoppedError(f"stopped at step {self.step}, all saved; --resume auto goes on from here")

    def _terms_of_all(self) -> dict[str, Any]:
        """State of the loss terms' sums, the mean over the processes."""
        state = self.terms.state()
        return state | {"sums": {name: torch.tensor(v) for name, v in self._mean_over_processes(state["sums"]).items()}}

    def _save(self, improved: bool) -> None:
        if self.folder is None:
            return
        state = self.state()
        if improved:  # first: a run cut off before last.pt repeats the epoch and writes best.pt again
            kept = {key: state[key] for key in ("model", "projectors", "ema", "epoch", "step", "best_value")}
            if self.ema is not None and "val_ema/" + self.task.metric in (self.result.best or {}):
                kept["model"] = self.ema.model.state_dict()
            save_atomically(kept, self.folder.best)
        if self.keep_every_epochs is not None and self.epoch % self.keep_every_epochs == 0:
            save_atomically(state, self.folder.last.with_name(f"epoch{self.epoch}.pt"))
        save_atomically(state, self.folder.last)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint, within an epoch or at its end.

        Raises:
            UserError: the checkpoint does not fit the configuration.
        """
        state = read_run_checkpoint(path)
        box = self.box
        try:
            while getattr(box, "stage_end_epoch", math.inf) <= state["epoch"] < box.num_epochs:
                box.advance_to_next_stage()
            box.bare_student.load_state_dict(state["model"])
            load_projectors(box.wrapper, state["projectors"])
            box.optimizer.load_state_dict(state["optimizer"])
            if box.lr_scheduler is not None:
                box.lr_scheduler.load_state_dict(state["lr_scheduler"])
            self.precision.scaler.load_state_dict(state["scaler"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.averaged.load_state_dict(state["ema"])
            elif self.ema is not None:
                self.ema.model.load_state_dict(state["model"])
        except (RuntimeError, ValueError, KeyError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{path}: does not fit this experiment: {text}") from error
        if hasattr(box, "current_epoch"):
            box.current_epoch = state["epoch"]
        box.stage_grad_count = state["stage_grad_count"]
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        before, now = state.get("batches"), len(self._train_loader())
        if self.batch and before and before != now:  # another batch size or number of processes: the same samples
            self.batch = min(round(self.batch * now / before), now - 1)
        self.terms.load_state(state["terms"], self.processes.device)
        self.result.best = state["best"]
        self.result.steps = self.step
        for name, here, there in (
            ("configuration", self.experiment.digest(), state["config_digest"]),
            ("seed", self.seed, state["seed"]),
        ):
            if here != there:
                logger.warning("%s was trained with another %s", path, name)

    def go_on(self, checkpoint: Path) -> None:
        """Brings the folder to where :meth:`resume` found the run, as nothing before has to be able to fail."""
        if self.folder is None:
            return
        records = self.folder.go_on(checkpoint, self.epoch)
        self.result.last = records[-1] if records else None
        best = self.result.best
        if best is not None and not _is_of(best, self.folder.best):
            logger.warning("%s is not there or another epoch's; the next epoch counts as the best", self.folder.best)
            self.result.best = None

    def start_at(self, epoch: int, source: str | None) -> None:
        """torchdistill's ``--start_epoch``: counts on from ``epoch``, with optimizer and scheduler of ``src_ckpt``.

        Raises:
            UserError: the optimizer's state does not fit.
        """
        self.epoch = epoch
        if not source or is_url(source) or not Path(source).exists():
            return
        state = read_checkpoint(source)
        try:
            if state.get("optimizer") is not None:
                self.box.optimizer.load_state_dict(state["optimizer"])
            if state.get("lr_scheduler") is not None and self.box.lr_scheduler is not None:
                self.box.lr_scheduler.load_state_dict(state["lr_scheduler"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{source}: its optimizer does not fit: {' '.join(str(error).split())}") from error

    # Guards.

    def _check_numbers(self, loss: Tensor) -> None:
        """Reads the loss and the projectors' orthogonality back; called at intervals, as it waits for the device."""
        if not math.isfinite(loss.item()):
            self._stop_on_bad_numbers(loss)
        for name, error in self._orthogonality().items():
            if not error <= ORTHOGONALITY_LIMIT:
                raise NotFiniteError(
                    self._stopped(
                        f"the projector of feature '{name}' is not orthonormal, max |W^T W - I| is {error:.1e} "
                        f"(limit {ORTHOGONALITY_LIMIT:.0e})"
                    )
                )

    def _stop_on_bad_numbers(self, loss: Tensor) -> None:
        terms = ", ".join(f"{name} {value.item():g}" for name, value in self.terms.now.items() if name != "loss")
        raise NotFiniteError(self._stopped(f"the loss is {loss.item():g}{f' ({terms})' if terms else ''}"))

    def _stopped(self, why: str) -> str:
        saved = f"; {self.folder.last} holds epoch {self.epoch}" if self.folder and self.epoch else ""
        return f"training stopped: {why} in epoch {self.epoch + 1} at step {self.step}{saved}"

    def _orthogonality(self) -> dict[str, float]:
        wrapper = self.box.wrapper
        if not isinstance(wrapper, ProjectedStudent):
            return {}
        try:
            return {name: error.item() for name, error in wrapper.orthogonality_errors().items()}
        except ValueError as error:  # the raw weight is beyond repair
            raise NotFiniteError(self._stopped(str(error))) from error

    def _prove_teacher_unchanged(self) -> None:
        before = self.result.teacher_digest
        if before is not None and self.teacher is not None and state_digest(self.teacher) != before:
            raise UserError(
                "the frozen teacher changed during training (parameters or BatchNorm statistics): "
                "the student was not distilled from the teacher that the configuration names"
            )

    # Details.

    def _mean_over_processes(self, means: dict[str, Tensor]) -> dict[str, float]:
        if not means:
            return {}
        values = torch.stack([value.double() for value in means.values()])
        if self.processes.distributed:
            dist.all_reduce(values)
            values /= self.processes.world_size
        return dict(zip(means, values.tolist(), strict=True))

    def _use_channels_last(self, *models: nn.Module | None) -> None:
        if self.config.get("channels_last"):
            for model in models:
                if model is not None:
                    model.to(memory_format=torch.channels_last)

    def _channels_last(self, samples: Any) -> Any:
        if self.config.get("channels_last") and isinstance(samples, Tensor) and samples.dim() == 4:
            return samples.contiguous(memory_format=torch.channels_last)
        return samples

    def _count_parameters(self) -> dict[str, int]:
        student = self.box.bare_student
        counts = {"student": sum(p.numel() for p in student.parameters())}
        if self.teacher is not None:
            counts["teacher"] = sum(p.numel() for p in self.teacher.parameters())
        if self.box.wrapper is not None:
            counts["projectors"] = sum(p.numel() for p in self.box.wrapper.parameters()) - counts["student"]
        return counts


def _is_frozen(model: nn.Module | None) -> bool:
    return model is None or not any(p.requires_grad for p in model.parameters())


def _is_of(record: dict[str, Any], best: Path) -> bool:
    """Whether the checkpoint ``best`` is that of an epoch's record."""
    try:
        return read_checkpoint(best).get("step") == record["step"]
    except UserError:
        return False


def _score(record: dict[str, Any], metric: str) -> float:
    """Higher is better: the validation metric (the EMA's where there is one), else minus the loss."""
    for name in (f"val_ema/{metric}", f"val/{metric}"):
        if name in record:
            return record[name]
    return -record["loss"]


def seed_everything(seed: int) -> None:
    """Python, numpy and torch: for building models and for whatever is not addressed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - transforms draw from the global generator
    torch.manual_seed(seed)


def elapsed(since: float) -> float:
    """Seconds since ``since`` (``time.perf_counter``), to a tenth."""
    return round(time.perf_counter() - since, 1)
