"""One run from beginning to end: set up, train, test, record."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..check import prove
from ..config import Experiment, load_experiment
from ..errors import EXIT_DONE, UserError
from ..models.weights import fit_weights, load_weights, read_checkpoint, split_source
from ..tasks import task_for
from .build import blame, build_model, model_sections, stage_sections
from .checkpoint import LAST, save_atomically
from .loaders import loader_factory
from .precision import Precision
from .processes import Processes, Votes, process_group
from .progress import log_to, setup_logging
from .records import RunFolder, default_output, device_name, environment, write_atomically
from .resume import changed_parts, find_checkpoint, is_own_folder, sign_folder
from .sharding import is_sharded
from .signals import StoppedError, StopRequest
from .train import Result, Trainer, seed_everything, until_stopped

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
    trust: list[str] = field(default_factory=list)
    output: str | None = None
    resume: str | None = None
    allow_config_change: bool = False


def run(options: Options) -> int:
    """Trains (unless ``test_only``) and tests.

    Returns:
        The exit code, 0.

    Raises:
        UserError: anything that the user can mend, as one line.
    """
    experiment = load_experiment(options.config, options.overrides, options.trust)
    with process_group(options.device, options.dist_url) as processes:
        setup_logging(processes.is_main)
        path = _output(options)
        carry_on = (experiment.data["train"].get("checkpoint") or {}).get("on_error") == "continue"
        folder: RunFolder | None = None

        def occupy() -> None:
            nonlocal folder
            folder = RunFolder(path, carry_on)

        processes.share_result(occupy)
        try:
            for warning in experiment.warnings if processes.is_main else ():
                logger.warning("%s", warning)
            if options.log_config:
                logger.info(experiment.dump())
            _choose_kernels(options, experiment)
            seed_everything(options.seed)
            if options.test_only:
                teacher, student = _models(experiment, processes)
                _test(options, experiment, teacher, student, processes, path)
            else:
                _train_and_test(options, experiment, processes, path, folder)
        finally:
            if folder is not None:
                folder.close()
    return EXIT_DONE


def _choose_kernels(options: Options, experiment: Experiment) -> None:
    deterministic = bool(experiment.data["train"].get("deterministic"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not options.disable_cudnn_benchmark and not deterministic


def _models(experiment: Experiment, processes: Processes) -> tuple[nn.Module | None, nn.Module]:
    teacher, student = model_sections(experiment)
    device, distributed = processes.device, processes.distributed
    built = build_model(experiment, teacher, device, distributed) if teacher else None
    return built, build_model(experiment, student, device, distributed)


def _train_and_test(
    options: Options, experiment: Experiment, processes: Processes, path: Path, folder: RunFolder | None
) -> None:
    found = processes.share_result(lambda: find_checkpoint(options.resume, path))
    changed: tuple[str, ...] = ()
    if found is not None:
        source, state = found
        changed = changed_parts(source, state, experiment, options.seed, options.allow_config_change)
        epochs = sum(section["num_epochs"] for section in stage_sections(experiment.data["train"]))
        if state["epoch"] >= epochs and processes.share((path / "summary.json").exists()):
            logger.info("%s: this run is finished, all %d epochs are done", source, state["epoch"])
            return
    if found is None or changed:  # else it was proved sound when it was begun
        warnings = processes.share_result(lambda: prove(experiment))
        for warning in warnings if processes.is_main else ():
            logger.warning("%s", warning)
    teacher, student = _models(experiment, processes)
    lr_factor = processes.world_size if options.adjust_lr else 1
    stop = StopRequest()
    trainer = Trainer(experiment, teacher, student, processes, folder, options.seed, lr_factor, stop)
    _take_up(options, experiment, trainer, found, changed)
    try:
        with stop:
            result = trainer.train()
            processes.share_result(lambda: folder.finish() if folder else None)
            trainer.box.clean_modules()
            if is_sharded(student):  # for good; another one takes the weights
                section = model_sections(experiment)[1]
                student = build_model(experiment, section, processes.device, processes.distributed)
            tested = _test(options, experiment, teacher, student, processes, path, stop)

            def conclude() -> None:
                if folder is not None:
                    _write_student(experiment, folder)
                    folder.write_summary(_summary(options, result, tested, processes))  # last: now it is finished

            processes.share_result(conclude)
    finally:
        trainer.box.clean_modules()


def _output(options: Options) -> Path:
    if options.output is None:
        return default_output(options.config)
    if not options.output:
        raise UserError("--output: the name of the folder is empty")
    return Path(os.path.expanduser(options.output))


def _take_up(
    options: Options,
    experiment: Experiment,
    trainer: Trainer,
    found: tuple[Path, dict[str, Any]] | None,
    changed: tuple[str, ...],
) -> None:
    """Brings trainer and folder to where training begins: the start, ``--start_epoch``, or a checkpoint."""
    if options.start_epoch:
        _, section = model_sections(experiment)
        trainer.start_at(options.start_epoch, experiment.data["models"][section].get("src_ckpt"))
    if found is not None:
        source, state = found
        trainer.resume(state, source, changed)
        at = f" and {trainer.position.batches} batches" if trainer.position.batches else ""
        logger.info("resumed from %s after epoch %d%s (step %d)", source, trainer.epoch, at, trainer.step)
    elif trainer.epoch >= trainer.box.num_epochs:
        raise UserError(f"nothing to train: from epoch {trainer.epoch} on, and num_epochs is {trainer.box.num_epochs}")
    trainer.processes.barrier()
    folder = trainer.folder
    if folder is not None:  # nothing was written up to here: a mistake in the configuration costs nothing
        if found is None:
            folder.start_afresh(in_place=options.resume == "auto" or is_own_folder(folder.path))
        else:
            trainer.go_on(found[0])
        sign_folder(folder.path)
        more = [Path(os.path.expanduser(options.run_log))] if options.run_log else []
        log_to(folder.path / "log.txt", *more)
        write_atomically(folder.path / "config.yaml", experiment.dump())
    else:
        log_to()
    if found is not None and found[0] != trainer.path / "checkpoints" / LAST:
        trainer.save_last()  # what is gone on from is this run's own from now on


def _test(
    options: Options,
    experiment: Experiment,
    teacher: nn.Module | None,
    student: nn.Module,
    processes: Processes,
    path: Path,
    stop: StopRequest | None = None,
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
    votes, task = Votes(processes), task_for(experiment)
    for name, model in models:
        with precision.autocast():
            batches = until_stopped(loader, processes, votes, stop or StopRequest(), _stopped_in_test)
            results[name] = task.evaluate(model, batches, processes.device, path if model is student else None)
        figures = "  ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        logger.info("test %s: %s", name, figures)
    return results


def _stopped_in_test() -> None:
    raise StoppedError("stopped while testing; training is finished and saved, --resume auto tests again")


def _student_weights(experiment: Experiment, path: Path) -> Path:
    """The run's best checkpoint, else the student's ``dst_ckpt``."""
    best = path / "checkpoints" / "best.pt"
    if best.exists():
        return best
    target = _dst_ckpt(experiment)
    if target is not None and Path(split_source(target)[0]).exists():
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
        "resumed": result.resumed,
        "skipped_nonfinite": result.skipped["skipped"],
        "scaler_skips": result.skipped["scaler_skips"],
        "wall_seconds": round(result.seconds, 1),
        "device": device_name(processes.device),
        "world_size": processes.world_size,
        **environment(),
    }
