"""Images that cannot be read: the run stops and names them, or others take their place and are counted."""

import logging
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet_helper import truncate
from PIL import Image
from torch.utils.data import Subset

from vkd_plugin.datasets import ImageFolder
from vkd_plugin.datasets.unreadable import UNREADABLE_IN_A_ROW
from vkd_plugin.engine.loaders import (
    Position,
    batches_of,
    build_loader,
    position_at,
    set_position,
)
from vkd_plugin.engine.reports import unreadable_images
from vkd_plugin.errors import UserError

START = Position()


def small(image: Image.Image) -> torch.Tensor:
    """A random crop, as numbers."""
    x = random.randrange(image.width - 8)
    return torch.from_numpy(np.asarray(image.crop((x, 0, x + 8, 8))).copy())


def loader_of(tree: Path, on_error: str, workers: int = 0, **kwargs: Any) -> Any:
    dataset = ImageFolder(tree, "train", transform=small, on_error=on_error)
    options = {"batch_size": 5, "num_workers": workers, **kwargs}
    return build_loader(dataset, {"requires_supp": True, "kwargs": options}, train=True, seed=3)


def epoch_of(loader: Any, epoch: int = 0, position: Position = START) -> list[tuple[Any, Any, int | None]]:
    """Images, labels and count of unreadable images of each batch."""
    set_position(loader, epoch, position)
    return [(images.tolist(), labels.tolist(), unreadable_images(loader)) for images, labels, _ in batches_of(loader)]


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """Warnings of the package so far."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vkd_plugin")
    logger.addHandler(handler)
    yield lambda: [record.getMessage() for record in records]
    logger.removeHandler(handler)


def failure_of(loader: Any) -> str:
    try:
        epoch_of(loader)
    except UserError as error:  # not pytest.raises, which keeps what the workers depend on
        return str(error)
    return ""


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops(workers: int, tree: Path) -> None:
    path = truncate(tree / "train" / "n90000001" / "n90000001_4.JPEG")
    assert re.fullmatch(
        rf"{path}: cannot be read as an image: image file is truncated \(\d+ bytes not processed\); "
        r"replace it, or give the data set on_error: 'skip'",
        failure_of(loader_of(tree, "stop", workers)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_counted(workers: int, tree: Path, said: Callable[[], list[str]]) -> None:
    whole = epoch_of(loader_of(tree, "skip"))
    assert [count for *_, count in whole] == [0] * 5
    folder = tree / "train" / "n90000001"
    # Two in a row, and the last of the class: its place is taken by the first of the next.
    bad = [truncate(folder / f"n90000001_{number}.JPEG") for number in (2, 3, 7)]
    loader = loader_of(tree, "skip", workers)
    first, second = epoch_of(loader), epoch_of(loader, 1)
    assert sum(count or 0 for *_, count in first) == sum(count or 0 for *_, count in second) == 3
    assert [b == w for b, w in zip(first, whole, strict=True)] == [count == 0 for *_, count in first]
    assert sorted(label for _, labels, _ in first for label in labels) == [0] * 8 + [1] * 7 + [2] * 9
    takers = [folder / "n90000001_4.JPEG"] * 2 + [tree / "train" / "n90000002" / "n90000002_0.JPEG"]
    messages = sorted(said())
    assert len(messages) == 3  # once for each, not again in the second epoch
    for message, path, taker in zip(messages, bad, takers, strict=True):
        assert message.startswith(f"{path}: cannot be read as an image: image file is truncated (")
        assert message.endswith(f"; {taker} takes its place")


def test_replacements_stay_where_they_are_when_a_run_goes_on(tree: Path) -> None:
    for number in (1, 4):
        truncate(tree / "train" / "n90000000" / f"n90000000_{number}.JPEG")
    loader = loader_of(tree, "skip")
    whole = epoch_of(loader, 2)
    for done in range(5):
        assert epoch_of(loader_of(tree, "skip", 2 * (done % 2)), 2, position_at(loader, done)) == whole[done:]


def test_the_loader_itself_gives_plain_batches(tree: Path) -> None:
    truncate(tree / "train" / "n90000002" / "n90000002_7.JPEG")  # the very last; the first takes its place
    loader = loader_of(tree, "skip", 1)
    assert sorted(label for _, labels, _ in loader for label in labels.tolist()) == [0] * 9 + [1] * 8 + [2] * 7
    assert unreadable_images(loader) == 1
    assert unreadable_images(loader) == 0
    sound_one = loader_of(tree, "stop")
    assert unreadable_images(sound_one) is None
    with pytest.raises(UserError, match=r"n90000002_7\.JPEG: cannot be read"):
        list(sound_one)


def test_elsewhere_a_replacement_is_logged(tree: Path, said: Callable[[], list[str]]) -> None:
    path = tree / "val" / "n90000000" / "n90000000_0.JPEG"
    path.write_bytes(b"")
    dataset = ImageFolder(tree, "val", on_error="skip")
    assert dataset[0][0].tobytes() == dataset[1][0].tobytes() == dataset[-6][0].tobytes()
    why = "cannot be read as an image: empty, or in no format that Pillow knows"
    assert said() == [f"{path}: {why}; {dataset.samples[1][0]} takes its place"] * 2
    assert Subset(dataset, [2, 0])[1][1] == 0
    with pytest.raises(IndexError):
        dataset[6]


def test_when_nothing_can_be_read_it_stops(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(tree, "val", on_error="skip")
    shutil.rmtree(tree / "val")
    with pytest.raises(UserError, match=r"_1\.JPEG: .*No such file or directory; nor can those .* \(6 tried\)"):
        dataset[1]
    dataset.samples *= UNREADABLE_IN_A_ROW
    with pytest.raises(UserError, match=rf"\({UNREADABLE_IN_A_ROW} tried\)"):
        dataset[1]

    def no_memory(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr(dataset, "loader", no_memory)
    with pytest.raises(MemoryError):  # not the image's fault
        dataset[0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(0, 3),
    changes=st.dictionaries(st.integers(0, 700), st.integers(0, 255), max_size=12),  # in headers and tables
    length=st.integers(0, 3000),
)
def test_whatever_is_wrong_with_a_file_is_said(number: int, changes: dict[int, int], length: int, sound: Path) -> None:
    content = bytearray((sound / "train" / "n90000000" / f"n90000000_{number}.JPEG").read_bytes())
    for place, value in changes.items():
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "class" / "image.jpg"
        file.parent.mkdir()
        file.write_bytes(content[:length])
        try:
            found = ImageFolder(folder)[0][0].mode
        except UserError as error:
            found = str(error)
    assert found == "RGB" or re.fullmatch(f"{file}: cannot be read as an image: .*; replace it, or .*", found)


def test_training_on_validation_images_is_remarked(sound: Path, said: Callable[[], list[str]]) -> None:
    config = {"kwargs": {"batch_size": 2}}
    for split, train in (("train", True), ("val", False)):
        build_loader(ImageFolder(sound, split), config, train=train, seed=0)
    assert said() == []
    build_loader(ImageFolder(sound, "val"), config, train=True, seed=0)
    assert said() == [f"the training images are those of '{sound / 'val'}': are train and val exchanged?"]
