"""Data in ImageNet's layout: found or refused with the right folder, guarded against damaged files while training."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from imagenet_helper import truncate
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchdistill.datasets.registry import DATASET_DICT, TRANSFORM_DICT
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from vkd_plugin.cli import main
from vkd_plugin.datasets import ImageFolder, RandomGaussianBlur
from vkd_plugin.datasets.tiny_imagenet import main as make_tree
from vkd_plugin.datasets.tiny_imagenet import write_tree
from vkd_plugin.engine.loaders import (
    Position,
)
from vkd_plugin.engine.train import Trainer
from vkd_plugin.errors import BadValue, UserError

START = Position()


# The tree.


def test_the_tree_holds_what_imagenet_does(sound: Path) -> None:
    for split, count in (("train", 8), ("val", 2)):
        files = sorted(sound.glob(f"{split}/*/*.JPEG"))
        assert len(files) == 3 * count
        images = [Image.open(file) for file in files]
        modes = Counter(image.mode for image in images)
        assert (modes["L"], modes["CMYK"]) == (1, 1)
        assert [image.getexif().get(0x0112) for image in images].count(6) == 1
        assert len({image.size for image in images}) > 2
    assert all(re.fullmatch(r"n\d{8}", folder.name) for folder in (sound / "train").iterdir())


def test_the_tree_has_the_same_bytes_for_a_seed(sound: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "again", classes=3, train=8, val=2)
    write_tree(tmp_path / "other", classes=3, train=8, val=2, seed=1)
    for file in sound.rglob("*.JPEG"):
        place = file.relative_to(sound)
        assert (
            file.read_bytes() == (tmp_path / "again" / place).read_bytes() != (tmp_path / "other" / place).read_bytes()
        )


def test_the_tree_can_be_learned(tmp_path: Path) -> None:
    write_tree(tmp_path, classes=6, train=12, val=6)
    sides = []
    for split in ("train", "val"):
        folder = ImageFolder(tmp_path, split, transform=lambda image: np.asarray(image.resize((8, 8))).ravel() / 255)
        sides.append(([image for image, _ in folder], folder.targets))
    assert LogisticRegression(max_iter=300).fit(*sides[0]).score(*sides[1]) > 0.6  # chance: 1 / 6


def test_the_tool_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "data"
    assert make_tree([str(target), "--classes", "2", "--train", "1", "--val", "1"]) == 0
    assert capsys.readouterr().out == f"{target}: 2 classes, 2 training and 2 validation images\n"
    assert make_tree([str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target}: not empty; give a folder that is, or does not exist yet\n"
    assert make_tree(["/dev/null/data"]) == 2
    assert capsys.readouterr().err == "error: /dev/null/data: cannot write: Not a directory\n"
    with pytest.raises(SystemExit, match="2"):
        make_tree([str(tmp_path / "none"), "--classes", "0"])
    assert not (tmp_path / "none").exists()


# Reading.


def test_it_reads_as_torchvision_does(sound: Path) -> None:
    ours, theirs = ImageFolder(sound, "train", num_classes=3), TorchvisionImageFolder(str(sound / "train"))
    assert ours.classes == theirs.classes
    assert ours.class_to_idx == theirs.class_to_idx
    assert ours.samples == theirs.samples
    assert ours.targets == theirs.targets
    for (image, label), (expected, target) in zip(ours, theirs, strict=True):
        assert (image.mode, image.size, image.tobytes()) == ("RGB", expected.size, expected.tobytes())
        assert label == target
    assert ImageFolder(sound / "train").samples == ours.samples
    shaped = ImageFolder(sound, "val", transform=lambda image: image.size, target_transform=str)
    assert shaped[-1] == (ours.loader(shaped.samples[-1][0]).size, "2")


def test_a_palette_becomes_rgb_and_exif_turns_nothing(tree: Path) -> None:
    folder = tree / "train" / "n90000000"
    Image.open(folder / "n90000000_3.JPEG").convert("P").save(folder / "a_palette.png")
    dataset = ImageFolder(tree, "train")
    assert dataset.samples[0][0].endswith("a_palette.png")
    assert dataset[0][0].mode == "RGB"
    turned = next(i for i, (path, _) in enumerate(dataset.samples) if Image.open(path).getexif().get(0x0112) == 6)
    assert dataset[turned][0].size == Image.open(dataset.samples[turned][0]).size


def test_registered_beside_torchvisions() -> None:
    assert DATASET_DICT["CheckedImageFolder"] is ImageFolder
    assert DATASET_DICT["ImageFolder"] is TorchvisionImageFolder
    assert TRANSFORM_DICT["RandomGaussianBlur"] is RandomGaussianBlur


# What is refused.


def empty_class(tree: Path) -> None:
    (tree / "train" / "n90000001" / "empty").mkdir()
    for file in (tree / "train" / "n90000001").glob("*.JPEG"):
        file.rename(file.with_suffix(".txt"))


def flatten(tree: Path) -> None:
    for file in list((tree / "val").rglob("*.JPEG")):
        file.rename(tree / "val" / file.name)
    for folder in (tree / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()


def archives(tree: Path) -> None:
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    for number in range(3):
        (tree / "train" / f"n0000000{number}.tar").write_bytes(b"")


def remove(place: str) -> Callable[[Path], None]:
    return lambda tree: shutil.rmtree(tree / place)


def rename(place: str, name: str) -> Callable[[Path], None]:
    return lambda tree: (tree / place).rename((tree / place).with_name(name)) and None


def kaggle(tree: Path) -> None:
    (tree / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    for split in ("train", "val"):
        (tree / split).rename(tree / "ILSVRC/Data/CLS-LOC" / split)


def nothing(tree: Path) -> None:
    pass


# What was done to the tree, the folder below it that is given as root, other arguments, what is said ({} is the tree).
REFUSED: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any], str]] = {
    "no such root": (nothing, "../imagnet", {}, "nothing is at '{up}/imagnet' (did you mean '{}'?)"),
    "no such root, deep": (nothing, "trian/x", {}, "nothing is at '{}/trian/x' (did you mean '{}/train'?)"),
    "nothing near": (nothing, "zzzz", {}, "nothing is at '{}/zzzz'"),
    "a file": (nothing, "train/n90000000/n90000000_3.JPEG", {}, "_3.JPEG' is a file, not a folder"),
    "no such split": (nothing, "", {"split": "trian"}, "'{}' has no folder 'trian' (did you mean 'train'?)"),
    "train is missing": (remove("train"), "", {"split": "train"}, "'{}' has no folder 'train' (choose from val)"),
    "val is missing": (remove("val"), "", {"split": "val"}, "'{}' has no folder 'val' (choose from train)"),
    "split twice": (nothing, "train", {"split": "train"}, "'{}/train' has no folder 'train' (did you mean '{}'?)"),
    "the other split": (nothing, "train", {"split": "val"}, "'{}/train' has no folder 'val' (did you mean '{}'?)"),
    "split, too high": (nothing, "..", {"split": "val"}, "'{up}' has no folder 'val' (did you mean '{}'?)"),
    "as unpacked": (kaggle, "", {"split": "val"}, "(did you mean '{}/ILSVRC/Data/CLS-LOC'?)"),
    "too high": (nothing, "", {}, "holds 'train', 'val', not classes (did you mean '{}/train' or '{}/val'?)"),
    "much too high": (
        nothing, "..", {"num_classes": 3},
        "has 1 class folder, num_classes is 3 (did you mean '{}/train' or '{}/val'?)",
    ),
    "too low": (
        nothing, "train/n90000000", {},
        "holds images, no class folders; is it a class folder itself? Did you mean '{}/train'?",
    ),
    "split is a class": (nothing, "train", {"split": "n90000001"}, "Did you mean '{}/train'?"),
    "not sorted": (flatten, "val", {}, "'{}/val' holds 6 images and no class folders"),
    "not unpacked": (archives, "", {"split": "train"}, "holds 3 archives and no class folders; unpack each"),
    "nothing in it": (lambda tree: (tree / "empty").mkdir(), "empty", {}, "'{}/empty' holds no class folders"),
    "an empty class": (empty_class, "train", {}, "has 1 class folder without an image: 'n90000001'"),
    "too many": (nothing, "train", {"num_classes": 2}, "'{}/train' has 3 class folders, num_classes is 2"),
    "one missing in val": (
        remove("val/n90000001"), "", {"split": "val", "num_classes": 3},
        "2 class folders, num_classes is 3 (compared with '{}/train', missing: 'n90000001')",
    ),
    "others in val": (
        rename("val/n90000001", "n90000009"), "", {"split": "val", "num_classes": 3},
        "different classes (compared with '{}/train', missing: 'n90000001'; too many: 'n90000009')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tree: Path) -> None:
    harm, root, kwargs, message = REFUSED[case]
    harm(tree)
    given = f"{tree}/{root}" if root else str(tree)
    with pytest.raises(BadValue) as caught:
        ImageFolder(given, **kwargs)
    assert message.replace("{}", str(tree)).replace("{up}", str(tree.parent)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.value == given


def test_on_error_is_one_of_two(sound: Path) -> None:
    with pytest.raises(ValueError, match=r"no on_error 'ignore' \(choose from skip, stop\)"):
        ImageFolder(sound, "train", on_error="ignore")


def imagenet_folders(folder: Path, leave_out: str = "") -> Path:
    from timm.data import ImageNetInfo

    for name in ImageNetInfo("imagenet-1k").label_names():
        if name != leave_out:
            (folder / name).mkdir(parents=True)
    return folder


def test_a_missing_class_of_imagenet_is_named(tmp_path: Path) -> None:
    folder = imagenet_folders(tmp_path / "train", leave_out="n02123045")
    said = r"has 999 class folders, num_classes is 1000 \(compared with ImageNet-1k, missing: 'n02123045'\)"
    with pytest.raises(BadValue, match=said):
        ImageFolder(folder, num_classes=1000)
    (folder / "n02123045").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    with pytest.raises(BadValue, match=r"has 1001 class folders.*too many: '\.ipynb_checkpoints'"):
        ImageFolder(folder, num_classes=1000)
    (folder / ".ipynb_checkpoints").rmdir()
    with pytest.raises(BadValue, match=r"has 1000 class folders without an image: 'n01440764', .* and 997 more"):
        ImageFolder(folder, num_classes=1000)


# Through run.py.

EXPERIMENT = """
dependencies: ['vkd_plugin']
datasets:
  &train tiny/train: !import_call
    key: 'vkd_plugin.datasets.ImageFolder'
    init:
      kwargs:
        root: &root '${TINY_IMAGENET}'
        split: 'train'
        num_classes: 3
        on_error: 'stop'
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call
                  key: 'torchvision.transforms.RandomResizedCrop'
                  init: {kwargs: {size: 64, scale: [0.08, 1.0], interpolation: 3}}
                - !import_call {key: 'torchvision.transforms.RandomHorizontalFlip', init: }
                - !import_call {key: 'vkd_plugin.datasets.RandomGaussianBlur', init: }
                - !import_call {key: 'torchvision.transforms.ToTensor', init: }
  &val tiny/val: !import_call
    key: 'vkd_plugin.datasets.ImageFolder'
    init:
      kwargs:
        root: *root
        split: 'val'
        num_classes: 3
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.Resize', init: {kwargs: {size: 73, interpolation: 3}}}
                - !import_call {key: 'torchvision.transforms.CenterCrop', init: {kwargs: {size: 64}}}
                - !import_call {key: 'torchvision.transforms.ToTensor', init: }
