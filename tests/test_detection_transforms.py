"""ViDT's augmentation: the sizes that the reference measured, boxes that follow, and addressed draws."""

import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from PIL import Image
from torch import Tensor
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.datasets.registry import TRANSFORM_DICT
from torchvision import tv_tensors
from torchvision.transforms import v2

from vkd_plugin.datasets import CocoDetection, RandomSizeCrop, ResizeShortSide, detection_transforms
from vkd_plugin.datasets.coco_shapes import write_tree
from vkd_plugin.engine.randomness import AddressedDataset, BatchAddress

SIZES = list(range(480, 801, 16))


def target(width: int, height: int, boxes: list[list[float]]) -> dict[str, Any]:
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes).float(), format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
    }


# width x height before and after, as the reference's resizing was measured with a short side of 800 and a long one of
# at most 1333.
MEASURED = [
    ((640, 480), (1056, 800)),
    ((427, 640), (800, 1184)),
    ((640, 360), (1328, 736)),
    ((500, 375), (1056, 800)),
    ((612, 612), (800, 800)),
    ((1000, 800), (992, 800)),
]


@pytest.mark.parametrize(("before", "after"), MEASURED)
def test_the_reference_sizes(before: tuple[int, int], after: tuple[int, int]) -> None:
    image, seen = ResizeShortSide([800], 1333)(Image.new("RGB", before), target(*before, [[10, 20, 110, 220]]))
    assert image.size == after
    x, y = after[0] / before[0], after[1] / before[1]
    assert torch.allclose(seen["boxes"], torch.tensor([[10 * x, 20 * y, 110 * x, 220 * y]]))
    assert seen["boxes"].canvas_size == after[::-1]


def test_small_and_long_images() -> None:
    assert ResizeShortSide([400]).resized(100, 333, 400) == (400, 1328)  # without max_size
    assert ResizeShortSide([500]).resized(500, 700, 500) == (496, 688)  # of its size already
    assert ResizeShortSide([64], 96).resized(10, 1000, 64) == (16, 96)  # never less than the multiple
    assert ResizeShortSide([50], multiple_of=1).resized(30, 60, 50) == (50, 100)


def test_each_size_is_drawn() -> None:
    torch.manual_seed(0)
    resize = ResizeShortSide(SIZES, 1333)
    drawn = Counter(resize.make_params([Image.new("RGB", (640, 480))])["size"][0] for _ in range(1050))
    assert sorted(drawn) == SIZES
    assert 25 < min(drawn.values()) <= max(drawn.values()) < 85  # of 50


def test_a_crop_keeps_what_it_shows() -> None:
    torch.manual_seed(1)
    crop, sides = RandomSizeCrop(30, 60), set()
    for _ in range(100):
        image = Image.new("RGB", (80, 50))
        image.putpixel((40, 25), (255, 0, 0))
        cut, seen = crop(image, target(80, 50, [[40, 25, 41, 26], [0, 0, 80, 50]]))
        sides.add(cut.size)
        (left, top, right, bottom), whole = seen["boxes"].tolist()
        assert whole == [0, 0, *cut.size]
        red = [(x, y) for x in range(cut.width) for y in range(cut.height) if cut.getpixel((x, y)) == (255, 0, 0)]
        assert red == ([(left, top)] if right > left and bottom > top else [])
    widths, heights = ({size[axis] for size in sides} for axis in (0, 1))
    assert (min(widths), max(widths), min(heights), max(heights)) == (30, 60, 30, 50)


def test_an_image_below_the_smallest_crop_is_whole() -> None:
    cut, seen = RandomSizeCrop(384, 600)(Image.new("RGB", (100, 90)), target(100, 90, [[1, 2, 3, 4]]))
    assert cut.size == (100, 90)
    assert seen["boxes"].tolist() == [[1, 2, 3, 4]]


