"""The training loop: data, teacher, student, losses, backward, step, record."""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader

from ..config import Experiment
from ..errors import ConfigError, NotFiniteError, UserError
from ..models.weights import is_url, read_checkpoint, split_source
from ..random_state import generators_state, restore_generators
from ..stiefel import UndefinedMapError
from ..tasks import task_for
from ..teacher import state_digest
from ..teacher_cache import open_cache, views_of
from .board import Board
from .box import EngineBox, build_box
from .build import blame, check_validation, for_processes
from .ema import StudentEMA
from .guard import weights_are_finite
from .layout import channels_last, lay_out_like_weights
from .loaders import (
    Position,
    batches_in_epoch,
    batches_of,
    loader_factory,
    position_at,
    set_position,
)
from .meter import Pace, StepFigures, TermMeter
from .precision import Precision
from .processes import Processes, Votes
from .progress import EpochProgress, epoch_line
from .randomness import address
from .records import RunFolder, jsonable, versions
from .reports import unreadable_images
from .sharding import gathered, optimizer_state_like, whole
from .signals import StoppedError, StopRequest
from .state import load_rank_state, load_training_state, rank_state, training_state
from .transfer import Transfer
from .watch import Watch

logger = logging.getLogger("vkd_plugin")


@dataclass
class Result:
    """What training comes to: records of the best and of the last epoch, and sizes for the summary."""

    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    steps: int = 0
    resumed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
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
        stop: asks to stop after the step in hand.
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
        stop: StopRequest | None = None,
    ) -> None:
        self.experiment = experiment
        self.config: dict[str, Any] = for_processes(experiment, processes.world_size)
        self.teacher = teacher
        self.processes = processes
        self.folder = folder
        self.path = Path(processes.share(str(folder.path) if folder else "."))
        self.seed = seed
        self.task = task_for(experiment)
        self._transfer = Transfer(processes.device)
        self.terms = TermMeter()
        device = processes.device
        with blame(experiment, "train", "amp"):
            self.precision = Precision(self.config.get("amp"), device, self.config.get("teacher_amp"))
        self._channels_last = channels_last(self.config)
        for side, model in (("teacher", teacher), ("student", student)):
            if model is not None and self._channels_last[side]:
                model.to(memory_format=torch.channels_last)
        skips_allowed = int(self.config.get("skip_nonfinite") or 0)
        decay = (self.config.get("ema") or {}).get("decay")
        with blame(experiment, "train", "ema"):  # before the student is in shards, which cannot be copied
            self.ema = StudentEMA(student, decay) if decay is not None else None
        check_validation(experiment)
        views = views_of(experiment)
        with blame(experiment, "train"):
            self.box: EngineBox = build_box(
                loader_factory(seed, processes.rank, processes.world_size, views),
                self.precision,
                self.terms,
                self.config.get("compile") or {},
                skips_allowed > 0,
                teacher,
                student,
                experiment.data["datasets"],
                self.config,
                device,
                processes.device_ids,
                processes.distributed,
                lr_factor,
            )
        if self.ema is not None:  # the box may have loaded other weights
            self.ema.model.load_state_dict(whole(student.state_dict()))
        self._train_loader()  # that there is one, before anything is written
        if views is not None and teacher is not None:
            self.box.teacher_cache = open_cache(experiment, self.box, teacher, processes)
        self.epoch = 0  # epochs done
        self.position = Position()  # within the present epoch
        self.step = 0  # batches done in all
        self._saved_step = 0
        self._records: list[dict[str, Any]] = []  # of the epochs before this process's
        self.watch = Watch(self.box, processes, self.path, skips_allowed)
        self.pace = Pace()
        self.stop = stop or StopRequest()
        self._votes = Votes(processes)
        self._started = time.perf_counter()
        checkpoint = self.config.get("checkpoint") or {}
        self.save_every_steps: int | None = checkpoint.get("every_steps")
        self.keep_every_epochs: int | None = checkpoint.get("keep")
        self.validate_every = int(self.config.get("validate_every") or 1)
        self.result = Result(parameters=self._count_parameters())
        text, digest = experiment.dump(), experiment.digest()  # once: slower than all the rest of a small checkpoint
        self._described = {"config": text, "config_digest": digest, "versions": versions()}
        if teacher is not None and _is_frozen(teacher):
            self.result.teacher_digest = state_digest(teacher)

    # The run.

    def train(self) -> Result:
        """All epochs that are left, then the proof that a frozen teacher has not moved."""
        epochs: int = self.box.num_epochs
        self._started = time.perf_counter()
        with ExitStack() as stack:
            if self.folder:
                self.watch.board = Board(self.folder.path, self.step)
                stack.callback(self.watch.board.close)
            while self.epoch < epochs:
                self._epoch(epochs)
        self._prove_teacher_unchanged()
        self.result.seconds += time.perf_counter() - self._started
        self.result.skipped = self.watch.guard.state()
        return self.result

    def _epoch(self, epochs: int) -> None:
        loader = self._train_loader()
        self.box.pre_epoch_process(epoch=self.epoch)
        set_position(loader, self.epoch, self.position)
        self._train_batches(loader, epochs)
        record = self._record(self.watch.prove())
        self._count_epoch()
        improved = self._select(record)
        self.processes.share_result(lambda: self._write_record(record, epochs))
        self._post_epoch(record)
        self._save_epoch(improved)  # last: a run cut off before repeats the epoch, its record included
        if self.epoch < epochs and self.processes.any(self.stop.requested):
            self._stop(f"after epoch {self.epoch}")

    def _write_record(self, record: dict[str, Any], epochs: int) -> None:
        if self.folder is None or self.watch.board is None:
            return
        self.folder.append_metrics(record)
        self.watch.board.add({name: v for name, v in record.items() if name not in ("epoch", "step")}, self.step)
        logger.info(epoch_line(record, epochs))
        logger.debug("%s", json.dumps(jsonable(record)))  # to log.txt alone

    def _train_batches(self, loader: DataLoader[Any], epochs: int) -> None:
        log_every = int(self.config.get("log_freq") or 100)
        steps, done = batches_in_epoch(loader), self.position.batches
        progress = EpochProgress(self.epoch, epochs, steps, done, self.pace, self.processes.is_main)
        with progress:
            mark = time.perf_counter()
            for batch in batches_of(loader):
                self.pace.waited += time.perf_counter() - mark
                self.watch.count_unreadable(unreadable_images(loader))
                logs = self.position.batches % log_every == 0
                self._step(batch, loader, logs)
                progress.advance()
                if logs:
                    progress.show(self.watch.newest)
                if self.box.stage_grad_count % self.box.grad_accum_step == 0:
                    self._between_steps(self.position.batches < steps)
                now = time.perf_counter()
                self.pace.seconds += now - mark
                mark = now

    def _step(self, batch: Any, loader: DataLoader[Any], logs: bool) -> None:
        box = self.box
        samples, targets, supplement = self._transfer(lambda: self.task.unpack(batch, self.processes.device))
        if all(self._channels_last.values()) and isinstance(samples, Tensor) and samples.dim() == 4:
            samples = samples.contiguous(memory_format=torch.channels_last)
        address(self.seed, self.step, self.processes.rank)
        loss = self._forward(samples, targets, supplement)
        steps_before = box.optimizer_steps
        with blame(self.experiment, "train"):
            box.post_forward_process(loss=loss)
        if self.ema is not None and box.optimizer_steps > steps_before:
            with gathered(box.student):
                self.ema.update(box.bare_student, box.left_out)
        self.step += 1
        figures = StepFigures(self.step, self.epoch, self.position.batches, logs)
        self.position = position_at(loader, self.position.batches + 1)
        self.pace.images += len(samples) * self.processes.world_size
        self.watch.see(figures, self.terms.take(loss))

    def _between_steps(self, within_epoch: bool) -> None:
        """Acts on what any process asks for, all on the same step, and saves every so many steps."""
        stopping, failed = self._votes.cast(self.stop.requested, self.watch.failed)
        if failed:
            self.watch.fail()
        every = self.save_every_steps  # between optimizer steps, so the first chance after each multiple of it
        due = every is not None and self.step // every > self._saved_step // every
        if within_epoch and (due or stopping):
            self._save_last()
        if within_epoch and stopping:
            self._stop(f"at step {self.step}")

    def _stop(self, where: str) -> None:
        self.processes.barrier()  # a launcher ends the others when one process ends: not before all is saved
        raise StoppedError(f"stopped {where}, all saved; --resume auto goes on from here")

    def _record(self, orthogonality: dict[str, float]) -> dict[str, Any]:
        """What is known of the epoch whose last batch is done."""
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.box.optimizer.param_groups[0]["lr"],
        }
        record |= self.watch.means_of_all()
        record |= self._validate()
        record |= orthogonality
        if self.precision.scaler.is_enabled():
            record["scaler_scale"] = self.precision.scaler.get_scale()
            record["scaler_skips"] = self.watch.guard.scaler_skips
        if self.watch.guard.skips_allowed:
            record["skipped_nonfinite"] = self.watch.guard.skipped
        if self.box.teacher_cache is not None:
            record["teacher_cached_share"] = round(self.box.teacher_cache.share_found(), 4)
        record["images_per_s"] = round(self.pace.images_per_second, 1)
        record["data_wait_share"] = round(self.pace.data_wait_share, 4)
        if self.processes.device.type == "cuda":
            record["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            torch.cuda.reset_peak_memory_stats()
        return record

    def _count_epoch(self) -> None:
        self.epoch += 1
        self.position, self.pace = Position(), Pace()
        self.watch.means.clear()

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
            # After a device-side assertion (a label out of range, say) nothing can be read back any more.
            if "device-side assert" in str(error):
                raise
            if isinstance(error.__cause__, UndefinedMapError) and self.step:  # it was defined when training began
                why = str(error.__cause__)
            elif not weights_are_finite(self.box.student.parameters()):
                why = "a weight of the student is not finite"
            else:
                raise
            raise NotFiniteError(self.watch.stopped(why, self.epoch, self.step + 1)) from error

    def _post_epoch(self, record: dict[str, Any]) -> None:
        stage = getattr(self.box, "stage_number", None)
        with blame(self.experiment, "train"):
            self.box.post_epoch_process(metrics=record.get("val/" + self.task.metric, record["loss"]))
        if getattr(self.box, "stage_number", None) != stage:
            logger.info("stage %s", self.box.stage_number)
            if not _is_frozen(self.teacher):
                self.result.teacher_digest = None  # this stage trains it

    def _validate(self) -> dict[str, float]:
        """Figures of the student, and of its average; none in an epoch that ``validate_every`` leaves out."""
        loader = self.box.val_data_loader
        if loader is None or not self._validates():
            return {}
        models = {"val": self.box.bare_student}
        if self.ema is not None:
            models["val_ema"] = self.ema.model
        metrics: dict[str, float] = {}
        for prefix, model in models.items():
            self._share_buffers(model)
            batches = until_stopped(loader, self.processes, self._votes, self.stop, self._stop_in_validation)
            with gathered(self.box.student), self.precision.autocast():
                found = self.task.evaluate(model, batches, self.processes.device)
            metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
        return metrics

    def _validates(self) -> bool:
        """Whether the epoch in hand ends with a validation: every so many do, and the run's last."""
        return (self.epoch + 1) % self.validate_every == 0 or self.epoch + 1 == self.box.num_epochs

    def _stop_in_validation(self) -> None:
        self._save_last()
        self._stop(f"before the validation of epoch {self.epoch + 1}")

    def _share_buffers(self, model: nn.Module) -> None:
        """BatchNorm statistics of rank 0 for all, so that every rank evaluates the model that is saved."""
        if self.processes.distributed:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def _select(self, record: dict[str, Any]) -> bool:
        """Notes the record; True where it is the best so far by the validation metric (else by the loss)."""
        self.result.last, self.result.steps = record, self.step
        best = self.result.best
        if self.box.val_data_loader is not None and "val/" + self.task.metric not in record:
            return False  # nobody knows how good it is
        improved = best is None or _score(record, self.task.metric) > _score(best, self.task.metric)
        if improved:
            self.result.best = record
        return improved

    # State.

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`resume` needs, tensors and plain values alone; all processes have to ask."""
        best = self.result.best
        return training_state(self.box) | {
            "ema": self.ema.averaged.state_dict() if self.ema else None,
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.position.batches,
            "samples": self.position.samples,
            "step": self.step,
            "ranks": self.processes.gather(self._rank_state()),
            "guard": self.watch.guard.state(),
            "pace": vars(self.pace).copy(),
            "seconds": self.result.seconds + time.perf_counter() - self._started,
            "resumed": self.result.resumed,
            "records": list(self.folder.records) if self.folder else [],  # metrics.jsonl may be lost or torn
            "best": best,
            "best_value": _score(best, self.task.metric) if best else 0.0,
            "seed": self.seed,
            **self._described,
        }

    def _rank_state(self) -> dict[str, Any]:
        own = {"generators": generators_state(), "means": self.watch.means.state()}
        return own | rank_state(self.box)

    def save_last(self) -> None:
        """Writes ``last.pt``; all processes have to call it."""
        state, self._saved_step = self.state(), self.step
        self.processes.share_result(lambda: self._write_last(state))

    def _write_last(self, state: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.checkpoints.save_last(state)

    def _save_last(self) -> None:
        self.watch.prove()
        self.save_last()

    def _save_epoch(self, improved: bool) -> None:
        state, self._saved_step = self.state(), self.step
        self.processes.share_result(lambda: self._write_epoch(state, improved))

    def _write_epoch(self, state: dict[str, Any], improved: bool) -> None:
        if self.folder is None:
            return
        checkpoints = self.folder.checkpoints
        if improved:  # first: a run cut off before last.pt repeats the epoch and writes best.pt again
            kept = {key: state[key] for key in ("model", "projectors", "ema", "epoch", "step", "best_value")}
            if self.ema is not None and "val_ema/" + self.task.metric in (self.result.best or {}):
                kept["model"] = self.ema.model.state_dict()
            checkpoints.save_best(kept)
        if self.keep_every_epochs is not None and self.epoch % self.keep_every_epochs == 0:
            checkpoints.save_epoch(state, self.epoch)
        checkpoints.save_last(state)

    def resume(self, state: dict[str, Any], source: Path, changed: tuple[str, ...] = ()) -> None:
        """Goes on from a checkpoint, within an epoch or at its end.

        Args:
            state: what :meth:`state` returned, with the same number of processes or another.
            source: the file that it is from.
            changed: see :func:`~vkd_plugin.engine.state.load_training_state`.

        Raises:
            UserError: the checkpoint does not fit the configuration.
        """
        box, ranks = self.box, state["ranks"]
        try:
            while getattr(box, "stage_end_epoch", math.inf) <= state["epoch"] < box.num_epochs:
                box.advance_to_next_stage()
            notes = load_training_state(box, state, changed)
            lay_out_like_weights(box.optimizer)
            self.precision.scaler.load_state_dict(state["scaler"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.averaged.load_state_dict(state["ema"])
            elif self.ema is not None:
                self.ema.model.load_state_dict(state["model"])
            if hasattr(box, "current_epoch"):
                box.current_epoch = state["epoch"]
            self.epoch, self.step, self._saved_step = state["epoch"], state["step"], state["step"]
            self.position = Position(state["batch"], state["samples"])
            self.watch.guard.load(state["guard"])
            self.pace = Pace(**state["pace"])
            rank = self.processes.rank
            if len(ranks) == self.processes.world_size:
                self.watch.means.load(ranks[rank]["means"])
            elif self.processes.is_main:
                self.watch.means.load(*(of_rank["means"] for of_rank in ranks))
            load_rank_state(box, ranks, rank, self.processes.world_size)
            if rank < len(ranks):
                restore_generators(ranks[rank]["generators"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{source}: does not fit this experiment: {text}") from error
        if self.position.batches and self.position.samples is None and len(ranks) != self.processes.world_size:
            raise UserError(
                f"{source}: within an epoch, and the batch_sampler does not say which samples are left for another "
                f"number of processes; go on with {len(ranks)}, or from a checkpoint of an epoch's end"
            )
        for note in notes:
            logger.warning("%s", note)
        self._records = state["records"]
        self.result.last = self._records[-1] if self._records else None
        self.result.best = state["best"]
        self.result.steps = self.step
        self.result.seconds = state["seconds"]
        self.result.resumed = state["resumed"] + 1

    def go_on(self, checkpoint: Path) -> None:
        """Brings the folder to where :meth:`resume` found the run, as nothing before has to be able to fail."""
        if self.folder is None:
            return
        self.folder.go_on(checkpoint, self._records)
        best = self.result.best
        if best is not None and not self._has_best(best):
            logger.warning("%s is not there or another epoch's; the next epoch counts as the best", self.folder.best)
            self.result.best = None

    def _has_best(self, best: dict[str, Any]) -> bool:
        """Whether ``best.pt`` is of the record ``best``, or of a better epoch that is about to be repeated."""
        assert self.folder is not None
        try:
            found = read_checkpoint(self.folder.best)
        except UserError:
            return False
        step, value = found.get("step", 0), found.get("best_value", -math.inf)
        return step == best["step"] or (step > self.step and value > _score(best, self.task.metric))

    def start_at(self, epoch: int, source: str | None) -> None:
        """torchdistill's ``--start_epoch``: counts on from ``epoch``, with optimizer and scheduler of ``src_ckpt``.

        Raises:
            UserError: the optimizer's state does not fit.
        """
        self.epoch = epoch
        file, _ = split_source(source or "")
        if is_url(file) or not Path(file).is_file():
            return
        state = read_checkpoint(file)
        try:
            if state.get("optimizer") is not None:
                self.box.optimizer.load_state_dict(optimizer_state_like(state["optimizer"], self.box.optimizer))
                lay_out_like_weights(self.box.optimizer)
            if state.get("lr_scheduler") is not None and self.box.lr_scheduler is not None:
                self.box.lr_scheduler.load_state_dict(state["lr_scheduler"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{source}: its optimizer does not fit: {' '.join(str(error).split())}") from error

    # Details.

    def _prove_teacher_unchanged(self) -> None:
        before = self.result.teacher_digest
        if before is not None and self.teacher is not None and state_digest(self.teacher) != before:
            raise UserError(
                "the frozen teacher changed during training (parameters or BatchNorm statistics): "
                "the student was not distilled from the teacher that the configuration names"
            )

    def _count_parameters(self) -> dict[str, int]:
        student = self.box.bare_student
        counts = {"student": sum(p.numel() for p in student.parameters())}
        if self.teacher is not None:
            counts["teacher"] = sum(p.numel() for p in self.teacher.parameters())
        if self.box.wrapper is not None:
            counts["projectors"] = sum(p.numel() for p in self.box.wrapper.parameters()) - counts["student"]
        return counts


def until_stopped(
    loader: DataLoader[Any], processes: Processes, votes: Votes, stop: StopRequest, then: Callable[[], None]
) -> Iterator[Any]:
    """The batches of an evaluation, which a request to stop, to any process, does not have to wait out.

    Args:
        loader: this process's part.
        processes, votes: all of them take part.
        stop: the request.
        then: called in all processes, where it was made; has to raise.
    """
    in_all = processes.least(len(loader))  # processes may differ by one batch, and all have to vote
    for index, batch in enumerate(batches_of(loader)):
        if index < in_all and votes.cast(stop.requested, False)[0]:
            then()
        yield batch


def _is_frozen(model: nn.Module | None) -> bool:
    return model is None or not any(p.requires_grad for p in model.parameters())


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
