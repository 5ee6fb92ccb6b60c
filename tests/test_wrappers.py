"""ProjectedStudent: what it gives torchdistill, what it infers, what it saves, and what it says about mistakes."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchdistill.core.distillation import DistillationBox
from torchdistill.models.registry import get_auxiliary_model_wrapper

import vkd_plugin
from vkd_plugin.wrappers import ProjectedStudent


class TokenStudent(nn.Module):
    """Patches to tokens (class token first), one block, norm, head."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 6))
        self.block = nn.Linear(6, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = self.norm(self.block(tokens))
        return self.head(self.batch_norm(tokens[:, 0]))


class ConvTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.final_conv = nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.final_conv(x).mean((2, 3)))


FEATURES: dict[str, Any] = {
    "tokens": {
        "module": "norm",
        "readout": "mean_patch_tokens",
        "projector": {"in_features": 6, "out_features": 10},
    },
    "cls": {
        "module": "block",
        "io": "input",
        "readout": "class_token",
        "projector": {"key": "MLPProjector", "in_features": 6, "out_features": 4},
    },
}


def _wrapper(**kwargs: Any) -> ProjectedStudent:
    return ProjectedStudent(TokenStudent(), **{"features": copy.deepcopy(FEATURES), **kwargs})


def _outputs(wrapper: ProjectedStudent, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, output, name=name: found.__setitem__(name, output))
        for name, module in wrapper.features.items()
    ]
    wrapper(x)
    for handle in handles:
        handle.remove()
    return found


def test_it_returns_the_students_output_and_projects_each_feature() -> None:
    wrapper, x = _wrapper().eval(), torch.randn(5, 1, 8, 8)
    student = wrapper.model
    torch.testing.assert_close(wrapper(x), student(x))
    found = _outputs(wrapper, x)
    tokens = student.norm(student.block(_embedded(student, x)))
    expected = tokens[:, 1:].mean(1) @ wrapper.features["tokens"].projector.weight.T
    torch.testing.assert_close(found["tokens"], expected)
    torch.testing.assert_close(found["cls"], wrapper.features["cls"].projector(_embedded(student, x)[:, 0]))


def _embedded(student: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens = student.embed(x).flatten(2).mT
    return torch.cat([student.class_token.expand(len(x), -1, -1), tokens], dim=1)


def test_each_projectors_parameters_get_gradients_and_change() -> None:
    torch.manual_seed(0)  # a rectifier may be off for all five samples
    wrapper = _wrapper()
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in wrapper.features.named_parameters()}
    assert before
    found = _outputs(wrapper, torch.randn(5, 1, 8, 8))
    sum((f - 1).square().mean() for f in found.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in wrapper.features.parameters())
    assert wrapper.model.embed.weight.grad.abs().max() > 0
    optimizer.step()
    after = dict(wrapper.features.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_its_state_dict_is_the_bare_students() -> None:
    wrapper = _wrapper()
    state = wrapper.state_dict()
    bare = TokenStudent()
    assert list(state) == list(bare.state_dict())
    bare.load_state_dict(state)
    other = _wrapper()
    projectors = copy.deepcopy(other.projector_state_dict())
    other.load_state_dict(state)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())
    assert all(torch.equal(v, other.projector_state_dict()[k]) for k, v in projectors.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "nonsense.weight": torch.zeros(1)})


