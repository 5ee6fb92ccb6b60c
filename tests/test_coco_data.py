"""COCO's layout: found or refused with one line, and what becomes of boxes, crowds, labels and categories."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from PIL import Image
from torchdistill.datasets.registry import COLLATE_FUNC_DICT, DATASET_DICT
from torchvision.transforms import v2

from vkd_plugin.cli import main
from vkd_plugin.datasets import CocoDetection, coco_collate_fn
from vkd_plugin.datasets.coco_shapes import CATEGORY_IDS, write_tree
from vkd_plugin.datasets.coco_shapes import main as make_shapes
from vkd_plugin.engine.loaders import Position, batches_of, build_loader, set_position
from vkd_plugin.engine.reports import unreadable_images
from vkd_plugin.errors import BadValue, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that no test changes."""
    folder = tmp_path_factory.mktemp("shapes") / "coco"
    write_tree(folder, train=6, val=4, size=96, objects=3)
    return folder


@pytest.fixture
def tree(tmp_path: Path, shapes: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shapes, tmp_path / "coco"))


def described(tree: Path, split: str = "train") -> dict[str, Any]:
    return json.loads((tree / "annotations" / f"instances_{split}2017.json").read_text())


def change(tree: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    content = described(tree)
    how(content)
    (tree / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


# The made tree.


def test_a_box_holds_its_item_and_nothing_more(shapes: Path) -> None:
    content = described(shapes)
    boxes: dict[int, list[Any]] = {}
    for annotation in content["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation)
    assert min(boxes) == content["images"][1]["id"]  # the first image is empty
    assert boxes[content["images"][1]["id"]][0]["iscrowd"] == 1
    for image in content["images"][3:]:
        pixels = np.asarray(Image.open(shapes / "train2017" / image["file_name"]).convert("L"), dtype=float)
        background = np.ones_like(pixels, dtype=bool)
        for annotation in boxes[image["id"]]:
            left, top, width, height = map(int, annotation["bbox"])
            assert 0 < annotation["area"] <= width * height
            background[max(top - 8, 0) : top + height + 8, max(left - 8, 0) : left + width + 8] = False
        level = np.median(pixels[background])
        for annotation in boxes[image["id"]]:
            left, top, width, height = map(int, annotation["bbox"])
            inside = pixels[top : top + height, left : left + width] > level + 15
            # An item reaches its box on every side.
            assert all(side.any() for side in (inside[:3], inside[-3:], inside[:, :3], inside[:, -3:]))
        assert pixels[background].max() < level + 45  # and nothing bright lies beside the boxes


def test_the_same_bytes_for_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        arguments = [str(tmp_path / name), "--train", "3", "--val", "1", "--size", "64", "--seed", str(seed)]
        assert make_shapes(arguments) == 0
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 6
    for file in files:
        one, two, other = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "other"))
        assert one == two != other
    capsys.readouterr()
    assert make_shapes([str(tmp_path / "one")]) == 2
    assert make_shapes([str(tmp_path / "more"), "--items", "digit"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.match("error: .*not empty", lines[0])
    assert lines[1] == "error: no items 'digit' (did you mean 'digits'?)"


def test_items_of_few_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shapes([str(tmp_path / "few"), "--train", "12", "--val", "8", "--size", "48", "--classes", "2"]) == 0
    for split in ("train", "val"):
        content = described(tmp_path / "few", split)
        assert content["categories"] == [{"id": 1, "name": "0"}, {"id": 2, "name": "1"}]
        assert {annotation["category_id"] for annotation in content["annotations"]} == {1, 2}
    capsys.readouterr()
    assert make_shapes([str(tmp_path / "none"), "--classes", "11"]) == 2
    assert capsys.readouterr().err == "error: classes must be from 1 to 10, got 11\n"


# Items.


def test_an_item_in_torchvisions_convention(shapes: Path) -> None:
    dataset = CocoDetection(shapes, "val")
    content = described(shapes, "val")
    assert len(dataset) == 4
    for index, listed in enumerate(content["images"]):
        image, target = dataset[index]
        annotated = [a for a in content["annotations"] if a["image_id"] == listed["id"]]
        single = [a for a in annotated if not a["iscrowd"]]
        assert image.mode == "RGB"
        assert image.size == (listed["width"], listed["height"])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in single)]
        assert torch.equal(target["boxes"], torch.tensor(corners).reshape(-1, 4))
        assert target["boxes"].dtype == torch.float32
        assert type(target["boxes"]) is type(target["labels"]) is torch.Tensor
        assert target["labels"].tolist() == [a["category_id"] for a in single]
        assert target["area"].tolist() == [a["bbox"][2] * a["bbox"][3] for a in single]
        assert target["iscrowd"].tolist() == [0] * len(single)
        assert target["image_id"].item() == listed["id"]
        assert target["orig_size"].tolist() == target["size"].tolist() == [listed["height"], listed["width"]]
        rows = [[*a["bbox"], a["area"], a["category_id"], a["iscrowd"]] for a in annotated]
        assert target["ground_truth"].tolist() == rows
        assert target["ground_truth"].shape == (len(annotated), 7)
        for name in ("labels", "iscrowd", "image_id", "orig_size", "size"):
            assert target[name].dtype == torch.int64
    assert dataset[1][1]["ground_truth"][:, 6].sum() == 1  # the crowd is there to be evaluated with


def test_labels_are_coco_ids_or_contiguous(shapes: Path) -> None:
    by_id, contiguous = CocoDetection(shapes), CocoDetection(shapes, labels="contiguous")
    assert by_id.classes == ["N/A", *"012345678", "N/A", "9"]
    assert contiguous.classes == list("0123456789")
    assert contiguous.category_ids == dict(enumerate(CATEGORY_IDS))
    for index in range(len(by_id)):
        ids, numbers = (dataset[index][1]["labels"].tolist() for dataset in (by_id, contiguous))
        assert [contiguous.category_ids[number] for number in numbers] == ids
        truth = [dataset[index][1]["ground_truth"][:, 5].tolist() for dataset in (by_id, contiguous)]
        assert [contiguous.category_ids[number] for number in truth[1]] == truth[0]


def test_images_without_boxes_are_kept_unless_told(tree: Path) -> None:
    crowd = described(tree)["images"][1]["id"]
    change(tree, lambda c: [a.update(iscrowd=1) for a in c["annotations"] if a["image_id"] == crowd])
    everything, some = CocoDetection(tree), CocoDetection(tree, keep_empty=False)
    assert (len(everything), len(some)) == (6, 4)
    assert everything[0][1]["boxes"].shape == (0, 4)
    assert [some[0][1]["image_id"].item(), *some.image_ids[1:]] == everything.image_ids[2:]
    assert some.samples[0] == (str(tree / "train2017" / "000000000003.jpg"), 3)


def test_degenerate_boxes_are_dropped_and_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flatten(content: dict[str, Any]) -> None:
        content["annotations"][-1]["bbox"][3] = 0
        content["annotations"][-2]["bbox"][2] = -1.0

    whole = [target["boxes"].tolist() for _, target in CocoDetection(tree)]
    assert not caplog.records
    change(tree, flatten)
    with caplog.at_level(logging.WARNING):
        dataset = CocoDetection(tree)
    total = len(described(tree)["annotations"])
    assert dataset.degenerate_boxes == 2
    assert caplog.messages[0].endswith(f"2 of {total} boxes have no width or height and are left out")
    left = [target["boxes"].tolist() for _, target in dataset]
    assert sum(map(len, left)) == sum(map(len, whole)) - 2
    assert sum(len(target["ground_truth"]) for _, target in dataset) == total


def test_boxes_over_an_edge_are_clipped(tree: Path) -> None:
    change(tree, lambda c: c["annotations"][-1].update(bbox=[-5.5, 3, 500, 7.25]))
    image, target = CocoDetection(tree)[5]
    assert target["boxes"][-1].tolist() == [0, 3, image.width, 10.25]
    assert target["ground_truth"][-1, :4].tolist() == [-5.5, 3, 500, 7.25]


def test_transforms_see_image_and_boxes(shapes: Path) -> None:
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    plain, flipped = CocoDetection(shapes), CocoDetection(shapes, transforms=flip)
    for (image, target), (tensor, mirrored) in zip(plain, flipped, strict=True):
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (3, image.height, image.width)
        expected = target["boxes"].clone()
        expected[:, [0, 2]] = image.width - target["boxes"][:, [2, 0]]
        assert torch.equal(mirrored["boxes"], expected)
        assert torch.equal(mirrored["labels"], target["labels"])
        assert torch.equal(mirrored["ground_truth"], target["ground_truth"])


def test_a_collated_batch_is_tuples(shapes: Path) -> None:
    dataset = CocoDetection(shapes)
    images, targets, supplements = coco_collate_fn([(*dataset[i], {"row": i}) for i in (3, 1)])
    assert [image.size for image in images] == [dataset[3][0].size, dataset[1][0].size]
    assert [target["image_id"].item() for target in targets] == [4, 2]
    assert supplements == ({"row": 3}, {"row": 1})
    assert len(coco_collate_fn([dataset[0]])) == 2


def test_registered_with_torchdistill() -> None:
    assert DATASET_DICT["CheckedCocoDetection"] is CocoDetection
    assert COLLATE_FUNC_DICT["coco_collate_fn"] is coco_collate_fn


# What is wrong, in one line.


def first(content: dict[str, Any], **changed: Any) -> None:
    content["annotations"][0].update(changed)


def one_too_deep(tree: Path) -> None:
    shutil.move(tree, tree.parent / "moved")
    tree.mkdir()
    shutil.move(tree.parent / "moved", tree / "coco2017")


MISTAKES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda t: shutil.rmtree(t), r"'.*coco' does not exist; it has to hold train2017, val2017 and annotations"),
    (lambda t: shutil.rmtree(t / "train2017"), r"'.*/train2017' is missing"),
    (lambda t: (t / "train2017").rename(t / "train2107"), r"missing \(did you mean '.*/train2107'\?\)"),
    (one_too_deep,
     r"'.*/coco/train2017' is missing \(did you mean root: '.*/coco/coco2017'\?\)"),
    (lambda t: (t / "annotations/instances_train2017.json").unlink(), r"instances_train2017.json' is missing"),
    (lambda t: (t / "annotations/instances_train2017.json").write_text('{"images": ['), r"is not JSON: .* \(char 12\)"),
    (lambda t: (t / "annotations/instances_train2017.json").write_bytes(b"\xff\xfe\x00"), r"json' is not JSON"),
    (lambda t: (t / "annotations/instances_train2017.json").write_text("[]"), r"holds a list, not 'images'"),
    (lambda t: change(t, lambda c: c.update(image=c.pop("images"))), r"no 'images' \(did you mean 'image'\?\)"),
    (lambda t: change(t, lambda c: c.pop("annotations")), r"json' has no 'annotations'$"),
    (lambda t: change(t, lambda c: c["images"].clear()), r"has an empty list of images"),
    (lambda t: change(t, lambda c: c["annotations"].clear()), r"has an empty list of annotations"),
    (lambda t: change(t, lambda c: c["categories"].clear()), r"has an empty list of categories"),
    (lambda t: change(t, lambda c: c.update(images={})), r"'images' that are not a list"),
    (lambda t: change(t, lambda c: c["images"].append(7)), r"entries under 'images' that are not mappings"),
    (lambda t: change(t, lambda c: c["images"].append(c["images"][0])), r"two images with the id 1"),
    (lambda t: change(t, lambda c: c["images"][2].pop("file_name")), r"images\[2\]: 'file_name' should be"),
    (lambda t: change(t, lambda c: c["images"][2].update(width="96")), r"images\[2\]: 'width' .* not '96'"),
    (lambda t: change(t, lambda c: c["categories"].append({"id": 1})), r"two categories with one id"),
    (lambda t: (t / "train2017/000000000002.jpg").unlink(),
     r"names 1 of 6 images that are not in '.*/train2017': '000000000002.jpg'$"),
    (lambda t: change(t, lambda c: first(c, category_id=10)),
     r"annotations\[0\] \(id 1\): category 10 is not among the 10 categories"),
    (lambda t: change(t, lambda c: first(c, image_id=99)), r"\(id 1\): image 99 is not among the 6 images"),
    (lambda t: change(t, lambda c: first(c, bbox=[1, 2, 3])), r"\(id 1\): 'bbox' should be four numbers"),
    (lambda t: change(t, lambda c: first(c, bbox=[1, 2, 3, float("nan")])), r"\(id 1\): 'bbox' should be four numbers"),
    (lambda t: change(t, lambda c: first(c, area="big")), r"\(id 1\): 'area' should be a number, not 'big'"),
    (lambda t: change(t, lambda c: first(c, bbox=[900, 2, 3, 4])),
     r"\(id 1\): the box \[900.0, 2.0, 3.0, 4.0\] lies outside of image '000000000002.jpg', \d+ x \d+ pixels$"),
    (lambda t: change(t, lambda c: [a.update(bbox=[1, -9, 3, 4]) for a in c["annotations"][:3]]), r"\(and 2 more\)$"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), MISTAKES)
