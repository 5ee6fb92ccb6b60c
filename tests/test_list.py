"""run.py list: what is listed, what is said about it, and YAML that an experiment takes as it is."""

import copy
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchdistill.core.distillation import DistillationBox

from vkd_plugin.catalog import print_catalog
from vkd_plugin.catalog.component import UNKNOWN, Component
from vkd_plugin.catalog.docstring import parse, plain, table_row
from vkd_plugin.catalog.find import components_called, kinds_called
from vkd_plugin.catalog.kinds import KINDS, CatalogKind
from vkd_plugin.catalog.values import literal, public_name
from vkd_plugin.cli import main
from vkd_plugin.config import ConfigErrors, Experiment, load_experiment, references
from vkd_plugin.config.experiment import check_names
from vkd_plugin.config.nodes import entries
from vkd_plugin.config.problems import Problems
from vkd_plugin.config.schema import experiment as schema
from vkd_plugin.config.source import compose
from vkd_plugin.config.structure import check_structure
from vkd_plugin.config.tags import check_text
from vkd_plugin.config.trust import Trust
from vkd_plugin.engine.build import build_model
from vkd_plugin.projectors import PROJECTORS

DIGITS = Path("configs/digits/vkd/vit_from_cnn.yaml")
DISTILL = Path("tests/data/configs/distill.yaml")


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell that runs the tests asks of rich."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What ``run.py list`` prints, run to its end."""
    capsys.readouterr()
    assert main(["list", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line that ``run.py list`` prints on stderr, run to exit code 2."""
    capsys.readouterr()
    assert main(["list", *words]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def kind_called(name: str) -> CatalogKind:
    (kind,) = kinds_called(name)
    return kind


def snippet(kind: str, name: str) -> str:
    """The YAML of one component."""
    component, *_ = components_called(name, [kind_called(kind)], [])  # the second may be timm's
    return kind_called(kind).snippet(component)


@functools.cache
def everything() -> list[tuple[CatalogKind, Component]]:
    return [(kind, component) for kind in KINDS for component in kind.find([])]


# --- pasting ----------------------------------------------------------------------------------------------------


def paste(root: yaml.MappingNode, text: str) -> yaml.MappingNode:
    """``root`` with a snippet in it; only what lies on the way to the snippet is copied."""
    node = compose(text, "snippet")
    if isinstance(node, yaml.SequenceNode):  # an item of a list of transforms
        call = compose("datasets:\n  pasted: !import_call\n    key: torchvision.transforms.Compose\n", "snippet")
        assert isinstance(call, yaml.MappingNode)
        init = compose("init: {kwargs: {transforms: }}", "snippet")
        assert isinstance(init, yaml.MappingNode)
        init.value[0][1].value[0][1].value[0] = (init.value[0][1].value[0][1].value[0][0], node)
        call.value[0][1].value[0][1].value += init.value
        node = call
    assert isinstance(node, yaml.MappingNode), text
    return merged(root, node)


def merged(root: yaml.MappingNode, other: yaml.MappingNode) -> yaml.MappingNode:
    """``other`` wins; what has a ``key`` of its own replaces what stood there."""
    result = copy.copy(root)
    present = entries(root)
    for name, (key, value) in entries(other).items():
        old = present[name][1] if name in present else None
        both = isinstance(old, yaml.MappingNode) and isinstance(value, yaml.MappingNode)
        keep = (both and "key" not in entries(value)) or name == "criterion"
        present[name] = (key, merged(old, value) if keep and isinstance(old, yaml.MappingNode) else value)
    result.value = list(present.values())
    return result


def without(root: yaml.MappingNode, *path: str) -> yaml.MappingNode:
    """``root`` without the value at ``path``."""
    result, present = copy.copy(root), entries(root)
    if len(path) == 1:
        present.pop(path[0], None)
    else:
        key, value = present[path[0]]
        assert isinstance(value, yaml.MappingNode)
        present[path[0]] = (key, without(value, *path[1:]))
    result.value = list(present.values())
    return result


def with_optional(text: str) -> str:
    """A snippet whose commented arguments are given too."""
    lines = []
    for line in text.splitlines():
        match = re.fullmatch(r"( *)# ([\w ]+: ?.*)", line)
        lines.append(match[1] + match[2] if match and not line.startswith("#") else line)
    return "\n".join(lines).replace("{}  # for an argument, remove {}", "")


def filled(text: str, **values: str) -> str:
    """A snippet with what it leaves open filled in, by the key before it."""
    for name, value in values.items():
        text, count = re.subn(rf"(\b{name}: )'?<[^>]*>'?", rf"\g<1>{value}", text)
        assert count, f"nothing to fill in at {name}"
    assert not re.search(r"^[^#]*<\w", text, re.MULTILINE), f"left open:\n{text}"
    return text


@functools.cache
def root_of(path: Path) -> yaml.MappingNode:
    node = compose(path.read_text("utf-8"), str(path))
    assert isinstance(node, yaml.MappingNode)
    return node


def loaded(tmp_path: Path, base: Path, *snippets: str) -> Experiment:
    """A sound experiment with snippets pasted into it."""
    root = root_of(base)
    for text in snippets:
        root = paste(root, text)
    file = tmp_path / "pasted.yaml"
    file.write_text(str(yaml.serialize(root)), "utf-8")
    return load_experiment(file)


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plural)
def test_every_snippet_is_sound(kind: CatalogKind) -> None:
    """As printed it is YAML in its place; with all it offers, names and arguments are what the component takes."""
    base = without(root_of(DISTILL), "train", "train_data_loader", "kwargs", "batch_size")
    for component in kind.find([]):
        text = kind.snippet(component)
        paste(base, text)
        offered = with_optional(text)
        if component.name == "Adafactor":
            offered = re.sub(r".*\beps: .*\n", "", offered)  # a pair there, where the schema wants a number
        root = paste(base, offered)
        problems = Problems()
        found = check_structure(root, schema(root), problems)
        check_text(root, Trust(), problems)
        try:
            problems.raise_if_any()
            check_names(root, found, Trust())
        except ConfigErrors as error:
            pytest.fail(f"{component.name}: {error}\n{offered}")


def test_the_property_can_fail() -> None:
    """A snippet with a misspelt argument, or without a required one, is not sound."""
    text = snippet("schedulers", "StepLR")
    for wrong in (text.replace("gamma", "gama"), re.sub(r".*step_size.*\n", "", text)):
        root = paste(root_of(DISTILL), with_optional(wrong))
        found = check_structure(root, schema(root), Problems())
        with pytest.raises(ConfigErrors, match=r"gama|needs the argument 'step_size'"):
            check_names(root, found, Trust())


def test_required_arguments_stand_in_every_snippet_and_others_as_comments() -> None:
    for kind, component in everything():
        text = kind.snippet(component)
        for argument in component.arguments:
            live = re.search(rf"^[^#]*\b{argument.name}:", text, re.MULTILINE)
            if argument.required:
                assert live, f"{component.name} needs {argument.name}:\n{text}"
            else:
                assert re.search(rf"\b{argument.name}:", text), f"{component.name}, {argument.name}:\n{text}"


def test_nothing_that_torchdistill_supplies_is_asked_for() -> None:
    given = {"optimizer", "params", "student_model", "teacher_model", "device_ids", "distributed", "org_dataset"}
    for kind, component in everything():
        if kind.plural == "adaptation modules":
            continue  # nothing is supplied to those, and torch.nn.DataParallel is one
        assert not given & {argument.name for argument in component.arguments}, component.name


def test_base_classes_helpers_and_imports_are_not_listed() -> None:
    names = {(kind.plural, component.name) for kind, component in everything()}
    helpers = ["Optimizer", "LRScheduler", "Any", "Counter", "partial", "Module", "Tensor", "VisionDataset", "Sampler"]
    assert not {name for _, name in names} & set(helpers)
    assert ("batch samplers", "BatchSampler") in names
    assert ("batch samplers", "RandomSampler") not in names  # torchdistill's registry has it, of no use
    assert ("samplers", "SubsetRandomSampler") not in names  # it takes indices where the data set is given
    assert ("transforms", "InterpolationMode") not in names
    assert ("schedulers", "SequentialLR") not in names  # it would need the optimizer in the file


def test_counts_agree_with_the_tables_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {entry["kind"]: entry["count"] for entry in json.loads(said(capsys, "--json"))["kinds"]}
    assert counts["projectors"] == len(PROJECTORS)
    assert counts["forward processes"] == len(references.NAMES["forward process"])
    assert counts["loss wrappers"] == len(references.COMPONENTS["loss wrapper"].registries[0])
    assert [*counts] == [kind.plural for kind in KINDS]
    assert all(count > 0 for count in counts.values()), counts
    text = said(capsys)
    for plural, count in counts.items():
        assert re.search(rf"^{plural} +{count}  \w", text, re.MULTILINE)


# --- a real experiment takes them -------------------------------------------------------------------------------

SAMPLES: list[tuple[str, str, dict[str, str]]] = [
    ("optimizers", "AdamW", {}),
    ("optimizers", "LBFGS", {}),
    ("schedulers", "OneCycleLR", {"max_lr": "0.1"}),
    ("schedulers", "poly_lr_scheduler", {"num_iterations": "10", "num_epochs": "2"}),
    ("losses", "KDLoss", {"student_module_path": "fc", "teacher_module_path": "fc", "temperature": "4.0"}),
    ("losses", "FSPLoss", {}),
    ("losses", "MSELoss", {}),
    ("losses", "VkDLoss", {}),
    ("losses", "WeightedSumLoss", {}),
    ("loss wrappers", "SimpleLossWrapper", {}),
    ("loss wrappers", "FeaturePair", {}),
    ("models", "resnet18", {}),
    ("models", "digits_vit", {}),
    ("models", "regnety_160.deit_in1k", {}),
    ("model wrappers", "ProjectedStudent", {}),
    ("projectors", "MLPProjector", {"module": "layer4", "readout": "spatial_mean"}),
    ("orthogonal maps", "cayley", {"module": "layer4", "readout": "spatial_mean"}),
    ("readouts", "spatial_mean", {"module": "layer4"}),
    ("normalizations", "whiten", {"module": "layer4"}),
    ("distances", "log_sum", {"module": "layer4"}),
    ("adaptation modules", "Conv2d", {"in_channels": "3", "out_channels": "4", "kernel_size": "1"}),
    ("datasets", "FakeData", {}),
    ("datasets", "Digits", {}),
    ("transforms", "RandomResizedCrop", {"size": "32"}),
    ("transforms", "v2.Resize", {"size": "32"}),
    ("transforms", "ToTensor", {}),
    ("samplers", "RandomSampler", {}),
    ("collate functions", "MixingCollator", {}),
    ("forward processes", "forward_batch_target", {}),
    ("post epoch processes", "default_post_epoch_process_with_teacher", {}),
    ("functions to extract", "extract_model_loss_dict", {}),
]


@pytest.mark.parametrize(("kind", "name", "values"), SAMPLES, ids=[f"{kind}-{name}" for kind, name, _ in SAMPLES])
def test_a_pasted_snippet_loads(tmp_path: Path, kind: str, name: str, values: dict[str, str]) -> None:
    loaded(tmp_path, DISTILL, filled(snippet(kind, name), **values))


def test_enumerations_and_functions_as_defaults_can_be_built(tmp_path: Path) -> None:
    """The default that a comment shows is the one that a call without it has."""
    text = with_optional(snippet("transforms", "RandAugment"))
    built = loaded(tmp_path, DISTILL, text).data["datasets"]["pasted"].transforms[0]
    assert vars(built) == vars(type(built)())


def test_pasted_snippets_train(tmp_path: Path) -> None:
    """VkD from pasted pieces: the box builds, and a step sends gradients to the projector."""
    experiment = loaded(
        tmp_path,
        DIGITS,
        filled(snippet("projectors", "OrthogonalProjector"), module="norm", readout="mean_patch_tokens"),
        filled(snippet("normalizations", "standardize"), module="final_conv"),
        snippet("optimizers", "Adam"),
        filled(snippet("schedulers", "StepLR"), step_size="2"),
        snippet("samplers", "SequentialSampler"),
    )
    train, terms = experiment.data["train"], experiment.data["train"]["criterion"]["kwargs"]["sub_terms"]
    del terms["vkd"]  # it reads a feature that is no more
    train["student"]["auxiliary_model_wrapper"]["kwargs"]["features"].pop("tokens", None)
    train["student"]["wrapper"] = None
    cpu = torch.device("cpu")
    models = [build_model(experiment, section, cpu, False) for section in ("teacher_model", "student_model")]
    box = DistillationBox(*models, experiment.data["datasets"], train, cpu, None, False, 1.0)
    assert type(box.optimizer).__name__ == "Adam"
    assert type(box.lr_scheduler).__name__ == "StepLR"
    images, labels, *_ = next(iter(box.train_data_loader))
    loss = box.forward_process(images, labels, supp_dict=None)
    loss.backward()
    projector = box.student_model.get_submodule("features.my_feature.projector")
    assert projector.raw_weight.shape == (128, 48)
    assert projector.raw_weight.grad.abs().sum() > 0


# --- what is listed ---------------------------------------------------------------------------------------------


def test_a_kind_says_what_each_component_takes(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "losses")
    assert text.index("\nvkd_plugin\n") < text.index("\ntorchdistill\n") < text.index("\ntorch\n")
    assert "  VkDLoss (low-level)\n    normalization='layer_norm', distance='smooth_l1', " in text
    assert "  KDLoss (mid-level)\n" in text
    assert "  WeightedSumLoss (high-level)\n" in text
    assert "  CrossEntropyLoss (low-level)\n" in text
    assert "d(P z_s, norm(z_t)): the projected student against the normalised teacher.\n" in text


def test_lines_are_whole_off_a_terminal_and_short_on_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = said(capsys, "losses")
    assert max(map(len, piped.splitlines())) > 120
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    coloured = said(capsys, "losses")
    assert "\x1b[" in coloured
    lines = re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(piped.split())  # nothing is cut off


def test_one_component(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "losses", "VkDLoss")
    assert text.startswith("VkDLoss: loss (low-level), vkd_plugin.VkDLoss\n")
    assert "  beta=1.0\n      where smooth_l1 turns from quadratic to linear.\n" in text
    assert text.endswith(f"YAML\n{snippet('losses', 'VkDLoss')}")
    assert said(capsys, "VkDLoss") == text
    assert "  fsp_pairs (required)\n      dict: configuration of teacher-student module pairs" in said(
        capsys, "FSPLoss"
    )


def test_a_snippet_takes_the_example_of_the_docstring() -> None:
    criterion = yaml.safe_load(snippet("losses", "VkDLoss"))["train"]["criterion"]["kwargs"]["sub_terms"]["my_term"]
    assert criterion["criterion_wrapper"]["key"] == "FeaturePair"
    assert criterion["criterion"]["kwargs"] == {"normalization": "layer_norm", "distance": "smooth_l1"}
    wrapped = yaml.safe_load(snippet("loss wrappers", "SimpleLossWrapper"))
    term = wrapped["train"]["criterion"]["kwargs"]["sub_terms"]["my_term"]
    assert term["criterion_wrapper"]["kwargs"]["target"] == {"uses_label": True}
    assert "criterion_wrapper" not in snippet("losses", "KDLoss")  # it reads the hooked modules itself


def test_what_lies_outside_of_torchdistill_says_what_it_needs() -> None:
    assert snippet("losses", "VkDLoss").startswith("# needs dependencies: ['vkd_plugin']\n")
    assert "needs" not in snippet("losses", "KDLoss")


def test_values_of_an_example_are_said_to_be_such() -> None:
    assert "# with values of its documentation's example: put in your own\n" in snippet("losses", "FSPLoss")
    assert "example" not in snippet("losses", "VkDLoss")  # they are choices, and nothing has to be put in


def test_wrappers_stand_on_the_side_that_they_are_for() -> None:
    assert "teacher" in yaml.safe_load(snippet("model wrappers", "Teacher4FactorTransfer"))["train"]
    assert "student" in yaml.safe_load(snippet("model wrappers", "Student4FactorTransfer"))["train"]
    assert "student:  # or teacher\n" in snippet("model wrappers", "Linear4CRD")


def test_torchvision_s_models_show_what_they_hand_on(capsys: pytest.CaptureFixture[str]) -> None:
    """num_classes, which stands in no signature of theirs."""
    (component,) = [c for c in kind_called("models").find([]) if c.name == "resnet18"]
    assert {"num_classes": 1000, "groups": 1}.items() <= {a.name: a.default for a in component.arguments}.items()
    assert "num_classes=1000" in said(capsys, "models")


def test_what_a_function_hands_on_shows_the_default_of_where_it_goes() -> None:
    """ViDT's sizes leave what they share to one function, whose result has other arguments."""
    (component,) = [c for c in kind_called("models").find([]) if c.name == "vidt_swin_tiny"]
    defaults = {a.name: a.default for a in component.arguments}
    assert defaults.items() >= {"num_queries": 100, "checkpoint": None, "drop_path_rate": 0.2, "dropout": 0.1}.items()
    assert UNKNOWN not in defaults.values()


def test_models_of_timm_go_through_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "through timm_model" in said(capsys, "models")
    assert yaml.safe_load(snippet("models", "regnety_160.deit_in1k"))["models"]["student_model"] == {
        "key": "timm_model",
        "kwargs": {"name": "regnety_160.deit_in1k", "num_classes": 1000},
    }
    both = said(capsys, "models", "resnet18")
    assert "torchvision.models.resnet18" in both
    assert "key: 'timm_model'" in both
    assert "did you mean 'resnest200e'" in refused(capsys, "models", "resnest200")
    assert "'regnety_160.nonsense'" in refused(capsys, "models", "regnety_160.nonsense")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("losses", ["losses"]),
        ("Loss", ["losses"]),
        ("loss-wrappers", ["loss wrappers"]),
        ("dataset_wrapper", ["dataset wrappers"]),
        ("batch sampler", ["batch samplers"]),
        ("wrappers", ["loss wrappers", "model wrappers", "dataset wrappers"]),
        ("maps", ["orthogonal maps"]),
        ("VkDLoss", []),
    ],
)
def test_names_of_kinds(text: str, kinds: list[str]) -> None:
    assert [kind.plural for kind in kinds_called(text)] == kinds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loses"], "no kind or component 'loses' (did you mean 'losses'?)"),
        (["VkDLos"], "no kind or component 'VkDLos' (did you mean 'VkDLoss'?)"),
        (["qqqqqq"], "no kind or component 'qqqqqq'; run.py list shows the kinds"),
        (["losss", "VkDLoss"], "no kind of component 'losss' (did you mean 'losses'?)"),
        (["losses", "VkDLos"], "no loss 'VkDLos' (did you mean 'VkDLoss'?)"),
        (["losses", "FeaturePair"], "no loss 'FeaturePair': it is a loss wrapper"),
        (["transforms", "resiz"], "no transform 'resiz' (did you mean 'Resize'?)"),
        (["--import", "no_such_package"], "--import no_such_package: No module named 'no_such_package'"),
    ],
)
def test_unknown_names(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert refused(capsys, *words).startswith(f"error: {message}")


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    (vkd,) = [c for c in json.loads(said(capsys, "losses", "--json"))["components"] if c["name"] == "VkDLoss"]
    assert (vkd["kind"], vkd["note"], vkd["package"]) == ("loss", "low-level", "vkd_plugin")
    assert vkd["arguments"][0] == {
        "name": "normalization",
        "required": False,
        "default": "'layer_norm'",
        "type": "",
        "doc": "a method of vkd_plugin.normalization.normalize.",
    }
    (one,) = json.loads(said(capsys, "VkDLoss", "--json"))["components"]
    assert vkd.items() <= one.items()
    assert one["yaml"] == snippet("losses", "VkDLoss")


# --- a user's package -------------------------------------------------------------------------------------------

PACKAGE = '''
from torch import nn
from torch.optim import SGD
from torch.utils.data import Dataset, Sampler
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_collate_func, register_dataset, register_transform
from torchdistill.losses.registry import register_low_level_loss, register_mid_level_loss
from torchdistill.models.registry import register_model
from torchdistill.optim.registry import register_optimizer


@register_low_level_loss
class MyLoss(nn.Module):
    """Mine: the best. More of it.

    Args:
        sharpness: how sharp.
    """

    def __init__(self, sharpness, reduction="mean"):
        super().__init__()


register_mid_level_loss(key="MyMidLoss")(MyLoss)
register_optimizer(key="MySGD")(SGD)


@register_model
def my_model(width: int = 3):
    return nn.Linear(width, width)


@register_dataset
class MyImages(Dataset):
    def __init__(self, root, transform=None):
        pass


class MySampler(Sampler):
    def __init__(self, source, stride=2):
        pass


@register_transform
class MyTransform:
    pass


@register_collate_func
def my_collate(samples):
    return samples


@register_forward_proc_func
def my_forward(model, *args):
    return model(*args)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of a user; what it registers goes with the test."""
    from torchdistill.core.interfaces import registry as processes
    from torchdistill.datasets import registry as datasets
    from torchdistill.losses import registry as losses
    from torchdistill.models import registry as models
    from torchdistill.optim import registry as optim

    modules: list[Any] = [processes, datasets, losses, models, optim]
    tables = [value for module in modules for name, value in vars(module).items() if name.endswith("_DICT")]
    before = [dict(table) for table in tables]
    (tmp_path / "listed_by_a_test.py").write_text(PACKAGE, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "listed_by_a_test"
    sys.modules.pop("listed_by_a_test", None)
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_what_a_user_s_package_registers_is_listed(capsys: pytest.CaptureFixture[str], package: str) -> None:
    for kind, names in {
        "losses": ["MyLoss", "MyMidLoss"],
        "models": ["my_model"],
        "optimizers": ["MySGD"],
        "datasets": ["MyImages"],
        "samplers": ["MySampler"],
        "transforms": ["MyTransform"],
        "collate functions": ["my_collate"],
        "forward processes": ["my_forward"],
    }.items():
        listed = json.loads(said(capsys, kind, "--import", package, "--json"))["components"]
        assert set(names) <= {component["name"] for component in listed}
    text = said(capsys, "losses", "--import", package)
    assert "  MyLoss (low-level)\n    sharpness, reduction='mean'\n    Mine: the best.\n" in text
    assert text.index("\nvkd_plugin\n") < text.index(f"\n{package}\n") < text.index("\ntorchdistill\n")
    one = said(capsys, "MyLoss", "--import", package)
    assert f"needs dependencies: ['{package}'] in the file and run.py --trust {package}\n" in one
    assert "sharpness: <sharpness>\n" in one
    assert f"key: '{package}.MyImages'\n" in said(capsys, "datasets", "MyImages", "--import", package)


# --- the parts --------------------------------------------------------------------------------------------------


def test_docstrings_of_google_s_style() -> None:
    doc = parse(
        """Does x, e.g. This. And more
        on the next line.

        Args:
            one (int, optional): the first,
                on two lines.

                Not this.
            two, three: two at once
            **rest: others

        Returns:
            four: no argument.
        """
    )
    assert doc.summary == "Does x, e.g. This."
    assert doc.paragraph == "Does x, e.g. This. And more on the next line."
    assert {name: (a.type, a.text) for name, a in doc.arguments.items()} == {
        "one": ("int", "the first, on two lines."),
        "two": ("", "two at once"),
        "three": ("", "two at once"),
        "rest": ("", "others"),
    }


def test_docstrings_with_fields_and_an_example() -> None:
    doc = parse(
        """
        Short.

        :param one: the first
            in two lines
        :type one: int or None
        :return: nothing

        .. code-block:: YAML
           :caption: An example.

            key: 'X'
            kwargs: {one: 1}
        """
    )
    assert (doc.paragraph, doc.arguments["one"].type) == ("Short.", "int")
    assert doc.arguments["one"].text == "the first in two lines"
    assert doc.example == "key: 'X'\nkwargs: {one: 1}"
    assert parse("In YAML::\n\n    a: 1\n\nEnd.").example == "a: 1"
    assert parse("").paragraph == ""


def test_markup_is_taken_off() -> None:
    assert plain(":class:`~torch.nn.Linear` of ``x``: `Title <https://x.org>`_") == "torch.nn.Linear of x: Title"
    assert table_row("====  ====\n``a``   A thing     more\n====  ====", "a") == "A thing"
    assert table_row("nothing here", "a") == ""


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 1e-5, 1e16, 0.5, float("inf"), -1e-12, "it's", "a\nb", "1e-5", [1, "x"], {"a": [None]}],
)
def test_literals_mean_what_they_were(value: object) -> None:
    assert yaml.full_load(str(literal(value))) == value


def test_literals_that_yaml_cannot_have() -> None:
    assert literal(object()) is None
    assert literal([1, object()]) is None
    assert literal({"a": object()}) is None
    assert literal(lambda x: x) is None
    assert literal(torch.float16) == "!import_get {key: 'torch.float16'}"
    assert repr(UNKNOWN) == "..."


def test_public_names_are_the_shortest_that_can_be_imported() -> None:
    assert public_name(torch.nn.Linear) == "torch.nn.Linear"
    assert public_name(PROJECTORS["LinearProjector"]) == "vkd_plugin.LinearProjector"
    assert public_name(lambda: None) is None


def test_print_catalog_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_catalog("readouts", None) == 0
    assert "class_token" in capsys.readouterr().out
