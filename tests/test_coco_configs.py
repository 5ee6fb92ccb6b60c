"""The COCO experiments: the recipe's numbers, the reference's step by their own criteria, and small runs of each."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_helper import FILL, PARITY, made
from torch import Tensor, nn
from torchdistill.optim.registry import get_scheduler
from torchvision.ops import box_convert

from vkd_plugin.check import dry, examine, standin
from vkd_plugin.check.offline import offline
from vkd_plugin.cli import main
from vkd_plugin.config import Experiment, load_experiment
from vkd_plugin.config.changes import changes
from vkd_plugin.config.experiment import resolve
from vkd_plugin.datasets.coco_shapes import write_tree
from vkd_plugin.engine import run as engine_run
from vkd_plugin.engine.box import EngineBox, build_box
from vkd_plugin.engine.meter import TermMeter
from vkd_plugin.engine.precision import Precision
from vkd_plugin.models import fasterrcnn_resnet18_fpn, retinanet_resnet18_fpn, vidt_swin_nano, vidt_swin_tiny
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.data import Row

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "coco2017"
FILES = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.yaml"))}
VIDT = [name for name in FILES if "vidt" in name]
NANO, TINY = (f"vkd/vidt_swin_{size}_from_vidt_swin_base.yaml" for size in ("nano", "tiny"))
MATCHING = "token_matching/vidt_swin_nano_from_vidt_swin_base.yaml"
FASTER = "vkd/fasterrcnn_resnet18_fpn_from_fasterrcnn_resnet50_fpn.yaml"
RETINA = "vkd/retinanet_resnet18_fpn_from_retinanet_resnet50_fpn.yaml"
RECORDED = json.loads((PARITY / "vidt_nano.json").read_text())
PLACES = [*(f"patch{i}" for i in range(4)), "body", "neck"]
CPU = torch.device("cpu")


def unbuilt(name: str) -> Experiment:
    return Experiment(str(FILES[name]), resolve(FILES[name])[0], {})


def built(name: str, *overrides: str) -> dict[str, Any]:
    return load_experiment(FILES[name], overrides, build=standin.build).data


def differences(first: str, second: str) -> set[str]:
    """Keys in which two files differ, but where the student is put."""
    return {change.key for change in changes(unbuilt(first).dump(), unbuilt(second))}


# The recipe.


@pytest.mark.parametrize("kind", ["vkd", "token_matching", "undistilled"])
def test_students_differ_in_size_alone(kind: str) -> None:
    tail, section = (".yaml", "model") if kind == "undistilled" else ("_from_vidt_swin_base.yaml", "student_model")
    found = differences(f"{kind}/vidt_swin_nano{tail}", f"{kind}/vidt_swin_tiny{tail}")
    own = f"models.{section}"
    assert found == {f"{own}.key", f"{own}.kwargs.drop_path_rate", f"{own}.kwargs.backbone_checkpoint"}


def test_controls_differ_by_the_distillation_alone() -> None:
    sides = ("train.student.", "train.criterion.kwargs.sub_terms.")
    assert {key for key in differences(NANO, MATCHING) if not key.startswith(sides)} == {
        "models.teacher_model.kwargs.checkpoint"
    }
    parts = ("models.", "train.teacher", "train.student", "train.model", "train.criterion.kwargs.sub_terms")
    assert all(key.startswith(parts) for key in differences(NANO, "undistilled/vidt_swin_nano.yaml"))


@pytest.mark.parametrize("name", VIDT)
def test_the_numbers_that_decide_are_the_recipes(name: str) -> None:
    data = built(name)
    train, student = data["train"], data["models"].get("student_model") or data["models"]["model"]
    assert (train["task"], train["num_epochs"], train["global_batch"]) == ("detection", 50, True)
    assert not {"amp", "ema"} & train.keys()
    loader = train["train_data_loader"]["kwargs"]
    assert (loader["batch_size"], loader["drop_last"]) == (12, True)
    assert student["kwargs"]["drop_path_rate"] == (0.2 if "swin_tiny" in name else 0.0)
    assert student["kwargs"]["num_classes"] == 91
    assert train["optimizer"] == {
        "key": "AdamW",
        "kwargs": {
            "lr": 1e-4,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 1e-4,
            "weight_decay_of": {"backbone": "matrices"},
        },
        "max_grad_norm": 0.1,
    }
    criterion = train["criterion"]["kwargs"]
    assert criterion["model_term"] == {"weight": 1.0}
    weights = {term: section["weight"] for term, section in criterion.get("sub_terms", {}).items()}
    assert weights == {"vkd": dict.fromkeys(PLACES, 4.0), "token_matching": {"matching": 4.0}}.get(
        Path(name).parts[0], {}
    )


def test_the_rate_in_each_epoch_is_the_references() -> None:
    config = built(NANO)["train"]["scheduler"]
    assert config.get("scheduling_step", 0) == 0  # after each epoch
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = get_scheduler(optimizer, config["key"], **config["kwargs"])
    for expected in RECORDED["lr_used_in_epoch"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_resized_as_the_reference_does(split: str) -> None:
    resizes = [x for x in transforms(built(NANO)["datasets"][f"coco2017/{split}"].transforms) if hasattr(x, "sizes")]
    found = [(resize.sizes, resize.max_size) for resize in resizes]
    many = (list(range(480, 801, 16)), 1333)
    assert found == ([many, ([400, 500, 600], None), many] if split == "train" else [([800], 1333)])


def transforms(of: Any) -> list[Any]:
    """Those that are made of others, and those others."""
    return [of, *(inner for part in getattr(of, "transforms", ()) for inner in transforms(part))]


# The reference's step.


def recorded_step(batch: str, dtype: torch.dtype, *overrides: str) -> tuple[EngineBox, dict[str, Tensor], list[Tensor]]:
    """The box of the experiment with the weights of the record, loss and terms of its step, and the images."""
    torch.manual_seed(0)
    config = copy.deepcopy(built(NANO, *overrides)["train"])
    student = FILL.fill_torch(vidt_swin_nano(dropout=0.0).to(dtype), RECORDED["fill"]["alias"])
    teacher = FILL.fill_torch(vidt_swin_tiny().to(dtype), RECORDED["fill"]["alias"], salt="teacher:").eval()
    sizes = RECORDED["inputs"][batch]["sizes_hw"]
    images = [made(f"{batch}.image{i}", (3, *size), scale=1.7).to(dtype) for i, size in enumerate(sizes)]
    targets = []
    for recorded, (height, width) in zip(RECORDED["targets"], sizes, strict=True):
        corners = box_convert(torch.tensor(recorded["boxes_cxcywh"], dtype=torch.float64), "cxcywh", "xyxy")
        boxes = corners * torch.tensor([width, height, width, height])
        targets.append({"boxes": boxes, "labels": torch.tensor(recorded["labels"])})
    loader = torch.utils.data.DataLoader([(images[0],)])  # its sample tells the projectors' sizes
    terms = TermMeter()
    box = build_box(
        lambda *_: [loader, None],
        Precision(None, CPU),
        terms,
        {},
        False,
        teacher,
        student,
        {},
        config,
        CPU,
        None,
        False,
        1,
    )
    box.student.to(dtype).train()
    for name, feature in box.student.features.items():
        module = f"{name}_det_projector" if name in ("body", "neck") else f"patch_projector_{int(name[-1]) + 1}"
        base = FILL.orthonormal(f"{module}.projector.parametrizations.weight.0.base", 256, 256)
        feature.projector.weight = torch.from_numpy(base).to(dtype)
    loss = box.forward_process(images, targets, {})
    return box, {**terms.take(loss), "total": loss}, images


@pytest.mark.parametrize(("batch", "dtype", "tolerance"), [("odd", "float64", 1e-9), ("padded", "float32", 1e-4)])
def test_the_step_of_the_reference(batch: str, dtype: str, tolerance: float) -> None:
    """All of its losses, weighted and summed, and which parameters decay."""
    recorded = RECORDED[dtype][batch]
    box, found, _ = recorded_step(batch, getattr(torch, dtype))
    try:
        # The meter keeps terms in float32.
        names = {**dict(zip(PLACES[:4], PLACES[:4], strict=True)), "body": "body_det", "neck": "neck_det"}
        terms = {name: found[f"loss/{place}"].item() for place, name in names.items()}
        assert terms == pytest.approx(recorded["distillation_terms"], rel=max(tolerance, 1e-6))
        assert found["total"].item() == pytest.approx(recorded["weighted_total"], rel=tolerance)
        own = {name for name in found if name.startswith("loss/loss_")}
        assert len(own) == 21
        check_decay(box)
    finally:
        box.clean_modules()


def check_decay(box: EngineBox) -> None:
    decays = {id(p): group["weight_decay"] for group in box.optimizer.param_groups for p in group["params"]}
    sizes = {1e-4: 0, 0.0: 0}
    for name, parameter in box.bare_student.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decays
            continue
        left_out = name.startswith("backbone.") and (parameter.ndim < 2 or name.startswith("backbone.det_"))
        assert decays[id(parameter)] == (0.0 if left_out else 1e-4), name
        sizes[decays[id(parameter)]] += parameter.numel()
    assert all(decays[id(p)] == 0.0 for p in box.student.features.parameters())
    # As many numbers as in the reference's groups, less those without a gradient and the projectors, which decay there.
    frozen = {n: p.numel() for n, p in box.bare_student.named_parameters() if not p.requires_grad}
    assert set(frozen) == set(RECORDED["float64"]["odd"]["parameters_without_gradient"])
    heads, small, body = (group["n_elements"] for group in RECORDED["optimizer"]["groups"])
    matrices = sum(n for name, n in frozen.items() if "expansion" in name)
    assert sizes[1e-4] == heads + body - 6 * (256 * 256 + 2 * 256) - frozen["transformer.level_embed"] - matrices
    assert sizes[0.0] == small - (sum(frozen.values()) - frozen["transformer.level_embed"] - matrices)


MASK = (
    "train.criterion.kwargs.sub_terms.patch0.criterion_wrapper.kwargs.mask={module: model.patch_masks.0}",
    f"train.student.forward_hook.output=[model.patch_masks.0, {', '.join(f'features.{place}' for place in PLACES)}]",
)


def test_padding_is_left_out_of_the_patches_by_a_switch() -> None:
    box, found, images = recorded_step("padded", torch.float64, *MASK)
    try:
        assert [tuple(image.shape[1:]) for image in images] == [(128, 160), (96, 128)]
        valid = torch.zeros(2, 16, 20, dtype=torch.bool)
        valid[0], valid[1, :12, :16] = True, True
        seen = {}
        for side, model in (("student", box.bare_student), ("teacher", box.teacher_model)):
            handle = model.patch_tokens[0].register_forward_hook(
                lambda _module, _args, output, side=side: seen.__setitem__(side, output.permute(0, 2, 3, 1)[valid])
            )
            with torch.no_grad():
                model(images, None) if side == "teacher" else model.raw_outputs(images)
            handle.remove()
        rows = [seen["student"] @ box.student.features["patch0"].projector.weight.T, seen["teacher"]]
        student, teacher = ((x - x.mean(0)) / x.std(0) for x in rows)
        assert len(student) == 16 * 20 + 12 * 16
        expected = nn.functional.smooth_l1_loss(student, teacher).item()
        assert found["loss/patch0"].item() == pytest.approx(expected, rel=1e-6)
        counted = RECORDED["float64"]["padded"]["distillation_terms"]
        assert found["loss/patch0"].item() != pytest.approx(counted["patch0"], rel=1e-3)
        assert found["loss/patch1"].item() == pytest.approx(counted["patch1"], rel=1e-6)
    finally:
        box.clean_modules()


# Small runs.


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tree(tmp_path / "coco", train=3, val=2, size=64, objects=2)
    monkeypatch.chdir(ROOT)
    return tmp_path / "coco"


def small(name: str, root: Path | None = None) -> list[str]:
    """Overrides that make an experiment small; without ``root`` its data are not there."""
    train = "datasets.coco2017/train.init.kwargs.transforms.init.kwargs.transforms"
    branch = f"{train}.1.init.kwargs.transforms"
    overrides = ["train.num_epochs=1", "train.train_data_loader.kwargs={batch_size: 2, drop_last: True}"]
    overrides += ["train.val_data_loader.kwargs={batch_size: 2}", "test.test_data_loader.kwargs={batch_size: 2}"]
    if root is not None:
        overrides += [f"datasets._root={root}"]
    if "vidt" not in name:
        sizes = "num_classes: 91, min_size: 64, max_size: 96"
        few = "box_detections_per_img: 5, rpn_pre_nms_top_n_train: 20, rpn_post_nms_top_n_train: 20"
        sizes += f", {few}" if "fasterrcnn" in name else ", topk_candidates: 5, detections_per_img: 5"
        overrides += [f"models.teacher_model.kwargs={{{sizes}, weights: null, weights_backbone: null}}"]
        return [*overrides, f"models.student_model.kwargs={{{sizes}}}"]
    vidt = "{num_queries: 6, hidden_dim: 64, decoder_layers: 2, feedforward_dim: 64, num_classes: 91}"
    sections = ["model"] if name.startswith("undistilled") else ["teacher_model", "student_model"]
    overrides += [f"models.{section}.key=vidt_swin_nano" for section in sections]
    overrides += [f"models.{section}.kwargs={vidt}" for section in sections]
    overrides += [f"{branch}.0.init.kwargs.sizes=[48, 64]"]
    overrides += [f"{branch}.1.init.kwargs.transforms.0.init.kwargs.sizes=[48]"]
    overrides += [f"{branch}.1.init.kwargs.transforms.1.init.kwargs={{min_size: 32, max_size: 40}}"]
    return [*overrides, f"{train.replace('train', 'val', 1)}.0.init.kwargs.sizes=[64]"]


def run(name: str, root: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """The record of the one epoch of a small run."""
    sets = [word for override in (*small(name, root), *overrides) for word in ("--set", override)]
    section = "model" if name.startswith("undistilled") else "student_model"
    sets += ["--set", f"models.{section}.dst_ckpt={folder}/student.pt"]
    assert main(["--config", str(FILES[name]), "--output", str(folder), "--device", "cpu", "-student_only", *sets]) == 0
    (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return record


def test_a_check_needs_no_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to assign predictions to objects, and to leave padding out: a step with contents takes a minute."""
    tried: list[bool] = []
    monkeypatch.setattr(
        dry.Attempt, "run", lambda self, do=dry.Attempt.run: (tried.append(self.contents.real), do(self))
    )
    facts = examine(FILES[NANO], [*small(NANO), *MASK])
    assert (facts.problems, tried) == ([], [False])
    (stage,) = facts.stages
    assert [(term.name, term.weight, term.has_gradient) for term in stage.terms] == [
        (place, 4.0, True) for place in PLACES
    ]
    projectors = {f.path: f.projector for f in stage.features if f.projector}
    assert projectors == {f"features.{place}": "OrthogonalProjector 64 -> 64, matrix_exp" for place in PLACES}


