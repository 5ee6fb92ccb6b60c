"""Randomness that is addressed, not consumed.

What is drawn depends on where it is drawn, never on what was drawn before::

    sample order         f(seed, epoch)
    a sample's transform f(seed, epoch, sample index), and how often it has come before, if a sampler repeats it
    a batch's mixing     f(seed, epoch, batch of the epoch, rank)

With a cache of the teacher's outputs transforms come again (:class:`Views`), whatever the run's seed::

    a sample's transform f(the views' seed, view, sample index)

So a run that goes on from a checkpoint draws what it would have drawn, any number of loader workers draws the
same, and no two ranks repeat each other. The address travels with the request for a batch
(:class:`BatchAddress`), not as state of the data set: persistent workers and prefetching cannot get it wrong.

Addressed are the global generators of python, numpy and torch (CPU). A transform that owns a generator, such
as ``numpy.random.default_rng()``, is out of reach.
"""

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler, get_worker_info

from ..datasets.fused_transforms import fused
from ..datasets.unreadable import replacements
from ..errors import UserError
from ..random_state import generators_restored
from .reports import Report


def stable_hash(*address: str | SupportsIndex) -> int:
    """64 well-mixed bits of an address, the same in every process and on every machine, unlike ``hash``."""
    parts = tuple([part if isinstance(part, str) else operator.index(part) for part in address])
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def address(seed: int, *address: str | SupportsIndex) -> None:
    """Seeds the global generators of python, numpy and torch, those of its devices included, from an address.

    For what a training step draws on its device: dropout, stochastic depth.
    """
    bits = stable_hash(seed, *address)
    _seed_generators(bits)
    # Not torch.manual_seed: before CUDA is up it keeps each call, with its stack, to repeat it later.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(bits)


@contextmanager
def addressed(seed: int, *address: str | SupportsIndex) -> Iterator[None]:
    """Within the block the global CPU generators are those of an address; afterwards as they were before."""
    with generators_restored():
        _seed_generators(stable_hash(seed, *address))
        yield


def _seed_generators(bits: int) -> None:
    # torch's CPU generator and numpy's keep 32 bits of a seed, so each gets its own half. torch.manual_seed
    # would reach for the devices too and take a hundred times as long.
    random.seed(bits)
    np.random.seed(bits >> 32)  # noqa: NPY002 (transforms draw from the global generator)
    torch.default_generator.manual_seed(bits)


@dataclass(frozen=True)
class BatchAddress:
    """A request for one batch.

    Args:
        epoch: counts from 0.
        batch: place of the batch in the epoch, counts from 0.
        indices: the samples.
    """

    epoch: int
    batch: int
    indices: list[Any]


class AddressedBatches(Sampler[Any]):
    """Gives each batch of a batch sampler its address, from any batch of the epoch on.

    Args:
        batch_sampler: yields lists of sample indices; may draw from the global generators, which are
            addressed by ``(seed, epoch)`` while it does.
        seed: the root of all randomness.

    Attributes:
        sampler: that of ``batch_sampler`` (None if it has none), where torchdistill looks for it.
    """

    def __init__(self, batch_sampler: BatchSampler | Sampler[list[Any]], seed: int) -> None:
        self.batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0
        self.numbered_from = 0

    def set_epoch(self, epoch: int, first_batch: int = 0, numbered_from: int = 0) -> None:
        """Chooses the epoch of the next iteration and where in it to begin.

        Args:
            epoch: counts from 0.
            first_batch: the address of the first batch to yield.
            numbered_from: the address of the first batch that ``batch_sampler`` yields: those before
                ``first_batch`` are left out.
        """
        self.epoch, self.first_batch, self.numbered_from = epoch, first_batch, numbered_from
        for part in (self.batch_sampler, self.sampler):
            tell = getattr(part, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __iter__(self) -> Iterator[BatchAddress]:
        epoch, batches = self.epoch, enumerate(self._batches(), self.numbered_from)
        for batch, indices in islice(batches, self.first_batch - self.numbered_from, None):
            yield BatchAddress(epoch, batch, indices)

    def indices(self, batch: int) -> list[Any]:
        """The samples of a batch of the present epoch, by its address."""
        return self._batches()[batch - self.numbered_from]

    def _batches(self) -> list[list[Any]]:
        with addressed(self.seed, "batches", self.epoch):
            return list(self.batch_sampler)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)  # type: ignore[arg-type]


