"""One run from beginning to end: set up, train, test, record."""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Experiment, load_experiment
from ..errors import EXIT_DONE, UserError
from ..models.weights import fit_weights, load_weights, read_checkpoint
from ..tasks.classification import Classification
from .build import blame, build_model, model_sections
from .checkpoint import save_atomically
from .loaders import loader_factory
from .precision import Precision
from .processes import Processes, process_group
from .progress import log_to, setup_logging
from .records import RunFolder, default_output, device_name, environment, write_atomically
from .train import Result, Trainer, elapsed, seed_everything

logger = logging.getLogger("vkd_plugin")


@dataclass
class Options:
    """The command line; names and meanings of torchdistill's flags are torchdistill's."""

    config: str
    device: str | None = None
    seed: int = 0
    run_log: str | None = None
    test_only: bool = False
    student_only: bool = False
    adjust_lr: bool = False
    log_config: bool = False
    disable_cudnn_benchmark: bool = False
    start_epoch: int = 0
    dist_url: str = "env://"
    overrides: list[str] = field(default_factory=list)
    output: str | None = None
    resume: str | None = None


def run(options: Options) -> int:
    """Trains (unless ``test_only``) and tests.

    Returns:
        The exit code, 0.

    Raises:
        UserError: anything that the user can mend, as one line.
    """
    started = time.perf_counter()
    experiment = load_experiment(options.config, options.overrides)
    with process_group(options.device, options.dist_url) as processes:
        setup_logging(processes.is_main)
        path = _output(options)
        folder = RunFolder(path) if processes.is_main else None
        try:
            for warning in experiment.warnings if processes.is_main else ():
                logger.warning("%s", warning)
            if options.log_config:
                logger.info(experiment.dump())
            torch.backends.cudnn.benchmark = not options.disable_cudnn_benchmark
            seed_everything(options.seed)
            teacher_section, student_section = model_sections(experiment)
            device, distributed = processes.device, processes.distributed
            teacher = build_model(experiment, teacher_section, device, distributed) if teacher_section else None
            student = build_model(experiment, student_section, device, distributed)
            if options.test_only:
                _test(options, experiment, teacher, student, processes, path)
            else:
                result = _train(options, experiment, teacher, student, processes, folder)
                tested = _test(options, experiment, teacher, student, processes, path)
                if folder is not None:
                    folder.write_summary(_summary(options, result, tested, processes, elapsed(started)))
                    _write_student(experiment, folder)
        finally:
            if folder is not None:
                folder.close()
    return EXIT_DONE


def _output(options: Options) -> Path:
    if options.output is None:
        return default_output(options.config)
    if not options.output:
        raise UserError("--output: the name of the folder is empty")
    return Path(os.path.expanduser(options.output))


def _checkpoint_to_resume(options: Options) -> Path | None:
    if options.resume is None:
        return None
    if options.resume == "auto":
        last = _output(options) / "checkpoints" / "last.pt"
        return last if last.exists() else None
    checkpoint = Path(os.path.expanduser(options.resume))
    if not checkpoint.is_file():
        raise UserError(f"--resume {checkpoint}: no such file")
    return checkpoint


def _train(
    options: Options,
    experiment: Experiment,
    teacher: nn.Module | None,
    student: nn.Module,
    processes: Processes,
    folder: RunFolder | None,
) -> Result:
    lr_factor = processes.world_size if options.adjust_lr else 1
    trainer = Trainer(experiment, teacher, student, processes, folder, options.seed, lr_factor)
    checkpoint = _checkpoint_to_resume(options)
    if options.start_epoch:
        _, section = model_sections(experiment)
        trainer.start_at(options.start_epoch, experiment.data["models"][section].get("src_ckpt"))
    if checkpoint is not None:
        trainer.resume(checkpoint)
        logger.info("resumed from %s after epoch %d", checkpoint, trainer.epoch)
    elif trainer.epoch >= trainer.box.num_epochs:
        raise UserError(f"nothing to train: from epoch {trainer.epoch} on, and num_epochs is {trainer.box.num_epochs}")
    processes.barrier()  # all have read the checkpoint
    if folder is not None:  # nothing was written up to here: a mistake in the configuration costs nothing
        if checkpoint is None:
            folder.start_afresh()
        else:
            trainer.go_on(checkpoint)
        more = [Path(os.path.expanduser(options.run_log))] if options.run_log else []
        log_to(folder.path / "log.txt", *more)
        write_atomically(folder.path / "config.yaml", experiment.dump())
    else:
        log_to()
    try:
        return trainer.train()
    finally:
        trainer.box.clean_modules()


def _test(
    options: Options,
    experiment: Experiment,
    teacher: nn.Module | None,
    student: nn.Module,
    processes: Processes,
    path: Path,
) -> dict[str, dict[str, float]]:
    """Evaluates the teacher and the best student on the ``test`` section's data."""
    loader_config = experiment.data["test"]["test_data_loader"]
    with blame(experiment, "test"):
        load = loader_factory(options.seed, processes.rank, processes.world_size)
        (loader,) = load(experiment.data["datasets"], [loader_config], processes.distributed)
    assert loader is not None  # a test loader without a dataset_id is an error of the configuration
    processes.barrier()  # the main process has written the checkpoint
    source = _student_weights(experiment, path)
    logger.info("testing the student of %s", source)
    fit_weights(student, load_weights(source), source)
    precision = Precision(experiment.data["train"].get("amp"), processes.device)
    models: list[tuple[str, nn.Module]] = [("student", student)]
    if teacher is not None and not options.student_only:
        models.insert(0, ("teacher", teacher))
    results: dict[str, dict[str, float]] = {}
    for name, model in models:
        with precision.autocast():
            results[name] = Classification().evaluate(model, loader, processes.device)
        figures = "  ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        logger.info("test %s: %s", name, figures)
    return results


def _student_weights(experiment: Experiment, path: Path) -> Path:
    """The run's best checkpoint, else the student's ``dst_ckpt``."""
    best = path / "checkpoints" / "best.pt"
    if best.exists():
        return best
    target = _dst_ckpt(experiment)
    if target is not None and target.exists():
        return target
    raise UserError(f"no weights to test: neither {best} nor {target or 'a dst_ckpt'} exists")


def _dst_ckpt(experiment: Experiment) -> Path | None:
    _, section = model_sections(experiment)
    target = experiment.data["models"][section].get("dst_ckpt")
    return Path(os.path.expanduser(target)) if target else None


def _write_student(experiment: Experiment, folder: RunFolder) -> None:
    """The best student at ``dst_ckpt``, where torchdistill's scripts would put it."""
    target = _dst_ckpt(experiment)
    if target is not None and folder.best.exists():
        best = read_checkpoint(folder.best)
        save_atomically({"model": best["model"], "best_value": best["best_value"]}, target)


def _summary(
    options: Options,
    result: Result,
    tested: dict[str, dict[str, float]],
    processes: Processes,
    seconds: float,
) -> dict[str, Any]:
    return {
        "config": options.config,
        "overrides": options.overrides,
        "seed": options.seed,
        "best": result.best,
        "last": result.last,
        "test": tested,
        "steps": result.steps,
        "parameters": result.parameters,
        "teacher_digest": result.teacher_digest,
        "wall_seconds": seconds,
        "device": device_name(processes.device),
        "world_size": processes.world_size,
        **environment(),
    }
