"""Mistakes that people make in experiment files: what ``run.py check`` says of each, with its line and column.

The catalogue stands in ``data/mistakes``, a file a subject. An entry names a sound experiment, what is changed in it,
and the one problem that is then found. ``▸`` stands in front of what is to blame; in the message, ``...`` at the end is
the rest of what a library says.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes_helper import run_py

from vkd_plugin.check import check, examine

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
BASES = {
    "vkd": ROOT / "configs" / "digits" / "vkd" / "vit_from_cnn.yaml",
    "ce": ROOT / "configs" / "digits" / "ce" / "vit.yaml",
    **{path.stem: path for path in (DATA / "mistakes" / "sound").glob("*.yaml")},
}


@dataclass(frozen=True)
class Mistake:
    """An entry of the catalogue.

    Args:
        name: in a few words.
        text: of the file.
        where: ``LINE:COLUMN`` to blame; None where an override is to blame.
        problem: what is said of it.
        overrides: ``--set``.
        data: whether data have to be here.
    """

    name: str
    text: str
    where: str | None
    problem: str
    overrides: tuple[str, ...]
    data: bool

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Mistake":
        text = BASES[entry["in"]].read_text("utf-8")
        for old, new in entry.get("change", {}).items():
            assert text.count(old) >= 1, f"{entry['mistake']}: nothing to change: {old!r}"
            text = text.replace(old, new, 1)
        at = text.find("▸")
        assert text.count("▸") == (0 if "set" in entry and at < 0 else 1), entry["mistake"]
        where = f"{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}" if at >= 0 else None
        overrides = (entry["set"],) if "set" in entry else ()
        return cls(
            entry["mistake"], text.replace("▸", ""), where, entry["problem"], overrides, entry.get("data", False)
        )

    def expected(self, path: Path) -> str:
        """The line about it, in the file ``path``."""
        return f"{path}:{self.where}: {self.problem}" if self.where else self.problem


CATALOGUE = [
    Mistake.of(entry)
    for path in sorted((DATA / "mistakes").glob("*.yaml"))
    for entry in yaml.safe_load(path.read_text("utf-8"))
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # shipped experiments name the teacher's weights from there


def agree(found: str, expected: str) -> bool:
    return found.startswith(expected[:-3]) if expected.endswith("...") else found == expected


@pytest.mark.parametrize("base", sorted(BASES))
def test_what_mistakes_are_made_in_is_sound(base: str) -> None:
    facts = examine(BASES[base])
    assert (facts.problems, facts.warnings) == ([], [])


def test_each_mistake_has_a_name_of_its_own() -> None:
    assert len({mistake.name for mistake in CATALOGUE}) == len(CATALOGUE) > 100


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda mistake: mistake.name)
def test_one_mistake_one_line(mistake: Mistake, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(mistake.text, "utf-8")
    found = [str(problem) for problem in examine(path, mistake.overrides, data=mistake.data).problems]
    assert len(found) == 1, found
    assert agree(found[0], mistake.expected(path)), f"{found[0]}\n{mistake.expected(path)}"
    assert "Traceback" not in "".join(capfd.readouterr())


# Several at once.

PHASES = {
    "keys and types": (
        {
            "  log_freq: 10\n": "  log_frq: 10\n",
            "lr: 2.0e-3, weight_decay": "lr: 2e-3, weight_decay",
            "readout: 'mean_patch_tokens'": "readout: 'mean_tokens'",
            "temperature: 1.0": "temperature: 0",
            "test_batches {batch_size: 250": "test_batches {batch_size: 0",
        },
        ["log_frq", "lr", "readout", "temperature", "batch_size"],
    ),
    "names": (
        {
            "key: 'digits_vit'": "key: 'digit_vit'",
            "key: 'AdamW'": "key: 'AdamV'",
            "pct_start": "pct_strat",
            "distance: 'smooth_l1'}": "distnce: 'mse'}",
            "key: 'torchvision.transforms.ToTensor'": "key: 'torchvision.transforms.ToTensr'",
        },
        ["digit_vit", "AdamV", "pct_strat", "distnce", "ToTensr"],
    ),
    "models and data": (
        {
            "digits_cnn.safetensors": "digits.safetensors",
            "kwargs: {}\n    dst": "kwargs: {num_heads: 5}\n    dst",
            "{mean: [0.3], std: [0.37]}": "{mean: [0.3], std: [0.0]}",
        },
        ["digits.safetensors", "num_heads", "std", "std"],  # of both data sets
    ),
    "a stage": (
        {"output: ['final_conv']": "output: ['final_cov', 'haed']", "['features.tokens']": "['features.tokns']"},
        ["final_cov", "haed", "features.tokns"],
    ),
    "terms": (
        {
            "input: {is_from_teacher: False, module_path: '.'": "input: {is_from_teacher: False, module_path: 'head'",
            "student: {module: '.'}": "student: {module: '.', io: 'input'}",
        },
        ["module 'head'", "input of module '.'"],
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_what_can_be_told_at_once_is(phase: str, tmp_path: Path) -> None:
    changes, said = PHASES[phase]
    text = BASES["vkd"].read_text("utf-8")
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    path = tmp_path / "x.yaml"
    path.write_text(text, "utf-8")
    problems = [problem.message for problem in examine(path).problems]
    assert len(problems) == len(said), problems
    for word in said:
        assert any(word in problem for problem in problems), (word, problems)


def test_what_is_no_mistake_for_sure_is_a_warning(tmp_path: Path) -> None:
    text = BASES["hosted"].read_text("utf-8")
    text = text.replace("      - module: 'middle'\n", "")
    text = text.replace("output: ['middle', 'head']", "output: ['middle', 'head', 'stem']")
    text = text.replace("key: 'torchvision.datasets.FakeData'", "key: 'torchvision.datasets.ImageFolder'", 1)
    text = text.replace("        size: 12\n", "        root: 'no/such/folder'\n")
    text = text.replace("        image_size: [1, 8, 8]\n        num_classes: 10\n", "", 1)
    text = text.replace(
        "!import_call\n          key: 'torchvision.transforms.ToTensor'", "&small !import_call\n" + SMALL
    )
    path = tmp_path / "x.yaml"
    path.write_text(text, "utf-8")
    facts = examine(path)
    assert facts.problems == []
    assert [warning.removeprefix(f"{path}:").partition(": ")[2] for warning in facts.warnings] == [
        "datasets.train.init.kwargs.root: nothing is at 'no/such/folder'",
        "train.optimizer.module_wise_configs: 'middle' of the student are not trained: they are not here",
        "train.teacher.forward_hook.output.2: 'stem' is hooked and no term of the loss reads it",
    ]


SMALL = """\
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.Grayscale'}
                - !import_call {key: 'torchvision.transforms.Resize', init: {kwargs: {size: [8, 8]}}}
                - !import_call {key: 'torchvision.transforms.ToTensor'}"""


# The command itself.


def test_the_command_says_one_line_each_and_exits_with_2(tmp_path: Path) -> None:
    names = [
        "scheduler is misspelt",
        "an optimizer that does not exist",
        "timm has no such model",
        "a weight is missing",
    ]
    names += ["the loss forgets model", "a split that does not exist"]
    mistakes = [next(mistake for mistake in CATALOGUE if mistake.name == name) for name in names]
    paths = [tmp_path / f"{index}.yaml" for index in range(len(mistakes))]
    for path, mistake in zip(paths, mistakes, strict=True):
        path.write_text(mistake.text, "utf-8")
    (ended,) = run_py("check", *map(str, paths))
    assert ended.code == 2
    assert ended.out == ""
    expected = [f"error: {mistake.expected(path)}" for path, mistake in zip(paths, mistakes, strict=True)]
    assert ended.err.splitlines() == expected


def test_training_refuses_what_a_check_finds(tmp_path: Path) -> None:
    mistake = next(mistake for mistake in CATALOGUE if mistake.name == "a head that no term reads")
    path = tmp_path / "x.yaml"
    path.write_text(mistake.text, "utf-8")
    (ended,) = run_py("--config", str(path), "--output", str(tmp_path / "run"), "--device", "cpu")
    assert ended.code == 2
    assert [line for line in ended.err.splitlines() if "error" in line] == [f"error: {mistake.expected(path)}"]
    assert "Traceback" not in ended.err


# Whatever is done to a sound file.

VALUES = [
    *("", "x", "-1", "0", "3", "0.5", "1e-4", ".nan", ".inf", "true", "null", "<int>", "'.'", "[]", "[x, 1]", "[[1]]"),
    *("{}", "{key: x}", "{module: norm}", "{[1]: 2}", "output", "head", "model.head", "features.tokens", "class_token"),
    *("MSELoss", "KDLoss", "SGD", "LBFGS", "StepLR", "ReduceLROnPlateau", "resnet18", "digits_vit", "forward_batch"),
    "{key: MSELoss, kwargs: {}}",
    "{key: SimpleLossWrapper, kwargs: {}}",
    "{class_or_func: !import_get {key: torch.utils.data.RandomSampler}}",
    "!import_get {key: torch.nn.Linear}",
    "!import_call {key: torch.nn.Identity}",
    "!import_call {key: torch.nn.MSELoss}",
    "!import_call {key: torch.zeros, init: {args: [3]}}",
    "!import_call {key: torchvision.datasets.FakeData, init: {kwargs: {size: 2}}}",
    "!join [a, 1]",
    "!!set {a}",
]
SECTIONS = (("models",), ("datasets",), ("train",), ("train", "student"), ("train", "criterion"), ("test",), ())


def mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    """All mappings in a graph that are not empty."""
    if isinstance(node, yaml.MappingNode):
        own = [node] if node.value else []
        return own + [found for _, value in node.value for found in mappings(value)]
    return [found for item in node.value for found in mappings(item)] if isinstance(node, yaml.SequenceNode) else []


def below(node: yaml.Node, path: tuple[str, ...]) -> yaml.Node:
    for part in path:
        node = next((value for key, value in node.value if key.value == part), node)
    return node


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A sound file with up to three keys renamed, removed, moved, or given a value of the file or a strange one."""
    root = yaml.compose(BASES[draw(st.sampled_from(sorted(BASES)))].read_text("utf-8"))
    assert root is not None
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        candidates = mappings(below(root, draw(st.sampled_from(SECTIONS)))) or mappings(root)
        mapping = draw(st.sampled_from(candidates))
        index = draw(st.integers(0, len(mapping.value) - 1))
        key, value = mapping.value[index]
        other = draw(st.sampled_from(mappings(root)))
        match draw(st.sampled_from(["remove", "rename", "retype", "retype", "move", "borrow", "borrow"])):
            case "remove" if len(mapping.value) > 1:
                del mapping.value[index]
            case "rename":
                name = str(key.value)
                at = draw(st.integers(0, len(name) - 1))
                renamed = name[:at] + draw(st.sampled_from(["", "x", "_"])) + name[at + 1 :]
                mapping.value[index] = (yaml.ScalarNode(key.tag, renamed), value)
            case "move" if other not in mappings(value) and len(mapping.value) > 1:  # else it would contain itself
                del mapping.value[index]
                other.value.append((key, value))
            case "borrow":
                _, borrowed = draw(st.sampled_from(other.value))
                mapping.value[index] = (key, value if mapping in mappings(borrowed) else borrowed)
            case _:
                strange = yaml.compose(draw(st.sampled_from(VALUES))) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
                mapping.value[index] = (key, strange)
    return str(yaml.serialize(root))