@pytest.mark.parametrize(
    "name",
    [NANO, MATCHING, "undistilled/vidt_swin_nano.yaml", RETINA, pytest.param(FASTER, marks=pytest.mark.slow)],
)
def test_a_small_run(name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_run, "prove", lambda experiment: []
    )  # the tests above and below do, and it takes longest
    record = run(name, shapes, tmp_path / "run")
    assert record["step"] == 1
    terms = built(name)["train"]["criterion"]["kwargs"].get("sub_terms", {})
    own = sum(value for key, value in record.items() if key.startswith("loss/loss_") or key == "loss/bbox_regression")
    own += record.get("loss/classification", 0.0)
    weighted = sum(term["weight"] * record[f"loss/{place}"] for place, term in terms.items())
    assert record["loss"] == pytest.approx(own + weighted, rel=1e-4)
    assert all(record[f"loss/{place}"] > 0 for place in terms)
    assert {key.partition("/")[2] for key in record if key.startswith("orthogonality_error/")} == (
        set(terms) if name.startswith("vkd/") else set()
    )
    assert "val/AP" in record


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_experiment_takes_a_step_as_it_is(name: str) -> None:
    """On made-up images in the place of COCO's, weights as they are initialised."""
    sections = ["model"] if name.startswith("undistilled") else ["student_model"]
    overrides = [f"models.{section}.kwargs.backbone_checkpoint=null" for section in sections if "vidt" in name]
    if "vidt" in name and not name.startswith("undistilled"):
        overrides += ["models.teacher_model.kwargs.checkpoint=null"]
    facts = examine(FILES[name], overrides)
    assert facts.problems == []
    assert all(": nothing is at '" in warning for warning in facts.warnings)


