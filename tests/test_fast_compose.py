"""The cheaper Compose: torchvision's draws always, its bits where nothing is resampled, its images otherwise."""

import pickle
import random
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import stats
from torchdistill.common.yaml_util import load_yaml_file
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Grayscale,
    InterpolationMode,
    Normalize,
    Pad,
    RandomChoice,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    Resize,
    ToTensor,
)

from vkd_plugin.datasets import FastCompose, ImageFolder, RandomGaussianBlur, fast_compose
from vkd_plugin.datasets.fast_compose import blurred
from vkd_plugin.datasets.tiny_imagenet import write_tree
from vkd_plugin.engine.loaders import build_loader

SIZE = 24
BICUBIC = InterpolationMode.BICUBIC
WHOLE = RandomResizedCrop(SIZE, scale=(1, 1), ratio=(1, 1), interpolation=BICUBIC)
"""Of an image of that size: nothing is cut off, nothing resampled."""
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def noise(seed: int, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    values[: size[1] // 4] = [[[0, 0, 0]], [[255, 255, 255]], [[17, 17, 17]]][seed % 3]
    return Image.fromarray(values).convert(mode)


def outcome(transform: Any, image: Any, seed: int) -> tuple[Any, ...]:
    """What comes of an image, and the generators' states afterwards; an error is its type and message."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        made = transform(image)
    except Exception as error:
        made = (type(error), str(error))
    if isinstance(made, torch.Tensor):
        made = (made.dtype, made.shape, made.is_contiguous(), made.numpy().tobytes())
    elif isinstance(made, Image.Image):
        made = (made.mode, made.size, made.tobytes())
    return made, random.getstate(), torch.get_rng_state().tolist()


def recipe(size: int = SIZE) -> list[Any]:
    three = [Grayscale(3), RandomSolarize(128, 1.0), RandomGaussianBlur(0.1, 2.0)]
    return [
        RandomResizedCrop(size, interpolation=BICUBIC),
        RandomHorizontalFlip(),
        RandomChoice(three),
        ColorJitter(0.3, 0.3, 0.3),
        ToTensor(),
        NORMALIZE,
    ]


# Where nothing is resampled.


exact = st.one_of(
    st.builds(RandomHorizontalFlip, st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(Grayscale, st.sampled_from([3, 3, 3, 1])),
    st.builds(RandomGrayscale, st.sampled_from([0.1, 0.5])),
    st.builds(RandomSolarize, st.sampled_from([0, 100, 128, 127.5, 255, 300]), st.sampled_from([0.5, 1.0])),
    st.builds(ColorJitter, *[st.sampled_from([0, 0.3, 1.0, (0.5, 0.5), (1.2, 3.0)])] * 3),
    st.builds(ColorJitter, hue=st.just(0.2)),
    st.just(Pad(1)),
)
choices = st.builds(RandomChoice, st.lists(exact, min_size=2, max_size=2), st.sampled_from([None, [0.2, 0.8]]))
endings = st.sampled_from([[], [ToTensor()], [ToTensor(), NORMALIZE], [ToTensor(), NORMALIZE, RandomErasing(1.0)]])


@settings(max_examples=150, deadline=None)
@given(st.lists(exact | choices, max_size=4), endings, st.integers(0, 2**31))
def test_equal_to_the_last_bit_where_nothing_is_resampled(parts: list[Any], ending: list[Any], seed: int) -> None:
    transforms = [WHOLE, *parts, *ending]
    image = noise(seed)
    assert outcome(FastCompose(transforms), image, seed) == outcome(Compose(transforms), image, seed)
    assert image.tobytes() == noise(seed).tobytes()


class OwnCrop(RandomResizedCrop):
    pass


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
@pytest.mark.parametrize(
    "begin",
    [
        [Resize(18), ToTensor()],
        [OwnCrop(16, interpolation=BICUBIC), RandomHorizontalFlip(), ColorJitter(0.3), ToTensor()],
        [RandomResizedCrop(16, interpolation=InterpolationMode.NEAREST), Grayscale(3), ToTensor()],
    ],
    ids=["no crop", "subclass", "nearest"],
)
def test_what_is_not_known_goes_the_usual_way(begin: list[Any], mode: str) -> None:
    image = noise(1, mode, (40, 30))
    assert outcome(FastCompose(begin), image, 3) == outcome(Compose(begin), image, 3)


@pytest.mark.parametrize("image", [noise(0, "L"), torch.zeros(3, SIZE, SIZE), "a path"], ids=["grey", "tensor", "text"])
def test_other_images_go_the_usual_way(image: Any) -> None:
    assert outcome(FastCompose(recipe()), image, 3) == outcome(Compose(recipe()), image, 3)


def test_statistics_that_do_not_fit_fail_as_usual() -> None:
    transforms = [WHOLE, ToTensor(), Normalize([0.5, 0.5], [1.0, 1.0])]
    (kind, text), *_ = outcome(FastCompose(transforms), noise(0), 0)
    assert issubclass(kind, RuntimeError)
    assert (kind, text) == outcome(Compose(transforms), noise(0), 0)[0]


def test_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        made = outcome(FastCompose([WHOLE, ToTensor(), NORMALIZE]), noise(0), 0)
        assert made == outcome(Compose([WHOLE, ToTensor(), NORMALIZE]), noise(0), 0)
    finally:
        torch.set_default_dtype(torch.float32)


# Blurring and resizing.


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 12),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.integers(0, 100),
)
def test_the_blur_is_pillows(radius: float, size: tuple[int, int], seed: int) -> None:
    """Pillow rounds after each of six averages, by half a grey level at most; averaging makes none of it larger."""
    image = noise(seed, size=size)
    values = np.asarray(image, np.float32).transpose(2, 0, 1)
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32).transpose(2, 0, 1)
    slack = 0.01  # of its weights, which are multiples of 2^-24, and of float32 sums
    assert np.abs(blurred(values, radius) - theirs).max() <= 6 * 0.5 + slack


@pytest.mark.parametrize("radius", [0.1, 0.7, 1.3, 1.5, 2.0, 5.0])
def test_the_radius_is_a_standard_deviation(radius: float) -> None:
    point = np.zeros((1, 61, 61), np.float32)
    point[0, 30, 30] = 1
    response = blurred(point, radius)[0].astype(np.float64)
    away = np.arange(61) - 30
    # Six boxes, each a sum of at most 13 terms with two weights, in float32.
    rounding = 6 * (13 + 2) * 2**-24
    assert response.sum() == pytest.approx(1, abs=rounding)
    for axis in (0, 1):
        # Boxes of fractional width are made so that their variances are right (Gwosdek et al., section 2).
        assert response.sum(axis) @ away**2 == pytest.approx(radius**2, rel=rounding)
    assert np.allclose(response, response.T, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(5, 80), st.integers(5, 80)),
    st.sampled_from([BICUBIC, InterpolationMode.BILINEAR]),
)
def test_resizing_is_pillows(seed: int, size: tuple[int, int], filter: InterpolationMode) -> None:
    """Both round after each of two directions, in an order that may differ.

    A rounding of half a grey level is carried on by weights whose absolute values come to 1.5 at most (bicubic, between
    two pixels: 1.25), so either result is within 0.75 + 0.5 of the exact one; the weights' own rounding (to 2^-14 of
    the greatest at worst, some tens of them, times 255) takes less than another 0.5. Grey levels from 64 to 191 stay
    within 0 and 255 whatever the weights make of them, so that nothing is cut off.
    """
    image = Image.fromarray(64 + np.asarray(noise(seed, size=size)) // 2)
    crop = [RandomResizedCrop((20, 30), interpolation=filter)]
    (_, shape, ours), *ours_drew = outcome(FastCompose(crop), image, seed)
    (_, their_shape, theirs), *they_drew = outcome(Compose(crop), image, seed)
    assert shape == their_shape == (30, 20)
    assert ours_drew == they_drew
    difference = np.frombuffer(ours, np.uint8).astype(int) - np.frombuffer(theirs, np.uint8)
    assert np.abs(difference).max() <= 2 * (0.75 + 0.5 + 0.5)
    assert np.abs(difference).mean() < 0.5


# The whole recipe.


def picture() -> Image.Image:
    """Red grows from left to right, green from top to bottom, blue is a texture: it can be told what was cut out."""
    y, x = np.mgrid[0:96, 0:128]
    blue = 128 + 60 * np.sin(x / 5) * np.cos(y / 7)
    return Image.fromarray(np.stack([30 + 1.5 * x, 20 + 2 * y, blue], -1).astype(np.uint8))


def test_the_same_seed_gives_the_same_image() -> None:
    """The crop, the flip, the one of three and the colours; or else whole images would be far apart."""
    image, parts = picture(), recipe()
    scale = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # to grey levels
    for seed in range(60):
        made = []
        for transform in (FastCompose(parts), Compose(parts)):
            random.seed(seed)
            torch.manual_seed(seed)
            made.append((transform(image), random.getstate(), torch.get_rng_state().tolist()))
        (ours, *ours_drew), (theirs, *they_drew) = made
        assert ours_drew == they_drew
        assert ours.dtype == theirs.dtype == torch.float32
        difference = ((ours - theirs) * scale).abs()
        # Resizing and blur differ by a grey level or two, solarising around 128 by as much; contrast, brightness
        # and saturation take that times 1.3 at most each, and their rounding down may turn any of it into one more.
        assert difference.max() <= 3 * 1.3**3 + 3
        assert difference.mean() < 1


def described(transform: Any, seeds: range) -> dict[str, np.ndarray]:
    """Of so many augmented versions of :func:`picture`: what is shown and how, each version a number."""
    transform_to_image = Compose([transform])
    found: dict[str, list[float]] = {}
    for seed in seeds:
        random.seed(seed)
        torch.manual_seed(seed)
        values = transform_to_image(picture()).numpy()
        numbers: dict[str, float] = {}
        for name, channel in zip("rgb", values, strict=True):
            numbers[f"mean {name}"], numbers[f"deviation {name}"] = channel.mean(), channel.std()
            for share in (10, 50, 90):
                numbers[f"{share} % {name}"] = np.percentile(channel, share)
        for name, value in numbers.items():
            found.setdefault(name, []).append(float(value))
    return {name: np.array(values) for name, values in found.items()}


def test_other_seeds_give_images_of_the_same_distribution() -> None:
    """Moments and quantiles of each channel, by Kolmogorov and Smirnov; 15 tests, at 1 % in all."""
    ours, theirs = described(FastCompose(recipe()), range(250)), described(Compose(recipe()), range(1000, 1250))
    assert len(ours) == 15
    for name in ours:
        assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 0.01 / 15, name


def test_crops_and_flips_have_the_same_distribution() -> None:
    """Read off the image: where it begins and ends, and which way red grows."""

    def geometry(compose: type[Compose], seeds: range) -> np.ndarray:
        transform = compose([*recipe()[:2], ToTensor()])
        rows = []
        for seed in seeds:
            torch.manual_seed(seed)
            red, green, _ = (255 * transform(picture())).numpy()
            left, right = (red[:, 0].mean() - 30) / 1.5, (red[:, -1].mean() - 30) / 1.5
            top, bottom = (green[0].mean() - 20) / 2, (green[-1].mean() - 20) / 2
            width, height = abs(right - left), bottom - top
            rows.append([width * height, width / height, min(left, right), top, right < left])
        return np.array(rows)

    ours, theirs = geometry(FastCompose, range(300)), geometry(Compose, range(1000, 1300))
    for place in range(4):
        assert stats.ks_2samp(ours[:, place], theirs[:, place]).pvalue > 0.01 / 4
    assert stats.binomtest(int(ours[:, 4].sum()), 300, 0.5).pvalue > 0.01


def test_each_of_the_three_as_often() -> None:
    found: Counter[str] = Counter()
    three = recipe()[2]
    names = {id(part): type(part).__name__ for part in three.transforms}
    image = noise(1)
    alone = {}
    for part in three.transforms[:2]:
        alone[Compose([WHOLE, part])(image).tobytes()] = names[id(part)]
    for seed in range(300):
        random.seed(seed)
        found[alone.get(FastCompose([WHOLE, three])(image).tobytes(), "blurred")] += 1
    assert set(found) == {"Grayscale", "RandomSolarize", "blurred"}
    assert stats.chisquare(list(found.values())).pvalue > 0.01


# In use.


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    image = noise(0, size=(500, 375))
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append([outcome(FastCompose(recipe(224)), image, seed) for seed in range(6)])
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1] == made[2]


def test_workers_do_not_matter_nor_pickling(tmp_path: Path) -> None:
    write_tree(tmp_path, classes=2, train=3, val=1)  # with a grey image among them
    batches = []
    for options in ({}, {"num_workers": 1}):
        dataset = pickle.loads(pickle.dumps(ImageFolder(tmp_path, "train", transform=FastCompose(recipe()))))
        loader = build_loader(dataset, {"kwargs": {"batch_size": 2, **options}}, train=True, seed=0)
        batches.append([images for images, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_the_documented_yaml_is_loaded_by_torchdistill(tmp_path: Path) -> None:
    text = (fast_compose.__doc__ or "").split("::\n\n")[1].split("\n\nThe same")[0]
    (tmp_path / "transform.yaml").write_text(textwrap.dedent(text))
    transform = load_yaml_file(str(tmp_path / "transform.yaml"))["transform"]
    assert type(transform) is FastCompose
    assert repr(transform).startswith("FastCompose(\n    RandomResizedCrop(")
    assert transform(picture()).shape == (3, 224, 224)