def holds(text: str, path: Path) -> None:
    """The file is sound, with a page, or every line about it names the file."""
    path.write_text(text, "utf-8")
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = check([str(path)], [], [], False, as_json)
        lines = err.getvalue().splitlines()
        assert all(line.startswith((f"error: {path}", f"warning: {path}")) for line in lines), lines
        assert code == (2 if any(line.startswith("error: ") for line in lines) else 0)
        assert "Traceback" not in out.getvalue()
        if as_json:
            assert json.loads(out.getvalue())["path"] == str(path)
        elif code == 0:
            assert f"{path}  ok" in out.getvalue()


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(SETTINGS, max_examples=40)
@given(text=mutated())
def test_a_mutated_experiment_is_sound_or_refused(text: str, tmp_path: Path) -> None:
    holds(text, tmp_path / "x.yaml")


@pytest.mark.slow
@settings(SETTINGS, max_examples=500)
@given(text=mutated())
def test_many_mutated_experiments_are_sound_or_refused(text: str, tmp_path: Path) -> None:
    holds(text, tmp_path / "x.yaml")


# What is no mistake.

SOUND = [
    ("vkd", "lr: 2.0e-3, weight_decay: 0.05", "lr: 1, weight_decay: 0, eps: 1, amsgrad: True"),
    ("vkd", "{lr: 2.0e-3,", "{lr: 2.0e-3, fused: null, betas: [0.9, 0.95],"),
    ("vkd", "        features:\n", "        _why: 1e-4\n        features:\n"),
    ("vkd", "          weight: 4.0", "          weight: 0"),
    ("vkd", "orthogonal_map: 'matrix_exp'}", "in_features: 48, out_features: 128, bias: True}"),
    ("vkd", "projector: {key: 'OrthogonalProjector', orthogonal_map: 'matrix_exp'}", "projector:"),
    ("vkd", "readout: 'mean_patch_tokens'", "readout: 'mean_patch_tokens'\n            num_prefix_tokens: 2"),
    ("vkd", "{temperature: 1.0}", "{}"),
    ("ce", "    forward_proc", "    frozen_modules: ['pos_embed', 'instance(LayerNorm)']\n    forward_proc"),
    ("ce", "'CrossEntropyLoss', kwargs: {}", "'CrossEntropyLoss', kwargs: {weight: , label_smoothing: 0}"),
    ("hosted", "- module: 'stem'", "- module: 'stem.0'\n      - module: 'stem.1.0.weight'\n      - module: 'stem.1.1'"),
    ("hosted", "{T_max: 2}", "{T_max: 2, eta_min: 0}"),
    ("images", "10\n      img_size: 64", "12\n      img_size: [64, 64]\n      drop_path_rate: 0"),
]