def test_small_bodies_of_torchvisions_detectors(tmp_path: Path) -> None:
    def trained(model: nn.Module) -> set[str]:
        return {
            name.split(".")[2]
            for name, p in model.named_parameters()
            if name.startswith("backbone.body.") and p.requires_grad
        }

    with offline():  # the weights stay as they are initialised
        begun = fasterrcnn_resnet18_fpn(weights_backbone="IMAGENET1K_V1", trainable_backbone_layers=2)
    assert trained(begun) == {"layer3", "layer4"}
    assert not [m for m in begun.modules() if isinstance(m, nn.BatchNorm2d)]
    afresh = fasterrcnn_resnet18_fpn()
    assert trained(afresh) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    torch.save(afresh.state_dict(), tmp_path / "weights.pt")
    again = fasterrcnn_resnet18_fpn(checkpoint=str(tmp_path / "weights.pt"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in afresh.state_dict().items())
    with pytest.raises(ValueError, match=r"no weights_backbone 'IMAGENET1K_V2' .did you mean 'IMAGENET1K_V1'"):
        retinanet_resnet18_fpn(weights_backbone="IMAGENET1K_V2")


def test_weights_that_are_not_here_are_said() -> None:
    found = [
        str(problem) for problem in examine(FILES[NANO], ["models.teacher_model.kwargs.checkpoint=/no/t.pth"]).problems
    ]
    assert len(found) == 2
    assert any(
        problem.endswith("models.teacher_model.kwargs.checkpoint: /no/t.pth: no such checkpoint") for problem in found
    )
    own = "swin_nano_patch4_window7_224.pth: no such checkpoint"
    assert any("kwargs.backbone_checkpoint: " in problem and problem.endswith(own) for problem in found)


TABLE = load_table(ROOT / "configs" / "tables" / "coco.yaml")
ROWS = [row for row in TABLE.rows if row.config]


def test_the_table_names_each_experiment_of_the_paper() -> None:
    assert {str(FOLDER / name) for name in VIDT} == {str(ROOT / str(row.config)) for row in ROWS}
    assert len({(row.config, row.overrides) for row in ROWS}) == len(ROWS) == 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_of_the_table_are_experiments(row: Row) -> None:
    data = load_experiment(ROOT / row.config, row.overrides, build=standin.build).data
    student = data["models"].get("student_model") or data["models"]["model"]
    assert student["key"] == f"vidt_swin_{row.name.partition(':')[0].partition('-')[2]}"
    if "teacher" in row.name:
        teacher = row.name.partition("teacher ")[2].partition(" ")[0].strip(",")
        assert data["models"]["teacher_model"]["key"] == f"vidt_swin_{teacher}"
