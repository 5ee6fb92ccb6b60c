"""Transforms that are replaced while a batch is fetched: to the last bit torchvision's, and nobody else sees them."""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchdistill.datasets.wrapper import BaseDatasetWrapper, SSKDDatasetWrapper
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Normalize,
    RandomApply,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    ToTensor,
)

from vkd_plugin.datasets.fused_transforms import FusedCompose, PaddedCrop, TensorFromTable, fuse, fused
from vkd_plugin.datasets.grey_images import GreyImages
from vkd_plugin.engine.loaders import build_loader, set_position

IMAGENET = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise, and on it a rectangle of the least and the greatest value."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    values[: height // 3, : width // 3] = 0
    values[height // 2 :, width // 2 :] = 255
    image = Image.fromarray(values[..., :3]).convert(mode) if mode != "RGBA" else Image.fromarray(values)
    image.info["comment"] = "of the file"
    return image


def outcome(transform: Any, image: Any, seed: int) -> tuple[Any, ...]:
    """What comes of an image, and the generators' states afterwards; an error is its type and message."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        made = transform(image)
    except Exception as error:
        made = (type(error), str(error))
    if isinstance(made, torch.Tensor):
        made = (made.dtype, made.shape, made.is_contiguous(), made.numpy().tobytes())
    elif isinstance(made, Image.Image):
        made = (made.mode, made.size, made.info, made.tobytes())
    numpy = np.random.get_state()  # noqa: NPY002
    return made, random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


def kinds(transform: Any) -> list[type]:
    cheaper = fuse(transform)
    return [type(step) for step in cheaper.steps] if isinstance(cheaper, FusedCompose) else []


# Equal to the last bit.


finite = st.floats(-4, 4, width=32) | st.sampled_from([0, 1, -1, 0.2860, 0.485])
scales = st.floats(1e-3, 1e3) | st.sampled_from([1, 2, 0.3530])


@st.composite
def compositions(draw: st.DrawFn) -> Compose:
    parts: list[Any] = []
    if draw(st.booleans()):
        margin: Any = st.integers(0, 5)
        padding = st.none() | margin | st.sampled_from([1, 2, 4]).flatmap(lambda n: st.tuples(*[margin] * n))
        size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)) | st.integers(1, 24))
        parts.append(RandomCrop(size, padding=draw(padding), fill=draw(st.sampled_from([0, 0, 7]))))
    parts.append(RandomHorizontalFlip(draw(st.sampled_from([0.0, 0.5, 1.0]))))
    parts.append(ToTensor())
    for _ in range(draw(st.integers(0, 2))):
        channels = draw(st.sampled_from([1, 3]))
        mean, std = (draw(st.lists(values, min_size=channels, max_size=channels)) for values in (finite, scales))
        parts.append(Normalize(draw(st.sampled_from([list, tuple]))(mean), std))
    parts.append(RandomErasing())
    if draw(st.booleans()):
        parts = [Compose(parts[:1]), *parts[1:]]
    return Compose(parts)


@settings(max_examples=150, deadline=None)
@given(
    compositions(),
    st.sampled_from(["L", "L", "RGB", "RGB", "RGBA", "CMYK", "1", "I", "F", "P", "LA"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_tensors_and_random_numbers_are_torchvisions(
    transform: Compose, mode: str, width: int, height: int, seed: int
) -> None:
    image = picture(mode, width, height, seed)
    cheaper = fuse(transform)
    assert isinstance(cheaper, FusedCompose)
    assert outcome(cheaper, image, seed) == outcome(transform, image, seed)
    assert image.tobytes() == picture(mode, width, height, seed).tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_default_dtypes(dtype: torch.dtype) -> None:
    transform = Compose([ToTensor(), IMAGENET])
    image = picture("RGB", 9, 7, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made, expected = fuse(transform)(image), transform(image)
    finally:
        torch.set_default_dtype(before)
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)
    assert fuse(transform)(image).dtype == before


@pytest.mark.parametrize(
    "given",
    [np.arange(27, dtype=np.uint8).reshape(3, 3, 3), torch.zeros(3, 4, 4), Image.new("RGB", (0, 3)), "a path", None],
    ids=["array", "tensor", "empty", "text", "none"],
)
def test_what_is_no_image_fares_as_before(given: Any) -> None:
    for transform in (Compose([ToTensor(), IMAGENET]), Compose([RandomCrop(3, padding=1), ToTensor()])):
        assert outcome(fuse(transform), given, 0) == outcome(transform, given, 0)


def test_images_that_are_loaded_late(tmp_path: Path) -> None:
    picture("RGB", 20, 10, 0).save(tmp_path / "image.png")
    transform = Compose([ToTensor(), IMAGENET])
    with Image.open(tmp_path / "image.png") as late, Image.open(tmp_path / "image.png") as other:
        assert torch.equal(fuse(transform)(late), transform(other))


def test_each_tensor_is_its_own() -> None:
    transform = fuse(Compose([ToTensor(), Normalize([0.5], [0.5])]))
    first, image = transform(picture("L", 8, 8, 0)), picture("L", 8, 8, 0)
    kept = first.clone()
    transform(image).mul_(2)
    assert torch.equal(first, kept)
    assert torch.equal(transform(image), kept)


# What is replaced.


class OwnToTensor(ToTensor):
    pass


class OwnCompose(Compose):
    pass


def hooked() -> Normalize:
    module = Normalize([0.5], [0.5])
    module.register_forward_hook(lambda module, given, made: made + 1)
    return module


def patched() -> RandomCrop:
    module = RandomCrop(3, padding=1)
    module.forward = lambda image: image  # type: ignore[method-assign]
    return module


def test_known_transforms_are_replaced() -> None:
    assert kinds(
        Compose([RandomCrop(4, padding=1), RandomHorizontalFlip(), ToTensor(), IMAGENET, RandomErasing()])
    ) == [
        PaddedCrop,
        RandomHorizontalFlip,
        TensorFromTable,
        RandomErasing,
    ]
    assert kinds(Compose([Compose([ToTensor()]), IMAGENET])) == [FusedCompose, Normalize]


@pytest.mark.parametrize(
    "part",
    [
        OwnToTensor(),
        IMAGENET,
        RandomCrop(3),
        RandomCrop(3, padding=1, fill=1),
        RandomCrop(3, padding=1, fill=(0, 0, 0)),
        RandomCrop(3, padding=1, pad_if_needed=True),
        RandomCrop(3, padding=1, padding_mode="reflect"),
        RandomCrop(3, padding=-1),
        RandomCrop(3, padding=[1, 2, 3]),
        patched(),
        RandomApply([ToTensor()]),
        ColorJitter(0.3),
    ],
    ids=repr,
)
def test_others_are_left(part: Any) -> None:
    transform = Compose([part])
    assert fuse(transform) is transform


@pytest.mark.parametrize(
    "after",
    [
        hooked(),
        Normalize([0.5], [0.5], inplace=True),
        Normalize(torch.tensor([0.5]), [0.5]),
        Normalize([0.5], [float("nan")]),
    ],
)
def test_normalizations_that_are_left(after: Normalize) -> None:
    assert kinds(Compose([ToTensor(), after])) == [TensorFromTable, Normalize]


@pytest.mark.parametrize("transform", [None, str, ToTensor(), OwnCompose([ToTensor()]), Compose([])], ids=repr)
def test_what_is_no_compose_is_left(transform: Any) -> None:
    assert fuse(transform) is transform


def test_a_replacement_prints_as_the_original_and_pickles() -> None:
    transform = Compose([RandomCrop(28, padding=2), ToTensor(), IMAGENET])
    cheaper = fuse(transform)
    assert repr(cheaper) == repr(transform)
    assert cheaper.transforms is transform.transforms
    image = picture("RGB", 28, 28, 0)
    again = pickle.loads(pickle.dumps(cheaper))
    assert outcome(again, image, 3) == outcome(transform, image, 3)


# Data sets.


class Transforms(Dataset[Any]):
    """Items are the kinds of the data set's transforms, and their index."""

    def __init__(self, **transforms: Any) -> None:
        vars(self).update(transforms)

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            raise LookupError(index)
        return {name: type(value) for name, value in vars(self).items()}, index

    def __len__(self) -> int:
        return 4


def test_data_sets_have_their_transforms_back() -> None:
    transform = Compose([ToTensor(), IMAGENET])
    pair = StandardTransform(transform, None)
    inner = Transforms(transform=transform, transforms=pair, target_transform=transform)
    inside = {"transform": FusedCompose, "transforms": StandardTransform, "target_transform": Compose}
    for dataset in (
        inner,
        Subset(inner, [0, 1]),
        BaseDatasetWrapper(inner),
        ConcatDataset([Subset(inner, [0]), inner]),
    ):
        with fused(dataset):
            assert dataset[0][0] == inside
            assert inner.transforms is not pair
            assert repr(inner.transforms) == repr(pair)
        assert (inner.transform, inner.transforms) == (transform, pair)
        with pytest.raises(LookupError), fused(dataset):
            inner[-1]
        assert (inner.transform, inner.transforms) == (transform, pair)


def test_other_attributes_of_these_names_are_left() -> None:
    dataset = Transforms(dataset=np.zeros(3), datasets=np.zeros(3), org_dataset="a name", transform="another")
    with fused(dataset):
        assert dataset[0][0] == {"dataset": np.ndarray, "datasets": np.ndarray, "org_dataset": str, "transform": str}


def test_blocks_within_each_other() -> None:
    transform = Compose([ToTensor(), IMAGENET])
    dataset = Transforms(transform=transform)
    with fused(dataset), fused(dataset):
        assert dataset[0][0] == {"transform": FusedCompose}
    assert dataset.transform is transform


def test_what_stands_there_at_the_time_counts() -> None:
    dataset = grey()
    del dataset.transform.transforms[:2]  # what draws
    dataset.transform.transforms[-1].mean = [0.25]
    with fused(dataset):
        first = dataset[0][0]
    assert torch.equal(first, dataset[0][0])
    dataset.transform.transforms.append(torch.neg)
    with fused(dataset):
        assert torch.equal(dataset[0][0], -first)


def grey(kind: type[Dataset[Any]] = GreyImages) -> Any:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    parts = [RandomCrop(28, padding=2), RandomHorizontalFlip(), ToTensor(), Normalize([0.2860], [0.3530])]
    return kind(images, [0, 1] * 6, ["a", "b"], Compose(parts), None)


def epochs(dataset: Any, config: dict[str, Any] | None = None, **options: Any) -> list[torch.Tensor]:
    loader = build_loader(dataset, {**(config or {}), "kwargs": {"batch_size": 5, **options}}, train=True, seed=3)
    found = []
    for epoch in range(2):
        set_position(loader, epoch)
        found += [batch[0] for batch in loader]
    return found


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"requires_supp": True}, {}),
        ({"dataset_wrapper": {"key": SSKDDatasetWrapper.__name__}}, {}),
        ({}, {"num_workers": 1}),
    ],
    ids=["plain", "supplement", "wrapper", "worker"],
)
def test_batches_are_what_they_were(
    config: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = grey()
    transform = dataset.transform
    cheaper = epochs(dataset, config, **options)
    if "dataset_wrapper" not in config:  # torchdistill's takes the data set's transform for its own
        assert dataset.transform is transform
    monkeypatch.setattr("vkd_plugin.datasets.fused_transforms.fuse", lambda transform: transform)
    expected = epochs(grey(), config)
    assert len(cheaper) == len(expected) == 6
    assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(cheaper, expected, strict=True))


def test_what_a_spawned_worker_gets_is_what_it_was() -> None:
    loader = build_loader(grey(), {"kwargs": {"batch_size": 5}}, train=True, seed=3)
    request = next(iter(loader.batch_sampler))
    _, samples, _ = loader.dataset.__getitems__(request)
    _, again, _ = pickle.loads(pickle.dumps(loader.dataset)).__getitems__(request)
    assert all(torch.equal(a, b) and label == other for (a, label), (b, other) in zip(samples, again, strict=True))


def test_a_loader_takes_the_cheaper_transforms() -> None:
    (batch,) = build_loader(
        Transforms(transform=Compose([ToTensor()])),
        {"kwargs": {"batch_size": 4}, "collate_fn": lambda samples: samples},
        train=False,
        seed=0,
    )
    assert batch == [({"transform": FusedCompose}, index) for index in range(4)]