models:
  model:
    key: 'timm_model'
    kwargs: {name: 'test_resnet', num_classes: 3}
train:
  num_epochs: 1
  train_data_loader:
    dataset_id: *train
    sampler:
      class_or_func: !import_get {key: 'vkd_plugin.datasets.RepeatedAugmentSampler'}
      kwargs: {repeats: 1}
    collate_fn: !import_call {key: 'vkd_plugin.datasets.MixingCollator', init: {kwargs: {num_classes: 3}}}
    kwargs: {batch_size: 8, num_workers: 0}
  val_data_loader: &evaluation
    dataset_id: *val
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}, kwargs: }
    kwargs: {batch_size: 6}
  model: {forward_proc: 'forward_batch_only'}
  optimizer: {key: 'AdamW', kwargs: {lr: 1.0e-3}}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        ce:
          criterion: {key: 'SoftTargetCrossEntropy', kwargs: {}}
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input: {is_from_teacher: False, module_path: '.', io: 'output'}
              target: {uses_label: True}
          weight: 1.0
test:
  test_data_loader: *evaluation
"""


@pytest.fixture
def run(tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Trains with ``--set`` arguments; the exit code, stderr, and the figures that do not depend on a clock."""
    monkeypatch.chdir(tree.parent)
    monkeypatch.setenv("TINY_IMAGENET", str(tree))
    (tree.parent / "tiny.yaml").write_text(EXPERIMENT)

    def start(*overrides: str, flags: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
        sets = [argument for override in overrides for argument in ("--set", override)]
        code = main(["--config", "tiny.yaml", "--output", "run", "--device", "cpu", *sets, *flags])
        file = Path("run/metrics.jsonl")
        record = json.loads(file.read_text()) if file.exists() and file.read_text() else {}
        return code, capfd.readouterr().err, {k: record[k] for k in FIGURES if k in record}

    return start


FIGURES = ("loss", "val/loss", "unreadable_images")
WORKERS = "train.train_data_loader.kwargs.num_workers=2"
SKIP = "datasets.tiny/train.init.kwargs.on_error=skip"


def test_a_run_on_the_tree(run: Callable[..., Any]) -> None:
    code, _, figures = run()
    assert code == 0
    assert set(figures) == {"loss", "val/loss"}
    assert run(WORKERS)[::2] == (0, figures)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_ends_a_run_in_one_line(workers: int, run: Callable[..., Any], tree: Path) -> None:
    path = truncate(tree / "train" / "n90000001" / "n90000001_4.JPEG")
    code, err, _ = run(*[WORKERS] * (workers > 0))
    assert code == 2
    assert [line for line in err.splitlines() if "error" in line] == [err.splitlines()[-1]]
    assert re.match(rf"error: {path}: cannot be read as an image: image file is truncated", err.splitlines()[-1])
    assert "Traceback" not in err


def test_a_truncated_image_is_skipped_and_counted(run: Callable[..., Any], tree: Path) -> None:
    truncate(tree / "train" / "n90000001" / "n90000001_4.JPEG")
    path = truncate(tree / "train" / "n90000000" / "n90000000_0.JPEG")  # the sample that is tried before training
    code, err, figures = run(SKIP)
    assert code == 0
    assert figures["unreadable_images"] == 2
    assert len(re.findall(rf"{path}: cannot be read as an image: .*_1.JPEG takes its place", err)) > 0
    assert "n90000001_4.JPEG: cannot be read" in Path("run/log.txt").read_text()
    assert run(SKIP, WORKERS)[::2] == (0, figures)


def test_the_count_goes_on_within_an_epoch(
    run: Callable[..., Any], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        truncate(tree / "train" / "n90000001" / f"n90000001_{number}.JPEG")
    saved = "train.checkpoint={every_steps: 1}"
    whole = run(SKIP, saved)[2]
    assert whole["unreadable_images"] == 4
    step = Trainer._step

    def interrupted(self: Trainer, *args: Any) -> None:
        if self.step == 2:
            raise UserError("interrupted")
        step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert run(SKIP, saved)[0] == 2
    code, err, figures = run(SKIP, saved, flags=("--resume", "auto"))
    assert (code, figures) == (0, whole)
    assert "after epoch 0 and 2 batches" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("root=imagnet", "imagnet' (did you mean '{}'?)"),
        ("root=imagenet/train", "'{}/train' has no folder 'train' (did you mean '{}'?)"),
        ("split=", "'{}' holds 'train', 'val', not classes (did you mean '{}/train' or '{}/val'?)"),
        ("num_classes=1000", "has 3 class folders, num_classes is 1000"),
    ],
)
def test_wrong_folders_end_a_run_at_their_line(
    override: str, message: str, run: Callable[..., Any], tree: Path
) -> None:
    code, err, _ = run("datasets.tiny/train.init.kwargs.root=imagenet", f"datasets.tiny/train.init.kwargs.{override}")
    assert code == 2
    line = r"error: (tiny\.yaml:\d+:\d+|--set .*): !import_call vkd_plugin\.datasets\.ImageFolder: '?.*\n"
    assert re.fullmatch(line, err)
    assert "BadValue" not in err
    assert message.replace("{}", str(tree)) in err
    assert not Path("run/metrics.jsonl").exists()


def test_999_classes_end_a_run_at_their_line(run: Callable[..., Any], tree: Path) -> None:
    imagenet_folders(tree / "train", leave_out="n02123045")
    for folder in (tree / "train").glob("n9*"):
        shutil.rmtree(folder)
    code, err, _ = run("datasets.tiny/train.init.kwargs.num_classes=1000")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "has 999 class folders, num_classes is 1000" in err
    assert "'n02123045'" in err


def test_the_check_needs_no_images(run: Callable[..., Any], tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tree)
    assert main(["check", "tiny.yaml"]) == 0
    assert main(["check", "tiny.yaml", "--data"]) == 2
    assert re.search(rf"tiny\.yaml:\d+:\d+: .*nothing is at '{tree}'", capfd.readouterr().err)
