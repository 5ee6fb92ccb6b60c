"""changes: what differs between a saved experiment and the present one, and what is left out."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vkd_plugin.config import ConfigErrors, Experiment, load_experiment
from vkd_plugin.config.changes import FREE, Change, changes, sentence
from vkd_plugin.config.experiment import resolve
from vkd_plugin.config.nodes import entries, is_private
from vkd_plugin.config.trust import Trust

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs" / "digits").rglob("*.yaml"))
DATA = ROOT / "tests" / "data" / "configs"
FILES = [*SHIPPED, *sorted(DATA.glob("*.yaml"))]
VKD = ROOT / "configs" / "digits" / "vkd" / "vit_from_cnn.yaml"


@cache
def resolved(path: Path, *overrides: str) -> Experiment:
    """The experiment without its data, for which data sets would have to be built."""
    return Experiment(str(path), resolve(path, overrides)[0], {})


def said(path: Path, before: tuple[str, ...] = (), now: tuple[str, ...] = ()) -> list[str]:
    """The changes of a file from one list of overrides to another."""
    return [str(change) for change in changes(resolved(path, *before).dump(), resolved(path, *now))]


def edited(tmp_path: Path, old: str, new: str, path: Path = VKD) -> list[Change]:
    """The changes of a file in which a text is replaced, from the file as it was."""
    text = path.read_text()
    assert old in text
    (tmp_path / "edited.yaml").write_text(text.replace(old, new))
    return changes(resolved(path).dump(), resolved(tmp_path / "edited.yaml"))


@cache
def scalars(path: Path) -> list[tuple[str, str]]:
    """Key and tag of every scalar in a file that decides what is trained."""

    def walk(node: yaml.Node, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, yaml.MappingNode):
            for name, (_, value) in entries(node).items():
                if not is_private(name):
                    yield from walk(value, f"{key}.{name}")
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from walk(item, f"{key}.{index}")
        else:
            yield key.removeprefix("."), node.tag

    free = ("log_freq", "dst_ckpt", "num_workers", "checkpoint.every_steps", "checkpoint.keep")
    return [(key, tag) for key, tag in walk(resolve(path)[0], "") if not any(name in key for name in free)]


VALUES = {
    "tag:yaml.org,2002:int": st.integers(2, 99).map(str),
    "tag:yaml.org,2002:float": st.floats(0.01, 0.99).map(str),
    "tag:yaml.org,2002:bool": st.sampled_from(["True", "False"]),
}
TEXTS = st.from_regex(r"[a-z][a-z0-9_.']{0,8}", fullmatch=True) | st.sampled_from(["'1.0'", '"a\\nb"', "'null'"])


@st.composite
def scalar_overrides(draw: st.DrawFn) -> tuple[Path, str, str]:
    """A file, a key in it that holds a scalar, and an override that gives it some value of that kind."""
    path = draw(st.sampled_from(FILES))
    key, tag = draw(st.sampled_from(scalars(path)))
    return path, key, f"{key}={draw(VALUES.get(tag, TEXTS))}"


@settings(max_examples=40, deadline=None)
@given(scalar_overrides())
def test_an_override_of_a_scalar_changes_that_key_alone(drawn: tuple[Path, str, str]) -> None:
    path, key, override = drawn
    before = resolved(path)
    try:
        now = resolved(path, override)
    except ConfigErrors:
        assume(False)
    found = changes(before.dump(), now)
    assert [change.key for change in found] == ([] if before.digest() == now.digest() else [key])
    back = changes(now.dump(), before)
    assert back == [Change(change.key, change.now, change.before) for change in found]
    # What is printed can be typed.
    repeated = resolved(path, *[f"{change.key}={change.now}" for change in found])
    assert repeated.digest() == now.digest()
    assert all(len(str(change).splitlines()) == 1 for change in found)


@settings(max_examples=40, deadline=None)
@given(path=st.sampled_from(FILES), data=st.data())
def test_several_overrides_are_as_many_changes(path: Path, data: st.DataObject) -> None:
    numbers = [key for key, tag in scalars(path) if tag.endswith((":int", ":float"))]
    bounded = ("decay", "betas", "smoothing")  # which 97 is too much for
    numbers = [key for key in numbers if not any(name in key for name in bounded)]
    keys = data.draw(st.lists(st.sampled_from(numbers), unique=True, max_size=4))
    found = changes(resolved(path).dump(), resolved(path, *[f"{key}=97" for key in keys]))
    assert {change.key for change in found} == set(keys)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_same_experiment_has_not_changed(path: Path, tmp_path: Path) -> None:
    first = resolved(path)
    assert changes(first.dump(), first) == []
    copy = tmp_path / "copy.yaml"
    copy.write_text(first.dump())
    assert changes(first.dump(), resolved(copy)) == []


def test_a_loaded_experiment_is_compared() -> None:
    before = load_experiment(VKD).dump()
    now = load_experiment(VKD, ["train.optimizer.kwargs.lr=0.001"])
    assert changes(before, now) == [Change("train.optimizer.kwargs.lr", "0.002", "0.001")]


KEY = "train.optimizer.kwargs.x"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("0.002", "0.001", ": 0.002 -> 0.001"),
        ("1.0e-5", "1", ": 1.0e-05 -> 1"),
        ("'1'", "1", ": '1' -> 1"),
        ("1", "1.0", ": 1 -> 1.0"),
        ("1", "True", ": 1 -> True"),
        ("", "''", ": null -> ''"),
        ("", "[]", ": null -> []"),
        ("{}", "[1]", ": {} -> [...]"),
        ("{a: 1}", "", ": {...} -> null"),
        ("2020-01-31", "'2020-01-31'", ": 2020-01-31 -> '2020-01-31'"),
        ("'it''s'", '"a\\nb"', ": 'it''s' -> \"a\\nb\""),
        ("!expanduser ~/x", "~/x", ": !expanduser '~/x' -> '~/x'"),
        ("!expanduser ~/x", "!abspath ~/x", ": !expanduser '~/x' -> !abspath '~/x'"),
        ("!join [a, b]", "!pathjoin [a, b]", ": !join [...] -> !pathjoin [...]"),
        ("!join [a, b]", "!join [a, c]", ".1: 'b' -> 'c'"),
        ("!import_get {key: math.e}", "!import_call {key: math.e}", ": !import_get {...} -> !import_call {...}"),
        ("!import_get {key: math.e}", "!import_get {key: math.pi}", ".key: 'math.e' -> 'math.pi'"),
        ("{key: a}", "!import_get {key: math.e}", ": {...} -> !import_get {...}"),
        ("{a: 1, b: {c: 2}}", "{b: {c: 3}, d: 4}", ".a: removed; KEY.b.c: 2 -> 3; KEY.d: added"),
        ("[1, 2]", "[1, 3]", ".1: 2 -> 3"),
        ("[1]", "[1, {a: 2}, [3]]", ".1: added; KEY.2: added"),
        ("[[1, 2]]", "[[]]", ".0.0: removed; KEY.0.1: removed"),
        ("[null]", "[]", ".0: removed"),
        ("{1: a}", "{'1': a}", ".1: removed; KEY.1: added"),
        ("{[1]: a}", "{[2]: a}", ".[...]: removed; KEY.[...]: added"),
    ],
)
def test_each_kind_of_change(before: str, now: str, expected: str) -> None:
    found = changes(resolved(VKD, f"{KEY}={before}").dump(), resolved(VKD, f"{KEY}={now}"))
    assert sentence(found) == KEY + expected.replace("KEY", KEY)


def test_a_mapping_added_or_removed_is_one_change() -> None:
    before, now = resolved(VKD), resolved(VKD, "train.ema={decay: 0.9}")
    (added,) = changes(before.dump(), now)
    assert added == Change("train.ema", None, "{...}")
    assert str(added) == "train.ema: added"
    (removed,) = changes(now.dump(), before)
    assert removed == Change("train.ema", "{...}", None)
    assert str(removed) == "train.ema: removed"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight_decay: 0.05", "weight_decay: 5.0e-2"),
        ("key: 'AdamW'", 'key: "AdamW"  # decoupled'),
        ("key: 'AdamW'", "key: AdamW"),
        ("requires_grad: False", "requires_grad: false"),
        ("{lr: 2.0e-3, weight_decay: 0.05}", "{weight_decay: 0.05, lr: 0.002}"),
        ("kwargs: {lr: 2.0e-3, weight_decay: 0.05}", "kwargs:\n      lr: 0.002\n      weight_decay: 0.05"),
        ("sampler: *in_order", "sampler:\n      class_or_func: !import_get {key: torch.utils.data.SequentialSampler}\n"
         "      kwargs: ~"),
        ("dependencies:", "_note: 'read by nothing'\ndependencies:"),
        ("key: 'AdamW'\n    kwargs: {", "key: 'AdamW'\n    kwargs: {_note: 1, "),
    ],
)  # fmt: skip
def test_the_way_it_is_written_makes_no_difference(old: str, new: str, tmp_path: Path) -> None:
    assert edited(tmp_path, old, new) == []


WORKERS = (
    "num_workers=7",
    "pin_memory=True",
    "persistent_workers=True",
    "prefetch_factor=3",
    "timeout=9.5",
    "multiprocessing_context='spawn'",
    "pin_memory_device='cuda'",
)
LOADERS = (
    (VKD, "train.train_data_loader"),
    (VKD, "train.val_data_loader"),
    (VKD, "test.test_data_loader"),
    (DATA / "staged.yaml", "train.stage1.train_data_loader"),
    (DATA / "staged.yaml", "train.stage1.val_data_loader"),
)
DETECTOR = ROOT / "configs" / "coco2017" / "undistilled" / "vidt_swin_nano.yaml"
CACHED = ROOT / "configs" / "fashion_mnist" / "vkd" / "vit_from_cnn.yaml"
FREE_OVERRIDES = [
    *((path, f"{loader}.kwargs.{worker}") for path, loader in LOADERS for worker in WORKERS),
    (VKD, "train.log_freq=99"),
    (VKD, "test.log_freq=99"),
    (VKD, "train.checkpoint={every_steps: 5}"),
    (VKD, "train.checkpoint="),
    (VKD, "train.skip_nonfinite=3"),
    (VKD, "train.validate_every=2"),
    (DETECTOR, "test.pictures={count: 4}"),
    (CACHED, "train.teacher_cache.folder=elsewhere"),
    (DATA / "engine.yaml", "train.checkpoint.keep=9"),
    (VKD, "models.student_model.dst_ckpt='elsewhere.pt'"),
    (VKD, "models.teacher_model.dst_ckpt='elsewhere.pt'"),
    (VKD, "train.student.dst_ckpt='elsewhere.pt'"),
    (DATA / "staged.yaml", "train.student.dst_ckpt='elsewhere.pt'"),
    (DATA / "staged.yaml", "train.teacher={dst_ckpt: 'elsewhere.pt'}"),
    (DATA / "staged.yaml", "train.stage2.student.dst_ckpt='elsewhere.pt'"),
]


@pytest.mark.parametrize(("path", "override"), FREE_OVERRIDES, ids=lambda value: getattr(value, "stem", value))
def test_a_free_key_does_not_matter(path: Path, override: str) -> None:
    without, with_it = resolved(path), resolved(path, override)
    assert with_it.digest() != without.digest()
    assert changes(without.dump(), with_it) == []
    assert changes(with_it.dump(), without) == []


def test_a_loader_that_a_later_stage_adds_decides_but_its_workers_do_not() -> None:
    sampler = "{class_or_func: !import_get {key: torch.utils.data.SequentialSampler}, kwargs: {}}"
    loader = f"train.stage2.train_data_loader={{dataset_id: fake, sampler: {sampler}, kwargs: {{batch_size: 2}}}}"
    path = DATA / "staged.yaml"
    assert said(path, (), (loader,)) == ["train.stage2.train_data_loader: added"]
    assert said(path, (loader,), (loader, "train.stage2.train_data_loader.kwargs.num_workers=4")) == []


def test_every_free_pattern_is_tried() -> None:
    tried = {override.partition("=")[0] for _, override in FREE_OVERRIDES}
    for pattern in FREE:
        stem = pattern.replace("stage*", "stage1").removeprefix("**.")
        assert any(key == stem or key.startswith(f"{stem}.") or key.endswith(f".{stem}") for key in tried), pattern


@pytest.mark.parametrize(
    "override",
    [
        "train.train_data_loader.kwargs.batch_size=3",
        "train.train_data_loader.kwargs.drop_last=False",
        "train.train_data_loader.kwargs.pin_memory_too=True",
        "train.train_data_loader.requires_supp=True",
        "train.train_data_loader.sampler.kwargs={}",
        "test.test_data_loader.kwargs.batch_size=3",
        "train.num_epochs=3",
        "train.channels_last=True",
        "train.optimizer.kwargs.num_workers=1",
        "train.criterion.kwargs.log_freq=1",
        "models.student_model.src_ckpt='a.pt'",
        "models.student_model.kwargs.timeout=1",
    ],
)
def test_no_other_key_is_free(override: str) -> None:
    found = changes(resolved(VKD).dump(), resolved(VKD, override))
    assert [change.key for change in found] == [override.partition("=")[0]]


def test_a_free_key_does_not_hide_its_neighbour() -> None:
    kwargs = "train.train_data_loader.kwargs"
    found = said(VKD, (), (f"{kwargs}={{num_workers: 4, batch_size: 32, drop_last: True}}",))
    assert found == [f"{kwargs}.batch_size: 64 -> 32"]
    assert said(VKD, (), ("models.student_model.kwargs={}",)) == []
    assert said(VKD, (), ("train.criterion.kwargs.x={}",)) == ["train.criterion.kwargs.x: added"]


def test_long_values_are_cut_unless_the_difference_would_be() -> None:
    base, other = "a" * 100 + "x" + "b" * 100, "a" * 100 + "y" + "b" * 100
    (change,) = changes(resolved(VKD, f"{KEY}={base}").dump(), resolved(VKD, f"{KEY}=short"))
    assert change.before is not None
    assert len(change.before) <= 80
    assert "a...b" in change.before
    assert said(VKD, (f"{KEY}={base}",), (f"{KEY}={other}",)) == [f"{KEY}: '{base}' -> '{other}'"]


def test_nothing_in_the_saved_text_is_executed(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    call = f"!import_call {{key: os.mkdir, init: {{args: ['{witness}']}}}}"
    before = Experiment(str(VKD), resolve(VKD, [f"{KEY}={call}"], Trust(["os"]))[0], {}).dump()
    assert str(witness) in before
    assert changes(before, resolved(VKD)) == [Change(KEY, "!import_call {...}", None)]
    assert not witness.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[1, 2]",
        "!getattr {a: 1}",
        "a: [",
        "a: 1\na: 2",
        "a: &a [*a]",
        "a: *b",
        "a: !unknown 1",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        'a: "\\UFFFFFFFF"',
        "a: \x00",
        "a: " + "[" * 5000,
        "a: " + "[" * 200 + "]" * 200,
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the saved experiment") as caught:
        changes(text, resolved(VKD))
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 4000), length=st.integers(0, 40), put=st.text(max_size=6) | st.sampled_from(["!!bool ", "&a"]))
def test_a_damaged_text_is_compared_or_refused(at: int, length: int, put: str) -> None:
    now = resolved(VKD)
    text = now.dump()
    try:
        found = changes(text[:at] + put + text[at + length :], now)
    except ValueError:
        return
    assert all(isinstance(change, Change) for change in found)


def test_sentence() -> None:
    some = [Change(f"a.{n}", "1", "2") for n in range(7)]
    assert sentence([]) == ""
    assert sentence(some[:1]) == "a.0: 1 -> 2"
    assert sentence(some[:5]) == "; ".join(f"a.{n}: 1 -> 2" for n in range(5))
    assert sentence(some) == sentence(some[:5]) + "; and 2 more"
    assert sentence([Change("a", None, "1"), *some], show=1) == "a: added; and 7 more"
    assert str(Change("a\nb", "1", None)) == "a b: removed"
