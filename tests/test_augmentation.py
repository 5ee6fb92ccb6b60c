"""The ImageNet recipe's augmentation, repeats and mixing: what they draw, and that an address alone decides it."""

import importlib.util
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps
from scipy import stats
from timm.data import create_transform
from timm.data.auto_augment import desaturate, gaussian_blur_rand, solarize
from torch.utils.data import RandomSampler, SequentialSampler
from torchdistill.common.yaml_util import load_yaml_file
from torchvision import transforms

from vkd_plugin.datasets import ImageFolder, MixingCollator, RandomGaussianBlur, RepeatedAugmentSampler, augmentation
from vkd_plugin.datasets.tiny_imagenet import write_tree
from vkd_plugin.engine.loaders import EpochSampler, batches_of, build_loader, set_position
from vkd_plugin.engine.randomness import Repeated, addressed

FILL = Path(__file__).parent / "data" / "parity" / "fill.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    write_tree(folder, classes=3, train=7, val=2)
    return folder


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """The transforms for training and for evaluation that the module's documentation spells out."""
    text = textwrap.dedent(augmentation.__doc__ or "")
    blocks = re.findall(r"::\n\n((?:    .*\n)+)", text)
    names = iter(("train", "val"))
    yaml = "".join(textwrap.dedent(block).replace("transforms:", f"{next(names)}:", 1) for block in blocks)
    file = tmp_path_factory.mktemp("yaml") / "transforms.yaml"
    file.write_text(yaml)
    found = load_yaml_file(str(file))
    return found["train"], found["val"]


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Smooth colours, so that blurring shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


# The parts.


