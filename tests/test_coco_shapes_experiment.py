"""The small detection experiment: its files are sound and differ as they should, and it can be run from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vkd_plugin.check import examine, standin
from vkd_plugin.cli import main
from vkd_plugin.config import Experiment, load_experiment
from vkd_plugin.config.changes import changes
from vkd_plugin.config.experiment import resolve
from vkd_plugin.datasets.coco_shapes import main as make_shapes
from vkd_plugin.models import shapes_fcos

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "coco_shapes"
TEACHER, STUDENT = (FOLDER / "undistilled" / f"shapes_fcos_{name}.yaml" for name in ("teacher", "student"))
VKD = FOLDER / "vkd" / "shapes_fcos_student_from_teacher.yaml"


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


NO_TEACHER = "models.teacher_model.src_ckpt=null"
"""Its weights are not there before it is trained."""


def built(path: Path, *overrides: str) -> dict[str, Any]:
    return load_experiment(path, overrides, build=standin.build).data


@pytest.mark.parametrize("path", [TEACHER, STUDENT, VKD], ids=lambda path: path.stem)
def test_a_file_takes_a_step(path: Path) -> None:
    facts = examine(path, [NO_TEACHER] if path == VKD else [])
    assert facts.problems == []
    assert all(": nothing is at '" in warning for warning in facts.warnings)
    (stage,) = facts.stages
    assert [(term.name, term.has_gradient) for term in stage.terms] == [
        (f"level{level}", True) for level in range(3 if path == VKD else 0)
    ]


def test_students_differ_by_the_distillation_alone() -> None:
    plain, distilled = built(STUDENT), built(VKD, NO_TEACHER)
    saved = [data["models"][key].pop("dst_ckpt") for data, key in ((plain, "model"), (distilled, "student_model"))]
    assert saved[0] != saved[1]
    assert plain["models"]["model"] == distilled["models"]["student_model"]
    resolved = Experiment(str(STUDENT), resolve(STUDENT)[0], {})
    keys = {change.key for change in changes(Experiment(str(VKD), resolve(VKD)[0], {}).dump(), resolved)}
    sides = ("models.", "train.teacher", "train.student", "train.model", "train.criterion.kwargs.sub_terms")
    assert all(key.startswith(sides) for key in keys), keys


def test_the_teacher_is_the_one_that_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = built(TEACHER)["models"]["model"]
    monkeypatch.chdir(tmp_path)  # where it has not been trained
    (problem,) = examine(VKD).problems
    assert str(problem).endswith(f"models.teacher_model.src_ckpt: no checkpoint at '{written['dst_ckpt']}'")
    teacher = built(VKD, NO_TEACHER)["models"]["teacher_model"]
    assert (teacher["key"], teacher["kwargs"]) == (written["key"], written["kwargs"])


def test_every_object_has_a_location_that_learns_it() -> None:
    """Wherever it lies, if it is of the data's sizes: a location close to its centre, on the level of its size."""
    torch.manual_seed(0)
    model = shapes_fcos(num_classes=6, channels=32, num_convs=1).train()
    matched: list[torch.Tensor] = []
    compute = model.head.compute_loss
    model.head.compute_loss = lambda *args: (matched.extend(args[-1]), compute(*args))[1]
    long = torch.rand(300, 1) * 26 + 6
    sides = torch.cat([long, (long / (1 + 2 * torch.rand(300, 1))).clamp(min=4.1)], dim=1)
    sides[::2] = sides[::2].flip(1)
    corners = torch.rand(300, 2) * (64 - sides)
    boxes = torch.cat([corners, corners + sides], dim=1)
    targets = [{"boxes": box[None], "labels": torch.tensor([1])} for box in boxes]
    model(list(torch.zeros(300, 3, 64, 64)), targets)
    counts = torch.stack([(of_image >= 0).sum() for of_image in matched])
    assert len(counts) == 300
    lost = [box.tolist() for box, count in zip(boxes, counts, strict=True) if not count]
    assert not lost, f"{len(lost)} objects, such as {lost[0]}"


@pytest.mark.slow
def test_a_distilled_detector_beside_an_undistilled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The whole experiment as docs/coco.md has it; its figures are among the test's properties."""
    data = tmp_path / "data"
    sizes = ["--train", "1200", "--val", "200", "--size", "64", "--objects", "3", "--classes", "5"]
    assert make_shapes([str(data), *sizes]) == 0
    teacher = tmp_path / "teacher.pt"
    found: dict[str, float] = {}
    for path in (TEACHER, STUDENT, VKD):
        section = "student_model" if path == VKD else "model"
        saved = teacher if path == TEACHER else tmp_path / f"{path.stem}.pt"
        sets = [f"datasets._root={data}", f"models.{section}.dst_ckpt={saved}"]
        sets += [f"models.teacher_model.src_ckpt={teacher}"] if path == VKD else []
        words = [word for override in sets for word in ("--set", override)]
        run = tmp_path / path.stem
        assert main(["--config", str(path), *words, "--output", str(run), "-student_only"]) == 0
        found[path.stem] = json.loads((run / "summary.json").read_text())["last"]["val/AP"]
        record_property(path.stem, found[path.stem])
        assert (run / "detections.json").exists()
        assert (run / "detections.png").exists()
    print(found)
    assert found[TEACHER.stem] > found[STUDENT.stem] > 5  # detections at random have none
    assert found[VKD.stem] > 5