@pytest.mark.parametrize(("base", "old", "new"), SOUND)
def test_what_is_sound_is_not_refused(base: str, old: str, new: str, tmp_path: Path) -> None:
    text = BASES[base].read_text("utf-8")
    assert old in text
    path = tmp_path / "x.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    facts = examine(path)
    assert (facts.problems, facts.warnings) == ([], [])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("datasets=!import_get {key: torch.nn.Linear}", "datasets: expected a mapping, got type"),
        ("train.num_epochs=!import_call {key: torch.nn.Identity}", "train.num_epochs: expected a whole number of at "),
        ("train.optimizer=!import_call {key: torch.nn.Identity}", "train.optimizer: expected a mapping, got Identity"),
    ],
)
def test_what_tags_make_is_looked_at_too(override: str, problem: str) -> None:
    (found,) = examine(BASES["ce"], [override]).problems
    assert found.message.startswith(problem)


def test_a_loss_that_a_tag_has_made(tmp_path: Path) -> None:
    """It is called with what is hooked, as torchdistill does, so it has to be one that reads that."""
    term = "!import_call {key: torchdistill.losses.mid_level.KDLoss, init: {kwargs: {student_module_path: head, "
    term += "student_module_io: output, teacher_module_path: head, teacher_module_io: output, temperature: 4.0, "
    term += "alpha: 0.5}}}"
    facts = examine(BASES["hosted"], [f"train.criterion.kwargs.sub_terms.kd.criterion={term}"])
    assert facts.problems == []
    assert [term.criterion for term in facts.stages[0].terms] == ["KDLoss", "MSELoss"]