def test_training_transforms_are_the_recipes(documented: tuple[list[Any], list[Any]]) -> None:
    crop, flip, three, jitter, _, normalize = documented[0]
    assert (crop.size, list(crop.scale), crop.interpolation) == ((224, 224), [0.08, 1.0], bicubic())
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3), abs=1e-15)
    assert flip.p == 0.5
    assert three.p is None  # each alike
    assert [type(part).__name__ for part in three.transforms] == ["Grayscale", "RandomSolarize", "RandomGaussianBlur"]
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.7, 1.3),) * 3
    assert jitter.hue is None
    assert (normalize.mean, normalize.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def bicubic() -> Any:
    return transforms.InterpolationMode.BICUBIC


def test_evaluation_is_timms(documented: tuple[list[Any], list[Any]], tree: Path) -> None:
    ours = transforms.Compose(documented[1])
    theirs = create_transform(
        224,
        interpolation="bicubic",
        crop_pct=0.875,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    for image, _ in ImageFolder(tree / "val"):
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("seed", range(5))
def test_the_three_are_timms(documented: tuple[list[Any], list[Any]], seed: int) -> None:
    """timm has the same three for its policy ``3a``."""
    image = picture(seed)
    grey, solarized, blurred = documented[0][2].transforms
    assert grey(image).tobytes() == desaturate(image, 1.0).tobytes()
    assert solarized(image).tobytes() == solarize(image, 128).tobytes()
    with addressed(seed):
        ours = blurred(image)
    with addressed(seed):
        theirs = gaussian_blur_rand(image, 1.0)
    assert ours.tobytes() == theirs.tobytes() != image.tobytes()


def test_exactly_one_of_the_three_each_as_often(documented: tuple[list[Any], list[Any]]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image, three = Image.fromarray(noise), documented[0][2]  # the slightest blur shows
    grey = ImageOps.grayscale(image).convert("RGB").tobytes()
    solarized = ImageOps.solarize(image, 128).tobytes()
    found: Counter[str] = Counter()
    for seed in range(300):
        with addressed(seed):
            result = three(image)
        known = {grey: "grey", solarized: "solarized", image.tobytes(): "unchanged"}
        found[known.get(result.tobytes(), "blurred")] += 1
    assert set(found) == {"grey", "solarized", "blurred"}
    assert stats.chisquare(list(found.values())).pvalue > 0.01


def test_the_radius_of_the_blur_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted:
        def filter(self, kernel: Any) -> float:
            return kernel.radius

    blur: Any = RandomGaussianBlur(0.1, 2.0)
    with addressed(0):
        drawn = [blur(Noted()) for _ in range(500)]
    assert stats.kstest(drawn, stats.uniform(0.1, 1.9).cdf).pvalue > 0.01
    narrow = RandomGaussianBlur(1.0, 1.0)
    assert not ImageChops.difference(narrow(picture()), narrow(picture())).getbbox()
    assert repr(blur) == "RandomGaussianBlur(min_radius=0.1, max_radius=2.0)"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_radius": -1.0}, r"min_radius must lie in \[0, inf\), got -1"),
        ({"min_radius": 3.0}, r"max_radius must lie in \[3, inf\), got 2"),
        ({"max_radius": "2e0"}, "max_radius must be a number, got '2e0'"),
    ],
)
def test_errors_of_the_blur(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomGaussianBlur(**kwargs)


# Addresses.


def drawn(tree: Path, parts: list[Any], epoch: int = 0, seed: int = 0, **options: Any) -> dict[int, list[bytes]]:
    """The augmented images of an epoch, by sample; their labels are their indices."""
    small = transforms.Compose([transforms.RandomResizedCrop(24, interpolation=bicubic()), *parts[1:]])
    dataset = ImageFolder(tree, "train", transform=small)
    dataset.samples = [(path, index) for index, (path, _) in enumerate(dataset.samples)]
    sampler, rank, world_size = options.pop("sampler", RandomSampler), options.pop("rank", 0), options.pop("ranks", 1)
    config = {"sampler": {"class_or_func": sampler}, "kwargs": {"batch_size": 4, **options}}
    loader = build_loader(dataset, config, train=True, seed=seed, rank=rank, world_size=world_size)
    set_position(loader, epoch)
    found: dict[int, list[bytes]] = {}
    for images, indices in batches_of(loader):
        for image, index in zip(images, indices.tolist(), strict=True):
            found.setdefault(index, []).append(image.numpy().tobytes())
    return found


def test_seed_epoch_and_sample_decide_the_augmentation(tree: Path, documented: tuple[list[Any], list[Any]]) -> None:
    parts = documented[0]
    images = drawn(tree, parts)
    assert len(images) == 21
    assert drawn(tree, parts, num_workers=2, batch_size=3) == images
    torch.rand(7)
    np.random.rand(7)  # noqa: NPY002
    assert drawn(tree, parts, sampler=SequentialSampler, batch_size=8) == images
    shares = [drawn(tree, parts, rank=rank, ranks=2) for rank in range(2)]
    assert all(images[index][0] == image for share in shares for index, (image, *_) in share.items())
    for other in (drawn(tree, parts, epoch=1), drawn(tree, parts, seed=1)):
        assert all(images[index] != other[index] for index in images)


def test_repeats_are_augmented_apart(tree: Path, documented: tuple[list[Any], list[Any]]) -> None:
    parts = documented[0]
    found = drawn(tree, parts, sampler=RepeatedAugmentSampler)
    assert [len(versions) for versions in found.values()] == [3] * 7
    assert all(len(set(versions)) == 3 for versions in found.values())
    assert drawn(tree, parts, sampler=RepeatedAugmentSampler, num_workers=2) == found
    plain = drawn(tree, parts)
    assert all(versions[0] == plain[index][0] for index, versions in found.items())


@given(st.lists(st.integers(0, 9), max_size=40))
def test_what_comes_again_is_numbered(order: list[int]) -> None:
    numbered = Repeated.numbered(list(order))
    assert numbered == order  # as indices they are the same
    seen: Counter[int] = Counter()
    for index in numbered:
        assert getattr(index, "before", 0) == seen[index]
        seen[index] += 1


# Repeated augmentation.


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_repeats_come_in_a_row_and_are_dealt_out(n: int, repeats: int, world_size: int, epoch: int) -> None:
    sampler = RepeatedAugmentSampler(range(n), repeats)
    length = n // 256 * 256 or n
    assert len(sampler) == length

    def order(rank: int = 0, world_size: int = 1, first: int = 0) -> list[int]:
        part = EpochSampler(sampler, 5, rank, world_size)
        part.set_epoch(epoch)
        part.first = first
        return list(part)

    whole = order()
    assert len(whole) == length
    assert all(len(set(whole[start : start + repeats])) == 1 for start in range(0, length, repeats))
    assert len(set(whole)) == -(-length // repeats)  # no image comes again after its turn
    assert set(whole) <= set(range(n))
    versions = [(index, getattr(index, "before", 0)) for index in whole]
    assert len(set(versions)) == length
    shares = [order(rank, world_size) for rank in range(world_size)]
    dealt = [index for step in zip(*shares, strict=True) for index in step]
    assert dealt[:length] == whole
    first = length // 2
    assert order(first=first) == whole[first:]
    assert [getattr(index, "before", 0) for index in order(first=first)] == [v for _, v in versions[first:]]


def test_other_epochs_show_other_images() -> None:
    sampler = EpochSampler(RepeatedAugmentSampler(range(512)), seed=0)
    shown = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        shown.append(set(sampler))
    assert all(len(images) == 171 for images in shown)
    assert set().union(*shown) == set(range(512))


@pytest.mark.parametrize("kwargs", [{"repeats": 0}, {"round_to": 0}])
def test_errors_of_the_sampler(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="repeats and round_to must be at least 1"):
        RepeatedAugmentSampler(range(3), **kwargs)


# Mixing.


def load_fill() -> Any:
    spec = importlib.util.spec_from_file_location("parity_fill", FILL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mixed(collate: MixingCollator, seed: int, size: int) -> tuple[float, bool, torch.Tensor, torch.Tensor]:
    """The share of each image itself, whether it was CutMix, images (whose values tell their number), targets."""
    samples = [(torch.full((3, 16, 16), float(i)), 7 * i % collate.mixup.num_classes) for i in range(size)]
    with addressed(seed):
        images, targets = collate(samples)
    share = 1 - images[0].double().mean().item() / (size - 1)
    return share, bool((images[0] != images[0, 0, 0, 0]).any()), images, targets


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 10]))
def test_targets_are_the_recipes(seed: int, size: int) -> None:
    """Mixed with the batch reversed, smoothed to 0.1 / 1000 and 0.9 + 0.1 / 1000."""
    collate = MixingCollator(1000, mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, label_smoothing=0.1)
    share, is_cut, images, targets = mixed(collate, seed, size)
    expected = load_fill().soft_targets([7 * i % 1000 for i in range(size)], 1000, share, 0.1)
    np.testing.assert_allclose(targets.numpy(), expected, atol=2e-6, rtol=0)
    for i, image in enumerate(images):
        values = set(image.unique().tolist())
        if is_cut:
            assert values <= {float(i), float(size - 1 - i)}
        else:
            assert image.mean().item() == pytest.approx(share * i + (1 - share) * (size - 1 - i), abs=1e-4)


def test_mixing_is_drawn_as_in_the_recipe() -> None:
    collate = MixingCollator(10)
    drawn = [mixed(collate, seed, 2)[:2] for seed in range(600)]
    shares = {kind: [share for share, is_cut in drawn if is_cut is kind] for kind in (False, True)}
    assert stats.binomtest(len(shares[True]), 600).pvalue > 0.01  # boxes of no area are few
    assert stats.kstest(shares[False], stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_the_smoothed_target_of_an_image_alone() -> None:
    (_, targets) = MixingCollator(1000)([(torch.zeros(3, 8, 8), 3)])  # an odd one is not mixed
    assert targets[0, 3].item() == pytest.approx(0.9 + 0.1 / 1000, abs=1e-7)
    assert targets[0, 4].item() == pytest.approx(0.1 / 1000, abs=1e-9)
