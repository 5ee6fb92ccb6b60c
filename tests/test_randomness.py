"""Order, transforms and mixing depend on their address: not on workers, ranks, or what was drawn before."""

import copy
import pickle
import random
from itertools import chain

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT, get_collate_func
from torchdistill.datasets.util import build_data_loader

from vkd_plugin.datasets import MixingCollator
from vkd_plugin.engine.loaders import EpochSampler, Position, build_loader, loader_factory, set_position
from vkd_plugin.engine.randomness import AddressedDataset, address, addressed, stable_hash
from vkd_plugin.errors import UserError

N = 23


class Draws(torch.utils.data.Dataset):
    """Nothing but random items: a draw from each of the global generators, and the index as label."""

    classes = ("a", "b")

    def __getitem__(self, index):
        if not 0 <= index < N:
            raise IndexError(index)
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]).double(), index  # noqa: NPY002

    def __len__(self):
        return N


def make(train=True, seed=0, rank=0, world_size=1, config=None, **kwargs):
    config = {"kwargs": {"batch_size": 4, **kwargs}, **(config or {})}
    return build_loader(Draws(), config, train=train, seed=seed, rank=rank, world_size=world_size)


def epoch_of(loader, epoch=0, first_batch=0):
    """The batches of an epoch as nested lists."""
    set_position(loader, epoch, Position(first_batch, None))
    return [(samples.tolist(), labels.tolist()) for samples, labels in loader]


def by_index(batches):
    """Sample index -> what was drawn for it."""
    return {i: tuple(s) for samples, labels in batches for s, i in zip(samples, labels, strict=True)}


def states():
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    return python, numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


# The hash.


def test_hash_is_the_same_everywhere():
    assert stable_hash(0) == 0x490A32D6978C23C8
    assert stable_hash(7, "sample", 3, 41) == 0x475A4D5356299465


addresses = st.lists(st.integers(-(2**40), 2**70) | st.text(max_size=3), max_size=4).map(tuple)


@settings(max_examples=50, deadline=None)
@given(addresses, addresses)
def test_addresses_do_not_meet(a, b):
    assert (stable_hash(*a) == stable_hash(*b)) == (a == b)
    assert 0 <= stable_hash(*a) < 2**64


def test_integers_of_all_kinds_are_one_address():
    assert stable_hash(3) == stable_hash(np.int64(3)) == stable_hash(torch.tensor(3)) != stable_hash("3")


# The generators.


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_addressed_block_draws_the_same_and_leaves_no_trace():
    before = states()
    with addressed(1, "here", 2):
        first = draw()
        with addressed(5):
            inner = draw()
        second = draw()
    assert states() == before
    with addressed(1, "here", 2):
        assert (draw(), draw()) == (first, second)
    assert inner not in (first, second)
    with pytest.raises(ZeroDivisionError), addressed(0):
        raise ZeroDivisionError
    assert states() == before


def test_address_seeds_and_stays():
    address(1, 2, 3)
    first, second = draw(), draw()
    address(1, 2, 3)
    assert (draw(), draw()) == (first, second)


# Loaders.


