"""Whatever is done to a sound file, it loads or ends in ConfigErrors: never in another exception."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vkd_plugin.config import ConfigErrors, load_experiment

CONFIGS = Path(__file__).parent / "data" / "configs"
TEXTS = {path.stem: path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))}
VALUES = [
    "",
    "x",
    "-1",
    "0.5",
    "1e-4",
    ".nan",
    "[]",
    "[x, 1]",
    "{}",
    "{key: x}",
    "{key: x, kwargs: {a: 1}}",
    "{[1]: 2}",
    "2020-99-99",
    "!join [a, 1]",
    "!join x",
    "!expanduser [a]",
    "!getattr [1]",
    "!import_get {key: torch.nn.Linear}",
    "!import_get {}",
    "!import_call {key: nothing}",
    "!import_call {key: torch.nn.Linear, init: {kwargs: {in_features: 1, out_features: 1}}}",
    "!call_method {obj: a, method_name: upper}",
    "!!python/tuple [1, 2]",
    "!!python/name:builtins.len",
    "!!set {a}",
    "!!int x",
    "!unknown x",
]


def mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    """All mappings in a graph that are not empty."""
    found: list[yaml.MappingNode] = []
    if isinstance(node, yaml.MappingNode):
        found += [node] if node.value else []
        children = [child for _, child in node.value]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    for child in children:
        found += mappings(child)
    return found


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A sound file with up to three keys removed, renamed, written twice, or given another value."""
    root = yaml.compose(TEXTS[draw(st.sampled_from(sorted(TEXTS)))])
    assert root is not None
    for _ in range(draw(st.integers(1, 3))):
        mapping = draw(st.sampled_from(mappings(root)))
        index = draw(st.integers(0, len(mapping.value) - 1))
        key, value = mapping.value[index]
        match draw(st.sampled_from(["remove", "rename", "twice", "retype", "retag"])):
            case "remove" if len(mapping.value) > 1:
                del mapping.value[index]
            case "rename":
                name = str(key.value)
                at = draw(st.integers(0, len(name) - 1))
                renamed = yaml.ScalarNode(key.tag, name[:at] + draw(st.sampled_from(["", "x", "_"])) + name[at + 1 :])
                mapping.value[index] = (renamed, value)
            case "twice":
                mapping.value.insert(index, (key, value))
            case "retag":
                value.tag = draw(st.sampled_from(["!import_call", "!join", "!getattr", "tag:yaml.org,2002:str"]))
            case _:
                mapping.value[index] = (
                    key,
                    yaml.compose(draw(st.sampled_from(VALUES))) or yaml.ScalarNode(key.tag, ""),
                )
    return str(yaml.serialize(root))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=mutated())
def test_a_mutated_file_loads_or_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    messages: list[str] = []
    try:
        experiment = load_experiment(path)
        path.write_text(experiment.dump())
        assert load_experiment(path).digest() == experiment.digest()
    except ConfigErrors as error:
        messages = str(error).splitlines()
    assert all(message.startswith(str(path)) for message in messages)


PATHS = [
    "train",
    "num_epochs",
    "kwargs",
    "optimizer",
    "0",
    "-1",
    "datasets",
    "fake/train",
    "init",
    "_x",
    "student",
    "",
]


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PATHS), min_size=1, max_size=4),
    value=st.sampled_from(VALUES) | st.text(max_size=5),
    equals=st.sampled_from(["=", "=", "=", ""]),
)
def test_any_override_applies_or_is_refused(parts: list[str], value: str, equals: str) -> None:
    override = ".".join(parts) + equals + value
    messages: list[str] = []
    try:
        load_experiment(CONFIGS / "distill.yaml", [override])
    except ConfigErrors as error:
        messages = str(error).splitlines()
    assert all(message.startswith(("--set ", str(CONFIGS))) for message in messages)


@pytest.mark.parametrize("cut", range(40))
def test_a_file_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    text = TEXTS["distill"]
    path = tmp_path / "x.yaml"
    path.write_text(text[: cut * (len(text) - 200) // 40])
    with pytest.raises(ConfigErrors):
        load_experiment(path)


@pytest.mark.parametrize("level", ["[*a{0}, *a{0}]", "!getattr [*a{0}, *a{0}]"])
def test_anchors_that_multiply_are_refused_wherever_they_stand(level: str, tmp_path: Path) -> None:
    levels = ["_a0: &a0 [1, 1]", *(f"_a{i}: &a{i} {level.format(i - 1)}" for i in range(1, 31))]
    path = tmp_path / "x.yaml"
    for place in ("datasets: {x: *a30}", "datasets: {? *a30 : 1}"):
        path.write_text("\n".join([*levels, place]))
        with pytest.raises(ConfigErrors):
            load_experiment(path)
