"""Fashion-MNIST: its forms on disk, its splits, and what is said of files that are none of it."""

import gzip
import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets.mnist import read_image_file, read_label_file

from vkd_plugin.check import examine
from vkd_plugin.cli import main
from vkd_plugin.config import load_experiment
from vkd_plugin.datasets import FashionMNIST, fashion_mnist
from vkd_plugin.engine.progress import setup_logging
from vkd_plugin.errors import UserError
from vkd_plugin.models import fashion_cnn

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
REAL = fashion_mnist.SYSTEM_FOLDER
CONFIG = Path(__file__).parents[1] / "configs" / "fashion_mnist" / "ce" / "vit.yaml"


def write_idx(folder: Path, train: int, test: int) -> None:
    """Four idx files; an image's first pixels are its number."""
    for name, size in (("train", train), ("t10k", test)):
        images = np.zeros((size, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(size), 256)
        labels = np.random.default_rng(0).permutation(np.arange(size) % 10).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{name}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the real sizes."""
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, 60_000, 10_000)
    return folder


@pytest.fixture(autouse=True)
def no_system_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(fashion_mnist, "DEFAULT_ROOT", str(tmp_path / "default"))


def numbers(dataset: FashionMNIST) -> list[int]:
    """Which of the file's images a data set holds."""
    first = [np.asarray(dataset[index][0])[0, :2].tolist() for index in range(len(dataset))]
    return [256 * high + low for high, low in first]


def test_what_torchvision_reads(files: Path) -> None:
    images, labels = read_image_file(str(files / IMAGES)), read_label_file(str(files / LABELS))
    dataset = FashionMNIST(files, split="val")
    for index, number in enumerate(numbers(dataset)):
        image, label = dataset[index]
        assert label == dataset.targets[index] == labels[number]
        assert index % 500 or torch.equal(torch.from_numpy(np.array(image)), images[number])


def test_splits_are_apart_and_balanced(files: Path) -> None:
    train, val, test = (FashionMNIST(files, split=split) for split in ("train", "val", "test"))
    assert sorted(numbers(train) + numbers(val)) == list(range(60_000))
    assert numbers(test) == list(range(10_000))
    assert Counter(val.targets) == dict.fromkeys(range(10), 500)
    assert Counter(train.targets) == dict.fromkeys(range(10), 5_500)


def test_parts_are_nested_balanced_and_the_same_everywhere(files: Path) -> None:
    parts = [FashionMNIST(files, fraction=fraction) for fraction in (0.05, 0.1, 0.2, 1.0)]
    kept = [set(numbers(part)) for part in parts]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert Counter(parts[0].targets) == dict.fromkeys(range(10), 275)
    assert set(numbers(FashionMNIST(files, fraction=0.05, seed=1))) != kept[0]
    # Written down once: the study's images are the same ones on whatever machine.
    assert numbers(FashionMNIST(files, fraction=2e-4)) == [
        6746,
        6905,
        16717,
        27429,
        29606,
        33253,
        36566,
        46853,
        57667,
        58014,
    ]


@pytest.mark.parametrize("kwargs", [{}, {"fraction": 0.05}, {"fraction": 1e-9}, {"split": "val"}, {"split": "test"}])
def test_length_without_files(files: Path, kwargs: dict[str, object]) -> None:
    assert FashionMNIST.length_of_split(**kwargs) == len(FashionMNIST(files, **kwargs))


def test_where_files_are_looked_for(files: Path, tmp_path: Path) -> None:
    """In ``root``, in torchvision's layout below it, then where the system's package puts them, packed."""
    (tmp_path / "system").mkdir()
    for file in files.iterdir():
        (tmp_path / "system" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
    packed = FashionMNIST(split="val")
    shutil.copytree(files, tmp_path / "default" / "FashionMNIST" / "raw")
    (tmp_path / "system" / f"{LABELS}.gz").write_bytes(b"")  # not read any more
    assert numbers(FashionMNIST(split="val")) == numbers(packed) == numbers(FashionMNIST(files, split="val"))


def test_files_that_are_not_there(tmp_path: Path, files: Path) -> None:
    with pytest.raises(UserError, match=r"not here: no train-images-idx3-ubyte.*in .*default.*raw.*system; install"):
        FashionMNIST()
    shutil.copy(files / IMAGES, tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/{LABELS}: no such file, with or without .gz, beside the others"):
        FashionMNIST(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LABELS, b"<html>", "not the idx file of Fashion-MNIST: expected 60000 bytes"),
        (LABELS, struct.pack(">HBBI", 0, 8, 1, 60_000) + bytes(59_999), "not the idx file of Fashion-MNIST"),
        (f"{LABELS}.gz", b"<html>", "cannot be read: Not a gzipped file"),
        (f"{LABELS}.gz", gzip.compress(bytes(100), mtime=0)[:-9], "cannot be read: Compressed file ended"),
        (f"{LABELS}.gz", gzip.compress(b"abc", mtime=0)[:10] + b"\xff" * 20, "cannot be read: Error -3"),
    ],
)
def test_files_that_are_something_else(files: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    shutil.copy(files / IMAGES, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/{name}: {message}"):
        FashionMNIST(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "tset"}, "did you mean 'test'"),
        ({"fraction": 0}, "fraction must lie in"),
        ({"fraction": 0.5, "split": "val"}, "fraction is for the train split"),
    ],
)
def test_arguments_that_are_refused(files: Path, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FashionMNIST(files, **kwargs)
    with pytest.raises(ValueError, match=message):
        FashionMNIST.length_of_split(**kwargs)


def test_a_download_goes_into_torchvisions_layout(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, download: bool) -> None:
        assert download
        shutil.copytree(files, Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(fashion_mnist.torchvision.datasets, "FashionMNIST", download)
    assert len(FashionMNIST(tmp_path / "here", split="val", download=True)) == 5_000


def test_a_check_needs_no_files_to_count_steps() -> None:
    facts = examine(CONFIG, ["datasets.fashion_mnist/train.init.kwargs.fraction=0.1"])
    assert facts.problems == facts.warnings == []
    assert facts.stages[0].steps_per_epoch == 5_500 // 32


def test_files_that_are_missing_have_the_line_of_the_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine(CONFIG, data=True)
    assert len(facts.problems) == 3
    assert str(facts.problems[0]).startswith(f"{CONFIG}:6:")
    assert "Fashion-MNIST is not here" in str(facts.problems[0])


@pytest.mark.parametrize("path", sorted(CONFIG.parents[1].glob("*/*.yaml")), ids=lambda path: path.parent.name)
def test_an_experiment_from_its_first_step_to_its_test(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a few images of zeros but for their numbers: what is trained, saved and tested, not what is learnt."""
    monkeypatch.setattr(fashion_mnist, "_SIZES", {"train": 1_600, "t10k": 100})
    monkeypatch.setattr(fashion_mnist, "_VAL_PER_CLASS", 10)
    write_idx(tmp_path, 1_600, 100)
    monkeypatch.chdir(tmp_path)  # where the student is put
    Path("configs").symlink_to(CONFIG.parents[2])  # where the teacher is
    overrides = ["train.num_epochs=1", f"datasets._root={tmp_path}"]
    overrides.append("datasets.fashion_mnist/train.init.kwargs.fraction=0.1")  # 150 images: a batch of
    overrides.append("train.train_data_loader.kwargs.batch_size=128")
    output = tmp_path / "run"
    arguments = ["--config", str(path), "--output", str(output), "--device", "cpu"]
    try:
        assert main([*arguments, *(part for override in overrides for part in ("--set", override))]) == 0
    finally:
        setup_logging(is_main=True)
    summary = json.loads((output / "summary.json").read_text())
    assert 0 <= summary["test"]["student"]["top1"] <= 100
    (record,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 1
    assert all(np.isfinite(value) for key, value in record.items() if key.startswith("loss"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_committed_teacher_is_as_good_as_the_study_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", REAL)
    experiment = load_experiment(CONFIG.parent / "fashion_cnn.yaml")
    test = experiment.data["datasets"]["fashion_mnist/test"]
    teacher = fashion_cnn(checkpoint=str(CONFIG.parent / "fashion_cnn.safetensors")).eval()
    right = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test, 500):
            right += int((teacher(images).argmax(1) == labels).sum())
    assert right >= 9_400