@pytest.mark.parametrize(
    "kwargs",
    [{"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}],
    ids=["fork", "spawn"],
)
def test_workers_draw_what_one_process_draws(kwargs):
    alone, with_workers = make(), make(**kwargs)
    assert with_workers.persistent_workers
    # The workers stay: that an epoch reaches them, and comes back when it is asked for again, is the point.
    for epoch in (0, 1, 0):
        assert epoch_of(with_workers, epoch) == epoch_of(alone, epoch)


def test_epochs_and_seeds_differ():
    epochs = [by_index(epoch_of(make(seed=seed), epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    drawn = set(chain.from_iterable(chain.from_iterable(epoch.values()) for epoch in epochs))
    assert len(drawn) == 3 * 3 * N
    orders = [list(epoch) for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_samples_draw_knows_neither_batch_nor_rank():
    alone = by_index(epoch_of(make(), 3))
    assert by_index(epoch_of(make(batch_size=5), 3)) == alone
    ranks = [by_index(epoch_of(make(rank=rank, world_size=3), 3)) for rank in range(3)]
    assert ranks[0] | ranks[1] | ranks[2] == alone


def test_ranks_never_draw_the_same():
    ranks = [by_index(epoch_of(make(train=False, rank=rank, world_size=2))) for rank in range(2)]
    drawn = [set(chain.from_iterable(rank.values())) for rank in ranks]
    assert not drawn[0] & drawn[1]
    assert len(drawn[0] | drawn[1]) == 3 * N


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_leaves_the_callers_generators_alone(num_workers):
    before = states()
    epoch_of(make(num_workers=num_workers), 2)
    assert states() == before


def test_what_the_caller_drew_does_not_matter():
    loader = make()
    batches = epoch_of(loader)
    draw()
    assert epoch_of(loader) == batches


def test_an_epoch_goes_on_in_the_middle():
    loader = make()
    whole = epoch_of(loader, 5)
    assert epoch_of(loader, 5, first_batch=2) == whole[2:]
    assert epoch_of(loader, 5) == whole
    assert len(loader) == len(whole) == 6


def test_drop_last_and_batch_size_pass():
    assert [len(labels) for _, labels in epoch_of(make(batch_size=5, drop_last=True))] == [5, 5, 5, 5]
    assert len(make(drop_last=True)) == 5


def test_an_item_by_its_index_is_that_of_the_first_epoch():
    loader = make()
    before = states()
    assert tuple(loader.dataset[4][0].tolist()) == by_index(epoch_of(loader, 0))[4]
    assert states() == before
    subset = torch.utils.data.Subset(loader.dataset, [4, 5])
    assert next(iter(torch.utils.data.DataLoader(subset, 2)))[1].tolist() == [4, 5]


def test_attributes_are_those_of_the_data_set():
    loader = make(config={"requires_supp": True})
    assert loader.dataset.classes == ("a", "b")  # past torchdistill's wrapper
    assert len(loader.dataset) == N
    assert pickle.loads(pickle.dumps(loader.dataset)).classes == copy.deepcopy(loader.dataset).classes
    with pytest.raises(AttributeError, match=r"AddressedDataset.*no attribute 'colour'"):
        _ = loader.dataset.colour


# Samplers.


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.booleans(), st.integers(0, 5))
def test_ranks_share_out_the_order(n, world_size, shuffle, epoch):
    sampler = (RandomSampler if shuffle else SequentialSampler)(range(n))

    def shares(pad):
        for rank in range(world_size):
            part = EpochSampler(sampler, 7, rank, world_size, pad)
            part.set_epoch(epoch)
            share = list(part)
            assert len(share) == len(part)
            yield share

    exact, padded = list(shares(False)), list(shares(True))
    assert sorted(chain.from_iterable(exact)) == list(range(n))
    assert {len(share) for share in padded} == {-(-n // world_size)}
    assert all(share[: len(own)] == own for share, own in zip(padded, exact, strict=True))
    if not shuffle:
        assert exact == [list(range(rank, n, world_size)) for rank in range(world_size)]


def test_a_step_takes_the_same_samples_whatever_the_number_of_ranks():
    def steps(world_size):
        ranks = [epoch_of(make(rank=r, world_size=world_size, batch_size=8 // world_size)) for r in range(world_size)]
        return [sorted(chain.from_iterable(labels for _, labels in step)) for step in zip(*ranks, strict=True)]

    assert steps(1)[:2] == steps(2)[:2] == steps(4)[:2]


class Backwards(Sampler):
    """A user's own: from the end, with a random beginning, and told the epoch."""

    def __init__(self, dataset, step=1):
        self.order = range(len(dataset) - 1, -1, -step)
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        shift = random.randrange(len(self.order)) + self.epoch
        return iter([self.order[(shift + i) % len(self.order)] for i in range(len(self.order))])

    def __len__(self):
        return len(self.order)


def order_of(config, train=True, epoch=0, **kwargs):
    return list(by_index(epoch_of(make(train, config=config, **kwargs), epoch)))


def test_a_samplers_arguments_are_kept():
    section = {"sampler": {"class_or_func": RandomSampler, "kwargs": {"num_samples": 9}}}
    assert len(order_of(section)) == 9
    weighted = {"sampler": {"class_or_func": lambda dataset, **kw: WeightedRandomSampler(**kw)}}
    weighted["sampler"]["kwargs"] = {"weights": [0.0, 1.0], "num_samples": 6}
    assert set(order_of(weighted)) == {1}


def test_a_sampler_of_ones_own_is_addressed_and_shared_out():
    section = {"sampler": {"class_or_func": Backwards, "kwargs": {"step": 2}}}
    whole = order_of(section, epoch=4)
    assert whole == order_of(section, epoch=4) != order_of(section, epoch=5)
    parts = [order_of(section, epoch=4, rank=rank, world_size=2) for rank in range(2)]
    assert parts == [whole[0::2], whole[1::2]]


def test_a_distributed_sampler_is_not_shared_out_twice():
    section = {"sampler": {"class_or_func": DistributedSampler, "kwargs": {"shuffle": False}}}
    assert order_of(section, rank=1, world_size=2)[:3] == [1, 3, 5]


def test_defaults_without_a_sampler():
    assert order_of({}, train=False) == list(range(N)) == sorted(order_of({})) != order_of({})


class ByParity(Sampler):
    """A batch sampler of a user's own: batches of even or of odd indices, in a random order."""

    def __init__(self, sampler, batch_size):
        self.sampler, self.batch_size = sampler, batch_size

    def __iter__(self):
        groups = [[i for i in self.sampler if i % 2 == odd][: self.batch_size] for odd in (0, 1)]
        random.shuffle(groups)
        return iter(groups)

    def __len__(self):
        return 2


def test_a_batch_sampler_of_ones_own(monkeypatch):
    monkeypatch.setitem(BATCH_SAMPLER_DICT, "ByParity", ByParity)
    config = {"batch_sampler": {"key": "ByParity", "kwargs": {"batch_size": 3}}, "kwargs": {"num_workers": 0}}
    loader = build_loader(Draws(), config, train=True, seed=0)
    epochs = [epoch_of(loader, epoch) for epoch in (0, *range(8))]
    assert epochs[0] == epochs[1]
    assert all({i % 2 for i in labels} in ({0}, {1}) for epoch in epochs for _, labels in epoch)
    assert {epoch[0][1][0] % 2 for epoch in epochs} == {0, 1}
    # torchdistill looks there when its box runs in several processes.
    assert loader.batch_sampler.sampler is loader.batch_sampler.batch_sampler.sampler


# torchdistill's sections.


def test_factory_is_torchdistills_function():
    shared = {"sampler": {"class_or_func": RandomSampler}, "collate_fn": None, "kwargs": {"batch_size": 4}}
    configs = [
        {"dataset_id": "digits/train", "requires_supp": True, "cache_output": None, **shared},
        {"dataset_id": "digits/test", **shared},
    ]
    before = copy.deepcopy(configs)
    load = loader_factory(0, rank=1, world_size=2)
    train, val = load({"digits/train": Draws(), "digits/test": Draws()}, configs, True, None)
    assert configs == before
    assert [len(batch) for batch in train] == [3] * 3
    assert next(iter(train))[2] == {}
    assert sum(len(labels) for _, labels in val) == N // 2  # rank 1 of 2, without padding
    assert sum(len(labels) for _, labels, _ in train) == N // 2 + 1
    (test,) = load({"digits/test": Draws()}, configs[1:2], True)
    assert sum(len(labels) for _, labels in test) == N // 2
    assert load({}, [{}, {}], False) == [None, None]


def test_dataset_wrapper():
    config = {"dataset_wrapper": {"key": "SSKDDatasetWrapper", "args": None}, "requires_supp": True}
    with pytest.raises(AttributeError, match="transform"):  # it reached the wrapper, which wants images
        make(config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"dataset_id": "digits/tset"},
            "no data set 'digits/tset' under datasets .did you mean 'digits/test'",
        ),
        ({"dataset_id": "digits/test", "kwargs": {"batch_size": None}}, "batch_size: null is not supported"),
        ({"dataset_id": "stream"}, "Stream is iterable"),
    ],
)
def test_errors(config, message):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match=message):
        loader_factory(0)({"digits/test": Draws(), "stream": Stream()}, [config])


def test_a_cache_that_torchdistill_no_longer_has_is_not_passed_over_in_silence(caplog):
    make(config={"cache_output": "./cache"})
    assert "cache_output is ignored" in caplog.text


# Mixing.


class Images(torch.utils.data.Dataset):
    def __init__(self, n=10, supplement=False):
        self.n, self.supplement = n, supplement

    def __getitem__(self, index):
        item = (torch.full((1, 4, 4), float(index)), index % 3)
        return (*item, {"index": index}) if self.supplement else item

    def __len__(self):
        return self.n


def mixed_epoch(collate, epoch=0, supplement=False, **kwargs):
    config = {"collate_fn": collate, "kwargs": {"batch_size": 4, **kwargs.pop("kwargs", {})}}
    loader = build_loader(Images(supplement=supplement), config, train=True, seed=0, **kwargs)
    set_position(loader, epoch)
    return [tuple(part.tolist() if torch.is_tensor(part) else part for part in batch) for batch in loader]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_is_addressed(mode):
    collate = MixingCollator(num_classes=3, mode=mode)
    alone = mixed_epoch(collate)
    assert mixed_epoch(collate, kwargs={"num_workers": 2}) == alone
    assert mixed_epoch(collate, epoch=1) != alone


def test_ranks_mix_differently():
    fixed = [(torch.full((1, 2, 2), float(i)), i % 3) for i in range(4)]
    collate = MixingCollator(num_classes=3, cutmix_alpha=0, label_smoothing=0)
    drawn = []
    for rank in (0, 1):
        config = {"collate_fn": lambda samples: collate(copy.deepcopy(fixed)), "kwargs": {"batch_size": 4}}
        loader = build_loader(Images(8), config, train=True, seed=0, rank=rank, world_size=2)
        drawn.append(next(iter(loader))[1].tolist())
    assert drawn[0] != drawn[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.sampled_from(["batch", "pair", "elem"]), st.booleans(), st.integers(0, 99))
def test_mixing_mixes_image_and_target_alike(n, mode, cut, seed):
    """With images that are the one-hot code of their class, the mean of an image is its target."""
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0} if cut else {"mixup_alpha": 1.0, "cutmix_alpha": 0.0}
    collate = MixingCollator(num_classes=3, label_smoothing=0, mode=mode, **alphas)
    samples = [(torch.eye(3)[i % 3][:, None, None].expand(3, 8, 8), i % 3, {"i": i}) for i in range(n)]
    with addressed(seed):
        images, targets, supplement = collate(samples)
    assert targets.shape == (n, 3)
    assert supplement["i"].tolist() == list(range(n))
    torch.testing.assert_close(images.mean(dim=(2, 3)), targets, atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    if n % 2:
        assert images[-1].equal(samples[-1][0])


def test_an_object_in_the_yaml_is_found_by_torchdistill():
    collate = MixingCollator(num_classes=3)
    assert get_collate_func(collate) is collate
    config = {
        "sampler": {"class_or_func": SequentialSampler},
        "collate_fn": collate,
        "requires_supp": True,
        "kwargs": {"batch_size": 4},
    }
    _, targets, supplement = next(iter(build_data_loader(Images(), config, distributed=False)))
    assert targets.shape == (4, 3)
    assert supplement == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixup_alpha": 0, "cutmix_alpha": 0}, "both 0: nothing would be mixed"),
        ({"mode": "pairs"}, "no mixing mode 'pairs' .did you mean 'pair'"),
        ({"mixup_alpha": -1}, "mixup_alpha must lie in"),
    ],
)
def test_mixing_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MixingCollator(num_classes=3, **kwargs)


def test_addressed_data_set_alone_is_a_data_set():
    dataset = AddressedDataset(Draws(), seed=0)
    assert len(list(dataset)) == N
