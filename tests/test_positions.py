"""Where an epoch goes on: from any batch, with other processes and batch sizes, and after a worker has died."""

import gc
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data import dataloader as torch_loader
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT

from vkd_plugin.engine.loaders import (
    EpochSampler,
    Position,
    batches_in_epoch,
    batches_of,
    build_loader,
    position_at,
    samples_of,
    set_position,
)
from vkd_plugin.errors import UserError

EPOCH = 3
START = Position()

sizes = st.integers(1, 45)
batch_sizes = st.integers(1, 7)
geometries = st.tuples(st.integers(1, 5), batch_sizes)  # processes, batch size


class Numbers(Dataset[Any]):
    """Items are their index and a draw."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, random.random()

    def __len__(self) -> int:
        return self.n


def collate(items: list[Any]) -> tuple[list[Any], float]:
    """A batch shows its address by what it draws."""
    return items, random.random()


def make(dataset: Dataset[Any] | int, rank: int = 0, world_size: int = 1, train: bool = True, **kwargs: Any) -> Any:
    config = {"collate_fn": collate, "kwargs": {"batch_size": 4, **kwargs}}
    dataset = Numbers(dataset) if isinstance(dataset, int) else dataset
    return build_loader(dataset, config, train=train, seed=5, rank=rank, world_size=world_size)


def ranks(n: int, world_size: int, position: Position = START, **kwargs: Any) -> list[DataLoader[Any]]:
    loaders = [make(n, rank, world_size, **kwargs) for rank in range(world_size)]
    for loader in loaders:
        set_position(loader, EPOCH, position)
    return loaders


def indices(batches: list[Any]) -> list[int]:
    return [index for items, _ in batches for index, _ in items]


# The same processes and batch size.


@settings(deadline=None, max_examples=80)
@given(sizes, geometries, st.booleans(), st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_the_rest_of_an_epoch_is_the_end_of_the_whole_one(
    n: int, geometry: tuple[int, int], drop_last: bool, stops: list[float]
) -> None:
    world_size, batch_size = geometry
    for rank in range(world_size):
        loader = make(n, rank, world_size, batch_size=batch_size, drop_last=drop_last)
        set_position(loader, EPOCH)
        whole = list(loader)
        assert batches_in_epoch(loader) == len(whole) == len(loader)
        position, done = START, 0
        for stop in stops:  # each goes on from where the one before stopped
            done += round(stop * (len(whole) - done))
            position = position_at(loader, done)
            loader = make(n, rank, world_size, batch_size=batch_size, drop_last=drop_last)  # as another run has it
            set_position(loader, EPOCH, position)
            assert position.batches == done
            assert list(loader) == whole[done:]
            assert batches_in_epoch(loader) == len(whole)
            told = [samples_of(loader, batch) for batch in range(done, len(whole))]
            assert told == [indices([batch]) for batch in whole[done:]]


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 6), st.integers(0, 60), st.booleans(), st.booleans())
def test_what_a_sampler_has_left_is_what_it_yields(
    n: int, world_size: int, first: int, pad: bool, shuffle: bool
) -> None:
    order = (RandomSampler if shuffle else SequentialSampler)(range(n))
    parts = [EpochSampler(order, 1, rank, world_size, pad) for rank in range(world_size)]
    whole = list(EpochSampler(order, 1))
    shares = []
    for part in parts:
        length = len(part)
        part.first = first
        shares.append(list(part))
        assert part.left() == len(shares[-1])
        assert len(part) == length  # that of a whole epoch
    longest = max(map(len, shares))
    assert longest - min(map(len, shares)) <= (0 if pad else 1)
    together = [share[i] for i in range(longest) for share in shares if i < len(share)]
    assert together[: len(whole[first:])] == whole[first:]
    assert len(together) - len(whole[first:]) in (range(world_size) if pad else (0,))


# Other processes and batch sizes.


@settings(deadline=None, max_examples=120)
@given(sizes, st.lists(st.tuples(geometries, st.integers(0, 12)), min_size=1, max_size=4), st.booleans())
def test_all_parts_together_see_each_sample_once(
    n: int, parts: list[tuple[tuple[int, int], int]], drop_last: bool
) -> None:
    position, seen = START, Counter[int]()
    for place, ((world_size, batch_size), length) in enumerate(parts):
        loaders = ranks(n, world_size, position, batch_size=batch_size, drop_last=drop_last)
        whole = [list(loader) for loader in loaders]
        (count,) = {len(batches) for batches in whole}  # no process waits for another one's batch
        (total,) = {batches_in_epoch(loader) for loader in loaders}
        assert total == position.batches + count
        length = count if place == len(parts) - 1 else min(length, max(count - 1, 0))  # stops are within the epoch
        taken = [indices(batches[:length]) for batches in whole]
        assert all(len(batch[0]) == batch_size for batches in whole for batch in batches[: length - 1])
        (after,) = {position_at(loader, position.batches + length) for loader in loaders}
        assert after.batches == position.batches + length
        assert after.samples == (position.samples or 0) + sum(map(len, taken))
        for share in taken:
            seen.update(share)
        position = after
    missing, repeats = n - len(seen), sum(seen.values()) - len(seen)
    assert repeats <= world_size - 1
    assert missing == 0 if not drop_last else missing < world_size * batch_size
    assert not (missing and repeats)


@settings(deadline=None, max_examples=40)
@given(sizes, geometries, geometries)
def test_nothing_is_left_after_an_epochs_last_batch(n: int, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Also where padding took the first part beyond the last sample."""
    (loader, *_) = ranks(n, first[0], batch_size=first[1])
    position = position_at(loader, batches_in_epoch(loader))
    for loader in ranks(n, second[0], position, batch_size=second[1]):
        assert batches_in_epoch(loader) == position.batches
        assert list(loader) == []


