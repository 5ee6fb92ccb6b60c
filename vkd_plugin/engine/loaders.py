"""Data loaders from torchdistill's YAML, with addressed randomness and shards that fit their use.

Sections and keys keep torchdistill's meaning (``dataset_id``, ``dataset_wrapper``, ``requires_supp``,
``sampler``, ``batch_sampler``, ``collate_fn``, ``kwargs``); ``batch_size`` is per process. What differs:

* the order, transforms and mixing are addressed (:mod:`vkd_plugin.engine.randomness`), whatever the sampler;
* the sampler of the YAML is kept under several processes too, and its order dealt out to them, where
  torchdistill puts a DistributedSampler in its place. For training the order is padded from its beginning so
  that all processes have the same number of batches; for evaluation each sample is seen exactly once over
  all processes;
* workers are kept between epochs unless ``persistent_workers`` says otherwise;
* the configuration is left as it was.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
import torchvision.datasets  # noqa: F401 (see vkd_plugin.datasets)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)
from torchdistill.datasets.registry import get_batch_sampler, get_collate_func, get_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from ..errors import UserError
from ..models.weights import first_line
from ..suggest import nearest
from .randomness import (
    AddressedBatches,
    AddressedCollator,
    AddressedDataset,
    Repeated,
    Views,
    addressed,
    stable_hash,
)
from .reports import ReportingLoader

logger = logging.getLogger(__name__)


class EpochSampler(Sampler[Any]):
    """One process's part of a sampler's order, which depends on ``(seed, epoch)`` only.

    Rank r takes every W-th index from the r-th on, so the batches that W ranks take at one step are together
    a stretch of the order, the same stretch for any W of one global batch size. An index that the sampler repeats
    is :class:`~vkd_plugin.engine.randomness.Repeated` from its second time on.

    Args:
        sampler: the order of a whole epoch; may draw from the global generators, which are addressed.
        seed: the root of all randomness.
        rank, world_size: this process and the number of all.
        pad: repeat the beginning of the order so that all ranks get the same number of indices. Without it
            ranks differ by one at most, and no index comes twice.

    Attributes:
        first: how much of the order to leave out, because an interrupted run has seen it.
    """

    def __init__(self, sampler: Sampler[Any], seed: int, rank: int = 0, world_size: int = 1, pad: bool = True) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.sampler = sampler
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.pad = pad
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; a sampler of the user's that wants to know is told too."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        with addressed(self.seed, "order", self.epoch):
            order = Repeated.numbered(list(self.sampler))
        if self.pad:
            order = list(islice(cycle(order), len(order) + self._missing(self.first, len(order))))
        return iter(order[self.first + self.rank :: self.world_size])

    def __len__(self) -> int:
        """Indices of this process in a whole epoch."""
        return self._left_after(0)

    def left(self) -> int:
        """Indices of this process that the next iteration yields."""
        return self._left_after(self.first)

    def _left_after(self, first: int) -> int:
        total: int = len(self.sampler)  # type: ignore[arg-type]
        return len(range(first + self.rank, total + self._missing(first, total), self.world_size))

    def _missing(self, first: int, total: int) -> int:
        return max(first - total, (first - total) % self.world_size) if self.pad else 0


def build_loader(
    dataset: Dataset[Any],
    config: Mapping[str, Any],
    *,
    train: bool,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    views: Views | None = None,
) -> DataLoader[Any]:
    """The data loader of a ``train_data_loader``, ``val_data_loader`` or ``test_data_loader`` section.

    Args:
        dataset: a map-style data set.
        config: the section. Without a ``sampler`` training is shuffled and evaluation in order. A
            ``batch_sampler`` is given this process's part of the order; with several processes it has to
            make as many batches of each part.
        train: shards of equal size (True), or every sample exactly once (False).
        seed: the root of all randomness.
        rank, world_size: this process and the number of all.
        views: of the samples, for a cache of the teacher's outputs.

    Raises:
        UserError: an iterable data set, or ``batch_size: null``.
        ValueError: an unknown dataset wrapper, batch sampler or collate function.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(f"{type(dataset).__name__} is iterable; samples need an index (a map-style data set)")
    if config.get("cache_output"):
        logger.warning("cache_output is ignored: torchdistill has had no cache of outputs since 1.1.5")
    folder = str(getattr(dataset, "root", ""))
    if train and rank == 0 and os.path.basename(folder) in ("val", "valid", "validation"):
        logger.warning("the training images are those of '%s': are train and val exchanged?", folder)
    wrapped = wrapped_dataset(dataset, config)
    sampler = EpochSampler(_sampler(wrapped, config, train), seed, rank, world_size, pad=train)
    options = {**(config.get("kwargs") or {})}
    batches = _batch_sampler(sampler, config, options)
    collate = config.get("collate_fn")
    collate = collate if callable(collate) else get_collate_func(collate)
    if options.get("num_workers"):
        options.setdefault("persistent_workers", True)
    # A generator of its own, as the loader would draw its workers' seed from the global one.
    options.setdefault("generator", torch.Generator().manual_seed(stable_hash(seed, "workers", rank)))
    return ReportingLoader(
        AddressedDataset(wrapped, seed, views),
        batch_sampler=AddressedBatches(batches, seed),
        collate_fn=AddressedCollator(collate or default_collate, seed, rank),
        **options,
    )