def test_its_state_dict_below_another_module() -> None:
    outer = nn.ModuleDict({"a": _wrapper(), "b": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert {k for k in state if k.startswith("a.")} == {f"a.{k}" for k in TokenStudent().state_dict()}
    outer.load_state_dict(state)


def test_projectors_round_trip() -> None:
    one, two = _wrapper(), _wrapper()
    two.load_projector_state_dict(one.projector_state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(one.features["tokens"].projector(x), two.features["tokens"].projector(x))


def test_a_copy_is_independent() -> None:
    wrapper = _wrapper()
    twin = copy.deepcopy(wrapper)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for p in wrapper.parameters():
            p.zero_()
    assert _outputs(twin.eval(), x)["cls"].abs().max() > 0


def test_the_student_outside_of_the_wrapper_holds_no_features() -> None:
    wrapper = _wrapper()
    wrapper.model(torch.randn(3, 1, 8, 8))
    wrapper(torch.randn(3, 1, 8, 8))
    assert not wrapper._captured.by_thread


def test_names_kept_out_of_weight_decay() -> None:
    assert _wrapper().no_weight_decay() == {"features.tokens.projector.raw_weight"}


def test_projectors_checkpoint_of_torchdistills_scripts(tmp_path: Path) -> None:
    file = str(tmp_path / "below" / "projectors.pt")
    one = _wrapper(projectors_ckpt=file)
    one.post_epoch_process()
    two = _wrapper(projectors_ckpt=file)
    for key, value in one.projector_state_dict().items():
        assert torch.equal(value, two.projector_state_dict()[key])


def test_sizes_are_inferred_from_the_given_input_shape() -> None:
    features = copy.deepcopy(FEATURES)
    del features["tokens"]["projector"]["in_features"], features["cls"]["projector"]["in_features"]
    wrapper = _wrapper(features=features, input_shape=[1, 8, 8])
    assert wrapper.features["tokens"].projector.in_features == 6


def _train_config() -> dict[str, Any]:
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "data",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": 4},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False,
                    "forward_hook": {"input": [], "output": ["final_conv"]}},
        "student": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {
                "key": "ProjectedStudent",
                "kwargs": {"features": {"tokens": {"module": "norm", "readout": "mean_patch_tokens"}}},
            },
            "forward_hook": {"input": [], "output": ["features.tokens"]},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "weight_decay": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "vkd": {
                        "criterion": {"key": "VkDLoss", "kwargs": {"normalization": "layer_norm"}},
                        "criterion_wrapper": {
                            "key": "FeaturePair",
                            "kwargs": {
                                "student": {"module": "features.tokens"},
                                "teacher": {"module": "final_conv", "readout": "spatial_mean"},
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }  # fmt: skip


def _box(train_config: dict[str, Any]) -> DistillationBox:
    data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,)))
    device = torch.device("cpu")
    return DistillationBox(ConvTeacher(), TokenStudent(), {"data": data}, train_config, device, None, False, 1)


def test_in_torchdistills_own_box_sizes_are_inferred_and_everything_trains() -> None:
    box = _box(_train_config())
    projector = box.student_model.features["tokens"].projector
    assert (projector.in_features, projector.out_features) == (6, 10)
    assert [g["weight_decay"] for g in box.optimizer.param_groups] == [0.1, 0.0]
    before = projector.weight.detach().clone()
    statistics = box.teacher_model.final_conv[1].running_mean.clone()
    box.teacher_model.train()
    box.pre_epoch_process(epoch=0)
    for samples, targets, supplement in box.train_data_loader:
        box.post_forward_process(loss=box.forward_process(samples, targets, supplement))
    assert not torch.equal(before, projector.weight)
    assert torch.equal(statistics, box.teacher_model.final_conv[1].running_mean)


class Pyramid(nn.Module):
    """Puts out a mapping of maps, as torchvision's feature pyramids do."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(1, c, 3, padding=1) for c in channels)
        self.out = nn.Identity()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.passes += 1
        return self.out({str(i): level(x)[..., :: i + 1, :: i + 1] for i, level in enumerate(self.levels)})


def test_parts_of_what_a_module_puts_out_are_inferred_and_projected() -> None:
    config = _train_config()
    features = {
        f"level{i}": {"module": "out", "index": str(i), "readout": "every_location", "projector": {}} for i in range(2)
    }
    config["student"]["auxiliary_model_wrapper"]["kwargs"]["features"] = features
    config["student"]["forward_hook"]["output"] = [f"features.level{i}" for i in range(2)]
    config["teacher"]["forward_hook"]["output"] = ["out"]
    (term,) = config["criterion"]["kwargs"]["sub_terms"].values()
    config["criterion"]["kwargs"]["sub_terms"] = {
        f"level{i}": {**term, "criterion_wrapper": {"key": "FeaturePair", "kwargs": {
            "student": {"module": f"features.level{i}"},
            "teacher": {"module": "out", "index": str(i), "readout": "every_location"},
        }}} for i in range(2)
    }  # fmt: skip
    teacher, student = Pyramid(7, 9), Pyramid(3, 4)
    data = torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8), torch.zeros(4))
    box = DistillationBox(teacher, student, {"data": data}, config, torch.device("cpu"), None, False, 1)
    assert (teacher.passes, student.passes) == (1, 1)
    sizes = [(f.projector.in_features, f.projector.out_features) for f in box.student_model.features.values()]
    assert sizes == [(3, 7), (4, 9)]
    for samples, targets, supplement in box.train_data_loader:
        maps = {name: rows.detach() for name, rows in student(samples).items()}
        found = _outputs(box.student_model, samples)
        for i, feature in enumerate(box.student_model.features.values()):
            rows = maps[str(i)].permute(0, 2, 3, 1).flatten(0, 2)
            torch.testing.assert_close(found[f"level{i}"], rows @ feature.projector.weight.T)
        box.forward_process(samples, targets, supplement).backward()
        assert all(level.weight.grad.abs().max() > 0 for level in student.levels)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"index": "2"}, r"feature 'a': no index '2' in the output of module 'out', which is a mapping with the keys"),
        ({}, r"feature 'a': the output of module 'out' is a mapping .* not a tensor: choose one with 'index'"),
    ],
)
def test_parts_that_are_not_there_are_named(feature: dict[str, Any], message: str) -> None:
    spec = {"module": "out", "readout": "every_location", "projector": {"out_features": 4}, **feature}
    with pytest.raises(ValueError, match=message):
        ProjectedStudent(Pyramid(3, 4), {"a": spec}, input_shape=[1, 8, 8])


def test_inferring_sizes_changes_neither_models_nor_random_state() -> None:
    torch.manual_seed(3)
    student = TokenStudent().train()
    before = copy.deepcopy(student.state_dict())
    state = torch.get_rng_state()
    features = {"tokens": {"module": "norm", "readout": "class_token", "projector": {"out_features": 6}}}
    vkd_plugin.wrappers._infer_sizes(
        student,
        {"tokens": vkd_plugin.wrappers._feature_spec("tokens", features["tokens"], student)},
        [1, 8, 8],
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())
    assert all(m.training for m in student.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modul": "norm"}, r"feature 'tokens': unknown key 'modul' \(did you mean 'module'\?\)"),
        ({"module": "nrom"}, r"feature 'tokens': the student has no module 'nrom' \(did you mean 'norm'\?\)"),
        ({"io": "outputs"}, r"feature 'tokens': io should be 'input' or 'output', got 'outputs'"),
        ({"readout": "mean_tokens"}, r"feature 'tokens': no readout 'mean_tokens' \(did you mean '\w+'\?\)"),
        ({"readout": "spatial_mean", "projector": {"out_features": 4}}, r"'tokens': readout 'spatial_mean' reads"),
        ({"projector": {"key": "OrthogonalProjecto", "in_features": 6, "out_features": 9}},
         r"feature 'tokens': .*OrthogonalProjector"),
        ({"projector": {"orthogonal_map": "cayly", "in_features": 6, "out_features": 9}}, r"'tokens': .*cayley"),
        ({"projector": {"in_features": 6}}, r"feature 'tokens': give its projector out_features"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    features = {"tokens": {**copy.deepcopy(FEATURES["tokens"]), **change}}
    with pytest.raises(ValueError, match=message):
        _wrapper(features=features, input_shape=[1, 8, 8])


def test_without_prefix_tokens_known_the_user_is_asked() -> None:
    student = TokenStudent()
    student.__class__ = type("Plain", (TokenStudent,), {"num_prefix_tokens": None})
    with pytest.raises(ValueError, match="Plain does not say how many class and distillation tokens it has"):
        ProjectedStudent(student, copy.deepcopy(FEATURES))


def test_registered_under_its_class_name() -> None:
    wrapper = get_auxiliary_model_wrapper(
        "ProjectedStudent", student_model=TokenStudent(), features=copy.deepcopy(FEATURES),
        device=torch.device("cpu"), device_ids=None, distributed=False,
    )  # fmt: skip
    assert isinstance(wrapper, ProjectedStudent)


def test_importing_the_plugin_is_all_that_torchdistill_needs() -> None:
    code = (
        "from torchdistill.common.main_util import import_dependencies as i; i(['vkd_plugin']);"
        "from torchdistill.losses import registry as l; from torchdistill.models import registry as m;"
        "assert {'VkDLoss'} <= l.LOW_LEVEL_LOSS_DICT.keys() and 'FeaturePair' in l.LOSS_WRAPPER_DICT;"
        "assert 'ProjectedStudent' in m.AUXILIARY_MODEL_WRAPPER_DICT;"
        "assert {'OrthogonalProjector', 'Normalization'} <= m.ADAPTATION_MODULE_DICT.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