@settings(deadline=None, max_examples=40)
@given(sizes, geometries, st.integers(0, 8))
def test_a_sample_draws_the_same_wherever_it_comes(n: int, geometry: tuple[int, int], done: int) -> None:
    (alone,) = ranks(n, 1)
    drawn = {index: draw for items, _ in alone for index, draw in items}
    (start,) = ranks(n, 1)
    position = position_at(start, min(done, batches_in_epoch(start)))
    for loader in ranks(n, geometry[0], position, batch_size=geometry[1]):
        assert all(drawn[index] == draw for items, _ in loader for index, draw in items)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 45), geometries, st.booleans())
def test_an_evaluation_sees_each_sample_once_and_knows_its_batches(
    n: int, geometry: tuple[int, int], shuffled: bool
) -> None:
    world_size, batch_size = geometry
    seen: list[int] = []
    for loader in ranks(n, world_size, train=False, batch_size=batch_size):
        batches = list(batches_of(loader))
        assert batches_in_epoch(loader) == len(batches) == len(loader)
        seen += indices(batches)
    assert sorted(seen) == list(range(n))


def test_samples_that_are_not_of_this_part_are_not_told() -> None:
    (loader,) = ranks(40, 1, batch_size=4)
    set_position(loader, EPOCH, position_at(loader, 3))
    assert samples_of(loader, 3) is not None
    for elsewhere in (0, 2, 10, 1000):
        assert samples_of(loader, elsewhere) is None


# Batch samplers of the YAML.