def loader_factory(
    seed: int, rank: int = 0, world_size: int = 1, views: Views | None = None
) -> Callable[..., list[DataLoader[Any] | None]]:
    """A stand-in for ``torchdistill.datasets.util.build_data_loaders``, with its signature.

    Args:
        seed: the root of all randomness.
        rank, world_size: this process and the number of all.
        views: of the training samples, for a cache of the teacher's outputs.

    Returns:
        ``load(datasets, configs, distributed, accelerator=None, train=None)``. As in torchdistill's boxes,
        the first of two configs is for training and the second for evaluation; any other number of them is
        for evaluation. ``train`` (a bool) says it for all. A config without ``dataset_id`` makes None.
    """

    def load(
        datasets: Mapping[str, Dataset[Any]],
        configs: Sequence[Mapping[str, Any]],
        distributed: bool = False,
        accelerator: object = None,
        train: bool | None = None,
    ) -> list[DataLoader[Any] | None]:
        def build(config: Mapping[str, Any], training: bool) -> DataLoader[Any] | None:
            name = config.get("dataset_id")
            if name is None:
                return None
            if name not in datasets:
                raise UserError(f"no data set '{name}' under datasets{nearest(name, datasets)}")
            shown = views if training else None
            return build_loader(
                datasets[name], config, train=training, seed=seed, rank=rank, world_size=world_size, views=shown
            )

        if train is not None:
            return [build(config, train) for config in configs]
        of_a_box = len(configs) == 2  # a box asks for both of its loaders at once
        return [build(config, of_a_box and place == 0) for place, config in enumerate(configs)]

    return load


@dataclass(frozen=True)
class Position:
    """How far an epoch has come.

    Args:
        batches: done by each process.
        samples: seen by all processes together, which is where any number of processes, with batches of any
            size, can go on. None if a ``batch_sampler`` of the YAML chooses the samples.
    """

    batches: int = 0
    samples: int | None = 0


def set_position(loader: DataLoader[Any], epoch: int, position: Position = Position()) -> None:
    """Chooses the epoch (from 0) that the next iteration of a loader goes through, and where it begins.

    The batches before are left out without being loaded; those that follow are what they are in a whole epoch, if
    the number of processes and the batch size are what they were.

    Args:
        loader: from :func:`build_loader`.
        epoch, position: see above.
    """
    batches = _batches(loader)
    cut = _Cut.of(batches)
    if cut is not None:
        cut.order.first = position.samples or 0
    if cut is None or position.samples is None:
        batches.set_epoch(epoch, position.batches)
    else:
        batches.set_epoch(epoch, position.batches, numbered_from=position.batches)


def position_at(loader: DataLoader[Any], batch: int) -> Position:
    """The position after ``batch`` batches of the epoch, those before :func:`set_position` counted."""
    batches = _batches(loader)
    cut = _Cut.of(batches)
    if cut is None:
        return Position(batch, None)
    of_this_process = min((batch - batches.numbered_from) * cut.batch_size, cut.order.left())
    return Position(batch, cut.order.first + of_this_process * cut.order.world_size)


def samples_of(loader: DataLoader[Any], batch: int) -> list[Any] | None:
    """Indices of a batch of the present epoch; None where they cannot be told again."""
    batches = _batches(loader)
    try:
        return batches.indices(batch) if batch >= batches.numbered_from else None
    except LookupError:
        return None