class Repeated(int):
    """A sample's index where it comes again in an epoch.

    Attributes:
        before: how often it has come, at least 1.
    """

    before: int

    @classmethod
    def numbered(cls, order: list[Any]) -> list[Any]:
        """``order``, with what comes again told apart: augmented alike, it would only be shown twice."""
        try:
            indices = [operator.index(index) for index in order]
        except TypeError:  # a batch sampler of the user's makes indices of them
            return order
        if len(set(indices)) == len(indices):
            return order
        seen: dict[int, int] = {}
        for place, index in enumerate(indices):
            before = seen[index] = seen.get(index, -1) + 1
            if before:
                again = order[place] = cls(index)
                again.before = before
        return order


@dataclass(frozen=True)
class Views:
    """Transforms that come again: each sample has so many of them, one after the other from epoch to epoch.

    Args:
        count: of different views.
        seed: the root of what they draw; runs with different seeds share their views.
    """

    count: int
    seed: int = 0

    def at(self, epoch: int, index: Any) -> int:
        """The view of a sample in an epoch; a sampler that repeats it goes on to the next."""
        return (epoch + (index.before if isinstance(index, Repeated) else 0)) % self.count


SAMPLE, VIEW = "vkd_sample", "vkd_view"
"""Under which names a sample's supplement says what it is, where there are views."""


class AddressedDataset(Dataset[Any]):
    """A data set whose items depend on ``(seed, epoch, index)`` and nothing else.

    A :class:`BatchAddress` brings the epoch; an item taken by its bare index is that of epoch 0. Attributes
    such as ``classes`` and ``targets`` are those of the wrapped data set.

    Args:
        dataset: a map-style data set, with all its own wrappers.
        seed: the root of all randomness.
        views: transforms that come again; then torchdistill's supplement of each sample says which it is.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, views: Views | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.views = views

    def __getitem__(self, index: Any) -> Any:
        return self.in_epoch(0, index)

    def in_epoch(self, epoch: int, index: Any) -> Any:
        """A sample as it is in an epoch (from 0)."""
        with generators_restored():
            return self._item(epoch, index)

    def __getitems__(self, batch: BatchAddress | list[Any]) -> Any:
        """What a DataLoader asks for, by an address of its batch sampler: that address and its samples.

        A list of indices, as ``torch.utils.data.Subset`` asks for, gets a list of items.
        """
        if not isinstance(batch, BatchAddress):
            return [self[index] for index in batch]
        # Once per batch, as saving the generators costs more than ten samples' seeds.
        with generators_restored(), replacements() as replaced, fused(self.dataset):
            try:
                samples = [self._item(batch.epoch, index) for index in batch.indices]
            except UserError as error:
                if get_worker_info() is None:
                    raise
                return Report(None, [], str(error))
        return batch, samples, replaced

    def _item(self, epoch: int, index: Any) -> Any:
        if self.views is not None:
            return self._view(self.views, epoch, index)
        again = (index.before,) if isinstance(index, Repeated) else ()
        _seed_generators(stable_hash(self.seed, "sample", epoch, index, *again))
        return self.dataset[index]

    def _view(self, views: Views, epoch: int, index: Any) -> Any:
        view = views.at(epoch, index)
        _seed_generators(stable_hash(views.seed, "view", view, index))
        sample, target, *supplement = self.dataset[index]
        return sample, target, {**(supplement[0] if supplement else {}), SAMPLE: operator.index(index), VIEW: view}

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Only what is not found here. Copying and unpickling ask before there is a data set to pass it on to.
        inner = self.__dict__.get("dataset")
        while inner is not None and not name.startswith("__"):
            if hasattr(inner, name):
                return getattr(inner, name)
            inner = getattr(inner, "org_dataset", None)  # torchdistill's wrappers do not pass attributes on
        raise AttributeError(f"'{type(self).__name__}' object and its data set have no attribute '{name}'")


class AddressedCollator:
    """Collates what :class:`AddressedDataset` fetched, with generators that depend on the batch's address.

    Args:
        collate: list of samples to batch; may draw from the global generators.
        seed: the root of all randomness.
        rank: of this process, as its n-th batch is another one than its peers'.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int, rank: int = 0) -> None:
        self.collate = collate
        self.seed = seed
        self.rank = rank

    def __call__(self, fetched: Any) -> Any:
        """A batch of what :meth:`AddressedDataset.__getitems__` returns, or a :class:`Report`."""
        if isinstance(fetched, Report):
            return fetched
        batch, samples, replaced = fetched
        with addressed(self.seed, "batch", batch.epoch, batch.batch, self.rank):
            collated = self.collate(samples)
        return Report(collated, replaced) if replaced else collated