class Pairs(Sampler[list[int]]):
    """A batch sampler of a user's own: neighbours in the order, shuffled, some dropped."""

    def __init__(self, sampler: Sampler[int], keep: int = 4) -> None:
        self.sampler, self.keep = sampler, keep

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
        random.shuffle(pairs)
        return iter(pairs[: self.keep])

    def __len__(self) -> int:
        return min(self.keep, -(-len(self.sampler) // 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_sampler_of_ones_own_goes_on_by_batches(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setitem(BATCH_SAMPLER_DICT, "Pairs", Pairs)
    config = {"batch_sampler": {"key": "Pairs", "kwargs": {"keep": 5}}, "collate_fn": collate}
    for rank in range(world_size):
        loader = build_loader(Numbers(20), config, train=True, seed=5, rank=rank, world_size=world_size)
        set_position(loader, EPOCH)
        whole = list(loader)
        assert len(whole) == batches_in_epoch(loader) == 5
        for done in range(6):
            set_position(loader, EPOCH)
            position = position_at(loader, done)
            assert position == Position(done, None)
            set_position(loader, EPOCH, position)
            assert list(batches_of(loader)) == whole[done:]
            assert batches_in_epoch(loader) == 5
            assert [samples_of(loader, batch) for batch in range(5)] == [indices([batch]) for batch in whole]


# Workers.


def test_workers_that_stay_go_on_wherever_they_are_told_to() -> None:
    (alone,) = ranks(37, 1)
    (loader,) = ranks(37, 1, num_workers=2)
    for epoch, done in ((0, 0), (0, 4), (1, 2), (0, 9), (0, 10), (2, 0)):
        set_position(alone, epoch)
        position = position_at(alone, done)
        whole = list(alone)
        set_position(loader, epoch, position)
        assert list(batches_of(loader)) == whole[done:]
    assert loader.persistent_workers


def test_workers_that_stay_forget_an_epoch_that_was_left() -> None:
    (loader,) = ranks(37, 1, num_workers=2)
    whole = list(loader)
    set_position(loader, EPOCH)
    begun = batches_of(loader)
    assert [next(begun), next(begun)] == whole[:2]
    del begun
    set_position(loader, EPOCH, position_at(loader, 2))
    assert list(batches_of(loader)) == whole[2:]


class Mortal(Numbers):
    """Kills the worker that is asked for an index of ``dying``: once, if ``flags`` names a folder, else always."""

    def __init__(self, n: int, end: Callable[[], Any], dying: tuple[int, ...], flags: Path | None = None) -> None:
        super().__init__(n)
        self.end, self.dying, self.flags = end, dying, flags

    def __getitem__(self, index: int) -> tuple[int, float]:
        if index in self.dying and self._first_time(index):
            self.end()
        return super().__getitem__(index)

    def _first_time(self, index: int) -> bool:
        if self.flags is None:
            return True
        try:
            (self.flags / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def exits() -> None:
    os._exit(1)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the loaders warn of; torch looks after its workers twice a second rather than every five."""
    monkeypatch.setattr(logging.getLogger("vkd_plugin"), "propagate", True)
    monkeypatch.setattr(torch_loader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
    monkeypatch.setattr(torch_loader._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(torch_loader._utils.signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith("loaders")]


@pytest.mark.parametrize(
    ("end", "workers", "dying", "done"),
    [(exits, 1, (11,), 0), (is_killed, 2, (11,), 0), (is_killed, 2, (3, 30), 0), (exits, 2, (0, 11, 36), 2)],
)
def test_a_worker_that_dies_costs_no_batch(
    end: Callable[[], Any],
    workers: int,
    dying: tuple[int, ...],
    done: int,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
) -> None:
    (alone,) = ranks(37, 1)
    whole = list(alone)
    dying = tuple(index for index in dying if index in indices(whole[done:]))
    loader = make(Mortal(37, end, dying, tmp_path), num_workers=workers)
    set_position(loader, EPOCH, position_at(alone, done))
    before = signal.getsignal(signal.SIGCHLD)
    for place, batch in enumerate(batches_of(loader), done):
        assert batch == whole[place]
        assert signal.getsignal(signal.SIGCHLD) is before  # never raises in the middle of a step
    assert place == len(whole) - 1
    assert 1 <= len(warnings()) <= len(dying)  # two at a time may die
    assert all("DataLoader worker" in text and "New workers go on at batch" in text for text in warnings())
    set_position(loader, EPOCH)
    assert list(batches_of(loader)) == whole  # in peace


def test_a_worker_that_dies_between_two_epochs_costs_nothing(warnings: Callable[[], list[str]]) -> None:
    (loader,) = ranks(37, 1, num_workers=2)
    whole = list(batches_of(loader))
    worker = loader._iterator._workers[0]  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    set_position(loader, EPOCH)
    assert list(batches_of(loader)) == whole
    assert len(warnings()) == 1


def test_workers_that_keep_dying_are_the_users_to_mend(warnings: Callable[[], list[str]]) -> None:
    loader = make(Mortal(37, exits, tuple(range(20, 37))), num_workers=2)
    set_position(loader, 0)
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=r"data loader workers keep dying \(3 times in this epoch\)") as caught:
        list(batches_of(loader, deaths_allowed=2))
    assert len(str(caught.value).splitlines()) == 1
    assert len(warnings()) == 2
    assert signal.getsignal(signal.SIGCHLD) is before


class Failing(Numbers):
    def __init__(self, error: Exception) -> None:
        super().__init__(8)
        self.error = error

    def __getitem__(self, index: int) -> tuple[int, float]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (ValueError("not an image"), 1),
        (RuntimeError("ffmpeg exited unexpectedly"), 0),
        (RuntimeError("ffmpeg exited unexpectedly"), 1),
        (RuntimeError("the decoder is killed"), 1),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1),  # of a loader inside the data set
    ],
)
def test_what_a_data_set_raises_is_not_taken_for_a_death(
    error: Exception, workers: int, warnings: Callable[[], list[str]]
) -> None:
    with pytest.raises(type(error), match=str(error).split("(")[0]):
        list(batches_of(make(Failing(error), num_workers=workers)))
    assert warnings() == []
    gc.collect()  # the workers end here, not in a later test