def test_one_mistake_one_line(tree: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(tree)
    with pytest.raises(BadValue) as caught:
        CocoDetection(tree)
    assert re.search(said, str(caught.value))
    assert "\n" not in str(caught.value)
    assert caught.value.value == str(tree)  # by which its line in a YAML is found


def test_the_line_in_the_yaml(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "train2017/000000000002.jpg").unlink()
    monkeypatch.setenv("COCO_SHAPES", str(tree))
    monkeypatch.chdir(ROOT)
    assert main(["check", "--data", "tests/data/coco/detector.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: tests/data/coco/detector.yaml:9:15: .*names 1 of 6 images that are not in", line)


def test_unknown_arguments(shapes: Path) -> None:
    with pytest.raises(ValueError, match=r"no split of CocoDetection 'trian' \(did you mean 'train'\?\)"):
        CocoDetection(shapes, "trian")
    with pytest.raises(ValueError, match=r"no labels of CocoDetection 'ids'"):
        CocoDetection(shapes, labels="ids")


def test_images_that_are_not_what_they_should_be(tree: Path) -> None:
    file = tree / "train2017" / "000000000004.jpg"
    file.write_bytes(file.read_bytes()[:300])
    hint = "; replace it, or give the data set on_error: 'skip'"
    with pytest.raises(UserError, match=rf"000000000004.jpg: cannot be read as an image: .*{hint}$"):
        CocoDetection(tree)[3]
    Image.new("RGB", (5, 7)).save(file)
    with pytest.raises(UserError, match=rf"04.jpg: 5 x 7 pixels, the annotations say \d+ x \d+{hint}$"):
        CocoDetection(tree)[3]
    with pytest.raises(ValueError, match=r"no on_error 'skp' \(did you mean 'skip'\?\)"):
        CocoDetection(tree, on_error="skp")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_counted(tree: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    folder = tree / "train2017"
    (folder / "000000000003.jpg").write_bytes(b"")
    Image.new("RGB", (5, 7)).save(folder / "000000000004.jpg")
    (folder / "000000000006.jpg").unlink()
    (folder / "000000000006.jpg").mkdir()  # the last; the first takes its place
    dataset = CocoDetection(tree, on_error="skip", transforms=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]))
    config = {"collate_fn": "coco_collate_fn", "kwargs": {"batch_size": 3, "num_workers": workers}}
    loader = build_loader(dataset, config, train=False, seed=0)
    set_position(loader, 0, Position())
    with caplog.at_level(logging.WARNING):
        batches = [(batch, unreadable_images(loader)) for batch in batches_of(loader)]
    targets = [target for (_, of_batch, *_), _ in batches for target in of_batch]
    assert [target["image_id"].item() for target in targets] == [1, 2, 5, 5, 5, 1]
    assert [count for _, count in batches] == [1, 2]
    wanted = CocoDetection(tree)[4][1]
    assert torch.equal(targets[2]["boxes"], wanted["boxes"])
    assert torch.equal(targets[3]["ground_truth"], wanted["ground_truth"])
    said = sorted(caplog.messages)
    assert len(said) == 3
    for message, name, taker in zip(said, "346", "551", strict=True):
        assert message.startswith(f"{folder}/00000000000{name}.jpg: ")
        assert message.endswith(f"; {folder}/00000000000{taker}.jpg takes its place")


def test_the_picture_of_an_id(shapes: Path) -> None:
    dataset = CocoDetection(shapes, "val", keep_empty=False, transforms=v2.ToImage())
    for at, image_id in enumerate(dataset.image_ids):
        assert np.array_equal(np.asarray(dataset.picture(image_id)), np.asarray(dataset[at][0]).transpose(1, 2, 0))
