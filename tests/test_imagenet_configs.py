"""The ImageNet experiments: what they share, and the recipe's numbers."""

from pathlib import Path

import pytest

from vkd_plugin.check import examine, standin
from vkd_plugin.config import Experiment, load_experiment
from vkd_plugin.config.changes import changes
from vkd_plugin.config.experiment import resolve
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Row

FOLDER = Path(__file__).parents[1] / "configs" / "ilsvrc2012"
FILES = sorted(
    path for path in FOLDER.rglob("*.yaml") if path.stem != "resnet18_from_resnet34"
)  # torchdistill's recipe


def unbuilt(name: str) -> Experiment:
    path = FOLDER / name
    return Experiment(str(path), resolve(path)[0], {})


def differences(first: str, second: str) -> set[str]:
    """Keys in which two files differ, but where the student is put."""
    return {change.key for change in changes(unbuilt(first).dump(), unbuilt(second))}


@pytest.mark.parametrize(
    ("tiny", "small", "model"),
    [
        ("vkd/deit_tiny_from_regnety_160.yaml", "vkd/deit_small_from_regnety_160.yaml", "student_model"),
        ("kd/deit_tiny_from_regnety_160.yaml", "kd/deit_small_from_regnety_160.yaml", "student_model"),
        (
            "deit_distill/deit_tiny_from_regnety_160.yaml",
            "deit_distill/deit_small_from_regnety_160.yaml",
            "student_model",
        ),
        ("ce/deit_tiny.yaml", "ce/deit_small.yaml", "model"),
    ],
)
def test_students_differ_in_size_alone(tiny: str, small: str, model: str) -> None:
    assert differences(tiny, small) == {f"models.{model}.kwargs.name"}


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_logits_alone_differ_from_vkd_by_the_feature_alone(size: str) -> None:
    name = f"deit_{size}_from_regnety_160.yaml"
    sides = "train.student.", "train.teacher.forward_hook.", "train.criterion.kwargs.sub_terms."
    found = differences(f"vkd/{name}", f"kd/{name}")
    assert all(key.startswith(sides) for key in found)
    terms = {key.split(".")[4] for key in found if key.startswith(sides[2])}
    assert terms == {"ce", "kl", "vkd"}  # hook paths of the first two lose the wrapper's 'model.'
    assert {key for key in found if ".ce." in key or ".kl." in key} == {
        "train.criterion.kwargs.sub_terms.ce.criterion_wrapper.kwargs.input.module_path",
        "train.criterion.kwargs.sub_terms.kl.criterion_wrapper.kwargs.student.module",
    }


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_labels_alone_see_the_same_images_in_the_same_way(size: str) -> None:
    found = differences(f"kd/deit_{size}_from_regnety_160.yaml", f"ce/deit_{size}.yaml")
    parts = ("models.", "train.teacher", "train.student", "train.model", "train.criterion.kwargs.sub_terms.")
    assert all(key.startswith(parts) for key in found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_numbers_that_decide_are_the_recipes(path: Path) -> None:
    data = load_experiment(path, build=standin.build).data
    train = data["train"]
    assert train["num_epochs"] == 300
    assert train["amp"] == {"dtype": "float16"}
    loader = train["train_data_loader"]["kwargs"]
    assert (loader["batch_size"], loader["drop_last"], train["global_batch"]) == (512, True, True)
    numbers = {"lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05, "weight_decay_of": "matrices"}
    assert train["optimizer"] == {"key": "AdamW", "kwargs": {**numbers, "fused": True}}
    scheduler = train["scheduler"]
    assert scheduler["kwargs"] == {"total_steps": 300 * (1_281_167 // 512), "min_lr": 5e-6, "delay": 1}
    assert scheduler["scheduling_step"] == 1
    for term in train["criterion"]["kwargs"]["sub_terms"].values():
        assert term["weight"] == (0.5 if path.parent.name == "deit_distill" else 1.0)
    mixing = train["train_data_loader"]["collate_fn"].mixup
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.label_smoothing) == (0.8, 1.0, 0.1)
    assert (mixing.mix_prob, mixing.switch_prob, mixing.mode) == (1.0, 0.5, "batch")
    student = data["models"].get("student_model") or data["models"]["model"]
    assert set(student["kwargs"]) == {"name"}  # no dropout, no drop path


ROWS = [
    row
    for name in ("imagenet", "imagenet_ablation")
    for row in load_table(FOLDER.parents[0] / "tables" / f"{name}.yaml").rows
    if row.overrides
]
SMALL_TEACHER = (
    "models.teacher_model.kwargs={name: test_resnet}",
    "train.teacher.forward_hook.output=[layer4]",
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_of_the_tables_take_a_step_and_follow_their_schedule_to_its_end(row: Row) -> None:
    """The teacher is a small one here; that of the recipe is checked with the files themselves."""
    hook = "train.criterion.kwargs.sub_terms.vkd.criterion_wrapper.kwargs.teacher.module=layer4"
    small = (*SMALL_TEACHER, hook) if "/vkd/" in row.config else SMALL_TEACHER[:1]
    facts = examine(FOLDER.parents[1] / row.config, (*row.overrides, *small))
    assert facts.problems == []
    (stage,) = facts.stages
    steps = stage.epochs * (1_281_167 // stage.batch_size)
    assert f"train.scheduler.kwargs.total_steps={steps}" in row.overrides or steps == 300 * 2502