def batches_in_epoch(loader: DataLoader[Any]) -> int:
    """Batches of the present epoch: those before :func:`set_position`, and those to come."""
    batches = _batches(loader)
    cut = _Cut.of(batches)
    if cut is None:
        return len(batches)
    left = cut.order.left()
    return batches.numbered_from + (left // cut.batch_size if cut.drop_last else -(-left // cut.batch_size))


def batches_of(loader: DataLoader[Any], deaths_allowed: int = 3) -> Iterator[Any]:
    """The loader's batches, each once, whether or not a worker process dies on the way.

    A worker can fall to the kernel's out-of-memory killer or to a full shared memory. As nothing is drawn from a
    worker's own state, new workers go on with the very batch that is missing.

    Args:
        loader: from :func:`build_loader`, its position set.
        deaths_allowed: within an epoch.

    Raises:
        UserError: workers keep dying.
    """
    batches = _batches(loader)
    epoch, first, numbered_from = batches.epoch, batches.first_batch, batches.numbered_from
    done = deaths = 0
    try:
        while True:
            batches.set_epoch(epoch, first + done, numbered_from)
            iterator: Iterator[Any] | None = None
            try:
                iterator = _started(loader)
                for batch in iterator:
                    yield batch
                    done += 1
                return
            except UserError:
                loader._iterator = None  # persistent workers end with the error, not when garbage is collected
                raise
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_death(error, iterator):
                    raise
                loader._iterator = None  # persistent workers are not asked again
                deaths += 1
                if deaths > deaths_allowed:
                    raise UserError(
                        f"data loader workers keep dying ({deaths} times in this epoch): {first_line(error)} "
                        "Fewer num_workers, a smaller batch_size or more (shared) memory may help"
                    ) from error
                logger.warning("%s New workers go on at batch %d of the epoch", first_line(error), first + done)
    finally:
        batches.set_epoch(epoch, first, numbered_from)  # the next evaluation goes through the same batches


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator whose workers' deaths are noticed where their batch is missing, and nowhere else.

    torch also raises from a handler of SIGCHLD, between any two instructions of the main thread: in the middle of
    an optimizer step, of which nobody could say afterwards how much was done.
    """
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _is_death(error: Exception, iterator: Iterator[Any] | None) -> bool:
    """Whether ``error`` comes of a worker's death.

    The loader says so if it waits in vain; if it was just fetching a batch from the worker, the connection breaks.
    """
    if str(error).startswith("DataLoader worker (pid"):  # what a data set raises begins with "Caught ..."
        return True
    workers = getattr(iterator, "_workers", ())
    for _ in range(20):  # a broken connection may be noticed before the process has quite ended
        if any(not worker.is_alive() for worker in workers):
            return True
        time.sleep(0.05 if workers else 0)
    return False


def _batches(loader: DataLoader[Any]) -> AddressedBatches:
    assert isinstance(loader.batch_sampler, AddressedBatches)
    return loader.batch_sampler


@dataclass(frozen=True)
class _Cut:
    """Batches that are the order cut into pieces, so that a number of samples says where they are."""

    order: EpochSampler
    batch_size: int
    drop_last: bool

    @classmethod
    def of(cls, batches: AddressedBatches) -> "_Cut | None":
        """None if a ``batch_sampler`` of the YAML chooses the samples."""
        inner = batches.batch_sampler
        if type(inner) is BatchSampler and isinstance(inner.sampler, EpochSampler):
            return cls(inner.sampler, inner.batch_size, inner.drop_last)
        return None


def wrapped_dataset(dataset: Dataset[Any], config: Mapping[str, Any]) -> Any:
    """A loader's data set in torchdistill's wrapper: that of ``dataset_wrapper``, or the one for ``requires_supp``."""
    wrapper = config.get("dataset_wrapper")
    if wrapper:
        build = get_dataset_wrapper(wrapper["key"])
        return build(dataset, *(wrapper.get("args") or []), **(wrapper.get("kwargs") or {}))
    return BaseDatasetWrapper(dataset) if config.get("requires_supp") else dataset


def _sampler(dataset: Any, config: Mapping[str, Any], train: bool) -> Sampler[Any]:
    section = config.get("sampler") or {}
    build = section.get("class_or_func") or (RandomSampler if train else SequentialSampler)
    kwargs = section.get("kwargs") or {}
    if isinstance(build, type) and issubclass(build, DistributedSampler):
        kwargs = {**kwargs, "num_replicas": 1, "rank": 0}  # the whole order: EpochSampler deals it out
    return build(dataset, **kwargs)


def _batch_sampler(
    sampler: EpochSampler, config: Mapping[str, Any], options: dict[str, Any]
) -> BatchSampler | Sampler[list[Any]]:
    """That of the YAML, else torch's from ``batch_size`` and ``drop_last``, which leave ``options``."""
    section = config.get("batch_sampler")
    if section:
        return get_batch_sampler(section["key"])(sampler, **(section.get("kwargs") or {}))
    batch_size = options.pop("batch_size", 1)
    if batch_size is None:
        raise UserError("batch_size: null is not supported; give the number of samples in a batch")
    return BatchSampler(sampler, batch_size, options.pop("drop_last", False))
