"""Images per second that ImageNet's training augmentation gives on one core: torchvision's, timm's, and this package's.

    python -m benchmarks.loader [--rounds 5] [--images 256] [--batch 64] [--workers 0] [--json FILE]

A random crop resized to 224 x 224 (bicubic), a flip, one of grey, solarised and blurred, brightness, contrast and
saturation by up to 30 %, normalised float32 batches: the augmentation of ``configs/ilsvrc2012``. The candidates take
turns, each going through all images once a round. With workers the clock counts; each should have a core. A batch of 64
is too large for glibc to take from memory that is at hand, so that all candidates get fresh pages for it, as they would
for batches of any larger size; below 55, who gets them is a matter of luck.

The files are made here: sections of the two photographs that scikit-learn ships, at sizes and proportions that are
common in ImageNet, with a sensor's noise so that they come out at about 110 KB, which is what ImageNet's are on
average; JPEG, 4:2:0, quality 94 to 98.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from benchmarks.measuring import Taken, in_turn, save, setting, show, taken
from vkd_plugin.datasets import FastCompose, ImageFolder, RandomGaussianBlur
from vkd_plugin.datasets.fast_compose import applied
from vkd_plugin.datasets.fused_transforms import TensorFromTable
from vkd_plugin.datasets.image_folder import rgb_image
from vkd_plugin.engine.loaders import build_loader

SIZES = {(500, 375): 0.55, (375, 500): 0.15, (500, 333): 0.12, (333, 500): 0.04, (400, 300): 0.06, (640, 480): 0.08}
"""Width and height -> share of the images."""

NOISE = 5.0
"""Standard deviation, in grey levels."""

QUALITY = (94, 99)
"""From the first to one below the second."""

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TORCHVISION, TIMM, TIMM_UINT8 = "torchvision, DataLoader", "timm", "timm, prefetcher"
EXACT, FAST, FAST_PLAIN = "run.py, Compose", "run.py, FastCompose", "FastCompose, DataLoader"
RIVALS = (TORCHVISION, TIMM, TIMM_UINT8)

Steps = list[tuple[str, Callable[[Any], Any]]]


def write_photographs(folder: Path, count: int) -> float:
    """Writes ``count`` JPEGs below ``folder``, in two class folders, and says how many KB they have on average."""
    draw = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    sizes = list(SIZES)
    written = []
    for index in range(count):
        photograph = photographs[index % 2]
        width, height = sizes[draw.choice(len(sizes), p=list(SIZES.values()))]
        scale = draw.uniform(0.7, 1.0) * min(photograph.width / width, photograph.height / height)
        x = draw.uniform(0, photograph.width - scale * width)
        y = draw.uniform(0, photograph.height - scale * height)
        section = (x, y, x + scale * width, y + scale * height)
        pixels = np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, section), np.float64)
        pixels = np.clip(pixels + draw.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8)
        file = folder / f"class{index % 2}" / f"{index:06}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file, quality=int(draw.integers(*QUALITY)), subsampling="4:2:0")
        written.append(file.stat().st_size)
    return sum(written) / count / 1024


def augmentation() -> list[Any]:
    """The transforms of ``configs/ilsvrc2012``, for training."""
    bicubic = transforms.InterpolationMode.BICUBIC
    one_of_three = [
        transforms.Grayscale(3),
        transforms.RandomSolarize(128, 1.0),
        RandomGaussianBlur(0.1, 2.0),
    ]
    return [
        transforms.RandomResizedCrop(224, (0.08, 1.0), (0.75, 4 / 3), bicubic),
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomChoice(one_of_three),
        transforms.ColorJitter(0.3, 0.3, 0.3),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]


def candidates(folder: Path, batch: int, workers: int) -> dict[str, Iterable[Any]]:
    """Loaders of the images in ``folder``, by name."""

    def plain(compose: type[transforms.Compose]) -> Iterable[Any]:
        dataset = torchvision.datasets.ImageFolder(str(folder), compose(augmentation()))
        return DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=workers)

    def timms(prefetcher: bool) -> Iterable[Any]:
        return timm.data.create_loader(
            timm.data.create_dataset("", str(folder), is_training=True),
            224,
            batch,
            is_training=True,
            auto_augment="3a",
            color_jitter=0.3,
            interpolation="bicubic",
            num_workers=workers,
            persistent_workers=False,
            use_prefetcher=prefetcher,
            device=torch.device("cpu"),
        )

    def ours(compose: type[transforms.Compose]) -> Iterable[Any]:
        dataset = ImageFolder(folder, transform=compose(augmentation()))
        options = {"batch_size": batch, "drop_last": True, "num_workers": workers, "persistent_workers": False}
        return build_loader(dataset, {"kwargs": options}, train=True, seed=0)

    return {
        TORCHVISION: plain(transforms.Compose),
        TIMM: timms(False),
        TIMM_UINT8: timms(True),
        EXACT: ours(transforms.Compose),
        FAST: ours(FastCompose),
        FAST_PLAIN: plain(FastCompose),
    }


def run_through(loader: Iterable[Any]) -> None:
    shape = {(tuple(batch[0].shape[1:]), batch[0].dtype) for batch in loader}
    assert shape == {((3, 224, 224), torch.float32)}, shape


def stages() -> dict[str, Steps]:
    """What is done to an image, one thing after the other, in the usual way and in the cheaper."""
    *parts, to_tensor, normalize = augmentation()
    names = ["crop, resize", "flip", "one of three", "jitter"]
    usual = list(zip(names, parts, strict=True))
    table = TensorFromTable([to_tensor, normalize])
    cheaper = [(name, lambda image, part=part: applied(part, image)) for name, part in usual]
    decode = "read, decode"
    return {
        TORCHVISION: [(decode, default_loader), *usual, ("tensor", to_tensor), ("normalise", normalize)],
        FAST: [(decode, rgb_image), *cheaper, ("tensor, normalise", lambda image: applied(table, image))],
    }


def stage_times(steps: Steps, files: list[Path], rounds: int) -> dict[str, Taken]:
    """Median time of each stage for one image, and that of collating."""
    found: dict[str, list[Taken]] = {}
    for index in range(rounds):
        torch.manual_seed(index)
        images: list[Any] = [str(file) for file in files]
        for name, step in steps:
            made: list[Any] = []
            once = taken(lambda step=step, images=images, made=made: made.extend(map(step, images)))
            found.setdefault(name, []).append(once)
            images = made
        found.setdefault("collate", []).append(taken(lambda images=images: default_collate(images)))
    return {name: Taken(*(np.median(times, axis=0) / len(files)).tolist()) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.images % args.batch or args.rounds < 1:
        parser.error("--images must be a multiple of --batch, and --rounds at least 1")

    torch.set_num_threads(1)
    about = setting("loader", args)
    show(about)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = write_photographs(folder, args.images)
        print(f"{args.images} JPEGs of {kilobytes:.0f} KB on average")
        loaders = candidates(folder, args.batch, args.workers)
        calls = {name: lambda loader=loader: run_through(loader) for name, loader in loaders.items()}
        for call in calls.values():
            call()  # files into the page cache, and what is set up at first use
        times = in_turn(calls, args.rounds)
        files = sorted(folder.rglob("*.jpg"))[:128]
        by_stage = {name: stage_times(steps, files, args.rounds) for name, steps in stages().items()}

    def speed(name: str) -> float:
        # With workers the work is done in other processes.
        return args.images / (times[name].wall if args.workers else times[name].cpu)

    best = max(map(speed, RIVALS))
    results = {name: {"images_per_s": speed(name), "to_best_rival": speed(name) / best} for name in times}
    clock = f"by the clock, {args.workers} workers" if args.workers else "of the processor, one core"
    print(f"\n{'':26}{'images/s':>10}{'to best rival':>15}   ({clock})")
    for name, figures in results.items():
        print(f"{name:26}{figures['images_per_s']:10.1f}{figures['to_best_rival']:15.2f}")
    print("\nms an image, of the processor")
    for name, stage in by_stage.items():
        print(f"{name}: " + ", ".join(f"{part} {1e3 * once.cpu:.2f}" for part, once in stage.items()))
        print(f"{'':4}in all {1e3 * sum(once.cpu for once in stage.values()):.2f}")
    milliseconds = {name: {part: 1e3 * once.cpu for part, once in stage.items()} for name, stage in by_stage.items()}
    save(args.json, {**about, "kilobytes": kilobytes}, {"loaders": results, "stages": milliseconds})


if __name__ == "__main__":
    main()
