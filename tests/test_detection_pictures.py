"""Pictures of detections: which images, which boxes where and in which colour, and what cannot be drawn."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vkd_plugin.errors import UserError
from vkd_plugin.tasks.coco_ap import Seen
from vkd_plugin.tasks.pictures import CROWD, FOUND, TRUTH, Pictures

GAP = 4  # between panels, and around them


def seen(truth: list[list[float]], boxes: list[list[float]] = (), scores: list[float] = ()) -> Seen:  # type: ignore[assignment]
    """Objects and detections of the label 1."""
    found = np.array(boxes, dtype=float).reshape(-1, 4)
    rows = [[*box, box[2] * box[3], 1, crowd] for *box, crowd in truth]
    return Seen(
        found, np.array(scores), np.ones(len(found), dtype=np.int64), np.array(rows, dtype=float).reshape(-1, 7)
    )


def panels(
    tmp_path: Path, images: Mapping[int, Seen], read: Callable[[int], Image.Image], **kwargs: float
) -> np.ndarray:
    """The grid without the white around it, (H, W, 3)."""
    given = {"count": 4, "score": 0.5, **kwargs}
    Pictures(int(given["count"]), given["score"], read, ["N/A", "digit"]).draw(tmp_path / "run" / "p.png", images)
    with Image.open(tmp_path / "run" / "p.png") as grid:
        return np.asarray(grid.convert("RGB"))[GAP:-GAP, GAP:-GAP]


def outline(panel: np.ndarray, colour: tuple[int, int, int]) -> list[int]:
    """Left, top, right, bottom of all that has the colour."""
    rows, columns = np.nonzero((panel == colour).all(axis=2))
    return [int(x) for x in (columns.min(), rows.min(), columns.max(), rows.max())] if len(rows) else []


def black(width: int, height: int) -> Callable[[int], Image.Image]:
    return lambda _: Image.new("RGB", (width, height))


def test_objects_on_the_left_and_detections_over_them_on_the_right(tmp_path: Path) -> None:
    boxes = [[100, 150, 80, 60], [5, 5, 20, 20]]
    image = seen([[40, 30, 100, 90, 0], [200, 100, 50, 60, 1]], boxes, [0.75, 0.4])
    grid = panels(tmp_path, {3: image}, black(300, 240))  # in its own size
    assert grid.shape == (240, 2 * 300 + GAP, 3)
    left, right = grid[:, :300], grid[:, 300 + GAP :]
    for panel in (left, right):
        assert outline(panel, TRUTH) == [40, 30, 140, 120]
        assert outline(panel, CROWD) == [200, 100, 250, 160]
    assert outline(left, FOUND) == []
    assert outline(right, FOUND) == [100, 150, 180, 210]  # and not the one with a lower score
    names = [(panel[32:50, 43:80] == TRUTH).all(axis=2).sum() for panel in (left, right)]
    assert names[0] > 50 > names[1]  # objects are named on the left, where no detection hides the names


@pytest.mark.parametrize(("size", "scale"), [((800, 400), 0.5), ((64, 48), 3), ((300, 100), 1)])
def test_images_are_scaled_evenly(size: tuple[int, int], scale: float, tmp_path: Path) -> None:
    grid = panels(tmp_path, {1: seen([[10, 20, 40, 20, 0]])}, black(*size))
    width, height = (round(side * scale) for side in size)
    assert grid.shape == (height, 2 * width + GAP, 3)
    assert outline(grid[:, -width:], TRUTH) == [round(x * scale) for x in (10, 20, 50, 40)]


def test_what_has_no_place_in_the_image_is_cut_off(tmp_path: Path) -> None:
    boxes = [[-50, -10, 1000, 1000], [300, 0, 50, 50], [10, 10, 0, 5], [20, 20, -5, 5]]
    grid = panels(tmp_path, {1: seen([[50, 60, 0, 10, 0]], boxes, [0.9] * 4)}, black(240, 200))
    assert outline(grid, TRUTH) == []
    assert outline(grid[:, 240 + GAP :], FOUND) == [0, 0, 239, 199]


def test_the_same_images_in_whatever_order_they_come(tmp_path: Path) -> None:
    ids = [40, 2, 31, 7, 5, 90, 12, 66, 3]
    asked: list[list[int]] = []
    for order in (ids, sorted(ids), ids[::-1]):
        asked.append([])

        def read(image_id: int, to: list[int] = asked[-1]) -> Image.Image:
            to.append(image_id)
            return Image.new("RGB", (200, 100 + image_id))

        grid = panels(tmp_path, {i: seen([]) for i in order}, read, count=5)
        assert grid.shape == (2 * 190 + GAP, 8 * 200 + 7 * GAP, 3)  # four pairs in a row, as high as the highest
    assert asked == [[2, 5, 12, 40, 90]] * 3
    assert panels(tmp_path, {i: seen([]) for i in ids[:2]}, black(200, 90), count=5).shape[1] == 4 * 200 + 3 * GAP


def test_labels_without_a_name_are_numbers() -> None:
    pictures = Pictures(1, 0.5, black(9, 9), ["N/A", "digit"])
    assert [pictures._name(label) for label in (1.0, np.int64(7), -1)] == ["digit", "7", "-1"]


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    def gone(image_id: int) -> Image.Image:
        return Image.open(tmp_path / "gone.jpg")

    with pytest.raises(UserError, match=r"p\.png: cannot be drawn: No such file or directory"):
        panels(tmp_path, {1: seen([])}, gone)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "p.png").mkdir()
    with pytest.raises(UserError, match=r"p\.png: cannot be drawn: Is a directory"):
        panels(tmp_path, {1: seen([])}, black(200, 90))