def test_the_data_set_leaves_out_what_a_crop_has_lost(tmp_path: Path) -> None:
    write_tree(tmp_path / "coco", train=8, val=1, size=96, objects=4)
    whole = CocoDetection(tmp_path / "coco")
    cut = CocoDetection(tmp_path / "coco", transforms=RandomSizeCrop(30, 40))
    torch.manual_seed(0)
    fewer = 0
    for (_, before), (image, after) in zip(whole, cut, strict=True):
        boxes, size = after["boxes"], torch.tensor([image.width, image.height])
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= size).all()
        assert len(boxes) == len(after["labels"]) == len(after["area"]) == len(after["iscrowd"])
        assert after["size"].tolist() == [image.height, image.width]
        assert after["orig_size"].tolist() == before["size"].tolist()
        assert set(after["labels"].tolist()) <= set(before["labels"].tolist())
        fewer += len(before["boxes"]) - len(boxes)
    assert fewer > 0


def documented(tmp_path: Path) -> v2.Compose:
    """The transforms of the module's docstring, through torchdistill's loader."""
    text = detection_transforms.__doc__ or ""
    block = text.split("for training::\n\n")[1].split("\n\nFor evaluation")[0]
    (tmp_path / "x.yaml").write_text(textwrap.dedent(block))
    return load_yaml_file(str(tmp_path / "x.yaml"))["transforms"]


def test_the_documented_augmentation(tmp_path: Path) -> None:
    transforms = documented(tmp_path)
    torch.manual_seed(0)
    for _ in range(6):
        image, seen = transforms(Image.new("RGB", (640, 480), (124, 116, 104)), target(640, 480, [[0, 0, 640, 480]]))
        assert isinstance(image, Tensor)
        height, width = image.shape[1:]
        assert height % 16 == width % 16 == 0
        assert min(height, width) in SIZES or max(height, width) == 1328
        assert torch.equal(seen["boxes"], torch.tensor([[0, 0, width, height]]).float())
        assert image.abs().max() < 0.01  # that colour is the mean


def test_an_item_depends_on_its_address(tmp_path: Path) -> None:
    write_tree(tmp_path / "coco", train=4, val=1, size=96)
    crops = v2.Compose([v2.RandomHorizontalFlip(), RandomSizeCrop(30, 60), ResizeShortSide([32, 48, 64]), v2.ToImage()])
    dataset = AddressedDataset(CocoDetection(tmp_path / "coco", transforms=crops), seed=0)

    def items(epoch: int, *indices: int) -> dict[int, tuple[Tensor, Tensor]]:
        _, samples, _ = dataset.__getitems__(BatchAddress(epoch, 0, list(indices)))
        return {index: (image, target["boxes"]) for index, (image, target) in zip(indices, samples, strict=True)}

    one, again, later = items(0, 1, 2, 3), items(0, 3, 1), items(1, 1, 2, 3)
    for index, parts in again.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, one[index], strict=True))
    assert any(one[i][0].shape != later[i][0].shape or not torch.equal(one[i][0], later[i][0]) for i in one)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ResizeShortSide([]), r"sizes must be a list of sizes, got \[\]"),
        (lambda: ResizeShortSide(800), "sizes must be a list of sizes, got 800"),
        (lambda: ResizeShortSide([8]), r"sizes must lie in \[16, inf\), got 8"),
        (lambda: ResizeShortSide([480.5]), "sizes must be whole numbers, got 480.5"),
        (lambda: ResizeShortSide([480], max_size=8), r"max_size must lie in \[16"),
        (lambda: RandomSizeCrop(600, 384), r"max_size must lie in \[600, inf\), got 384"),
        (lambda: RandomSizeCrop("1e2", 384), "min_size must be a number, got '1e2'"),
    ],
)
def test_arguments_that_mean_nothing(make: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared)
        make()
    assert re.search(said, str(caught.value))


def test_registered_with_torchdistill() -> None:
    assert TRANSFORM_DICT["ResizeShortSide"] is ResizeShortSide
    assert TRANSFORM_DICT["RandomSizeCrop"] is RandomSizeCrop
