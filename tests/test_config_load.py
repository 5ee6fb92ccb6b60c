"""load_experiment on sound files: data as torchdistill has it, lines, the way back to text, the digest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchdistill.common.yaml_util import load_yaml_file

from vkd_plugin.config import Experiment, load_experiment

CONFIGS = Path(__file__).parent / "data" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
TORCHDISTILL_FILES = [path for path in FILES if path.stem != "engine"]


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(CONFIGS / f"{name}.yaml", overrides)


def comparable(value: Any) -> Any:
    """``value`` with the type in place of each object that has no equality of its own."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value if isinstance(value, str | int | float | type | None) else type(value)


def containers(value: Any) -> Iterator[Any]:
    """Every dict and list in ``value``, as often as it is met."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


@pytest.mark.parametrize("path", TORCHDISTILL_FILES, ids=lambda p: p.stem)
def test_data_is_what_torchdistill_loads(path: Path) -> None:
    ours, theirs = load_experiment(path).data, load_yaml_file(str(path))
    assert comparable(ours) == comparable(theirs)
    assert [*ours["train"]] == [*theirs["train"]]


def test_a_merge_is_what_torchdistill_loads_except_anchors_in_kwargs() -> None:
    theirs = load_yaml_file(str(CONFIGS / "engine.yaml"))
    assert theirs["train"]["optimizer"]["kwargs"].pop("_note")
    ours = load("engine").data
    assert comparable(ours) == comparable(theirs)
    assert ours["train"]["channels_last"] is False
    assert ours["train"]["amp"] == {"dtype": "bfloat16"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_container_stands_in_two_places(path: Path) -> None:
    data = load_experiment(path).data
    found = [id(item) for section in ("models", "train", "test") for item in containers(data[section])]
    assert len(found) == len(set(found))


def test_what_a_tag_builds_is_one_object_for_all_aliases() -> None:
    data = load("engine").data["datasets"]
    assert data["same"] is data["fake"]
    split = load("supervised").data["datasets"]
    assert split["first"].dataset is split["second"].dataset
    assert split["all"][0] is split["first"]


def test_where_is_the_line_of_the_key_or_item() -> None:
    path = CONFIGS / "distill.yaml"
    experiment = load_experiment(path)
    lines = path.read_text().splitlines()

    def line(*key_path: object) -> str:
        name, number, column = experiment.where(*key_path).rsplit(":", 2)
        assert name == str(path)
        return lines[int(number) - 1][int(column) - 1 :]

    assert line("train") == "train:"
    assert line("train", "optimizer", "key") == "key: 'SGD'"
    assert line("train", "teacher", "forward_hook", "output", 1) == "'fc']"
    assert line("datasets", "fake/val") == "&val_set fake/val: !import_call"
    # An alias is where it is written; what is in it, where its anchor is.
    assert experiment.where("test", "test_data_loader", "sampler").endswith(":132:5")
    assert line("test", "test_data_loader", "sampler") == "sampler: *sampler"
    assert line("test", "test_data_loader", "sampler", "class_or_func") == "class_or_func: !import_get"
    # The nearest ancestor stands for what is not there.
    assert line("train", "optimizer", "absent", "key") == "optimizer:"
    assert line("train", "teacher", "forward_hook", "output", 9) == "output: ['layer4', 'fc']"
    assert experiment.where() == f"{path}:2:1"


def test_error_carries_path_and_line() -> None:
    error = load("distill").error("no module 'layer9'", "train", "student", "forward_hook", "output", 0)
    message = f"{CONFIGS / 'distill.yaml'}:79:16: train.student.forward_hook.output.0: no module 'layer9'"
    assert str(error) == message


def test_the_file_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS)
    experiment = load_experiment("./distill.yaml")
    assert experiment.path == "./distill.yaml"
    assert experiment.where("train").startswith("./distill.yaml:")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_dump_loads_again_to_the_same(path: Path, tmp_path: Path) -> None:
    first = load_experiment(path, ["train.log_freq=7"])
    copy = tmp_path / "config.yaml"
    copy.write_text(first.dump())
    second = load_experiment(copy)
    assert comparable(second.data) == comparable(first.data)
    assert comparable(load_yaml_file(str(copy))) == comparable(first.data)
    assert second.data["train"]["log_freq"] == 7
    assert second.dump() == first.dump()
    assert second.digest() == first.digest()


def test_dump_keeps_tags_and_builds_shared_objects_once(tmp_path: Path) -> None:
    copy = tmp_path / "config.yaml"
    copy.write_text(load("supervised").dump())
    assert "!expanduser '~/absent/resnet20.pt'" in copy.read_text()
    datasets = load_yaml_file(str(copy))["datasets"]
    assert datasets["first"].dataset is datasets["second"].dataset


def test_digest_is_of_the_contents_only(tmp_path: Path) -> None:
    text = (CONFIGS / "distill.yaml").read_text()
    same = text.replace("1.0e-4", "0.0001").replace("key: 'SGD'", 'key: "SGD"  # a comment')
    same = same.replace("      lr: 0.1\n      momentum: 0.9\n", "      momentum: 0.9\n      lr: 0.1\n")
    assert same != text
    copy = tmp_path / "same.yaml"
    copy.write_text(same.replace("_experiment:", "_name_of_this:"))
    assert load_experiment(copy).digest() == load("distill").digest()
    assert load("distill", "train.num_epochs=3").digest() != load("distill").digest()
    assert load("distill", "train.num_epochs=2").digest() == load("distill").digest()
    assert len(load("distill").digest()) == 64
