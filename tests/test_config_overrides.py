"""--set: what it changes, what it leaves alone, and what it says where it cannot."""

from pathlib import Path

import pytest

from vkd_plugin.config import ConfigErrors, Experiment, load_experiment

CONFIGS = Path(__file__).parent / "data" / "configs"


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(CONFIGS / f"{name}.yaml", overrides)


def message(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigErrors) as caught:
        load(name, *overrides)
    return str(caught.value)


def test_values_are_yaml() -> None:
    train = load(
        "distill",
        "train.num_epochs=5",
        "train.optimizer.kwargs={lr: 0.5, nesterov: True, momentum: 0.9}",
        "train.scheduler=",
        "train.optimizer.max_grad_norm = null",
        "train.student.forward_hook.output.-1=layer3",
        "train.student.forward_hook.output.0='layer2'",
    ).data["train"]
    assert train["num_epochs"] == 5
    assert train["optimizer"]["kwargs"] == {"lr": 0.5, "nesterov": True, "momentum": 0.9}
    assert train["scheduler"] is None
    assert train["optimizer"]["max_grad_norm"] is None
    assert train["student"]["forward_hook"]["output"] == ["layer2", "layer3"]


def test_a_later_override_wins() -> None:
    assert load("distill", "train.num_epochs=5", "train.num_epochs=6").data["train"]["num_epochs"] == 6


def test_optional_keys_can_be_added_with_what_leads_to_them() -> None:
    train = load(
        "distill",
        "train.amp.dtype=bfloat16",
        "train.compile.student=reduce-overhead",
        "train.optimizer.kwargs.nesterov=True",
        "train.train_data_loader.sampler.kwargs={}",
        "_anything=1",
    ).data["train"]
    assert train["amp"] == {"dtype": "bfloat16"}
    assert train["compile"] == {"student": "reduce-overhead"}
    assert train["optimizer"]["kwargs"]["nesterov"] is True


def test_inside_a_tag() -> None:
    data = load("distill", "datasets.fake/train.init.kwargs.size=3").data
    assert len(data["datasets"]["fake/train"]) == 3
    assert len(data["datasets"]["fake/val"]) == 4


def test_a_value_may_have_a_tag() -> None:
    data = load("distill", "datasets.fake/val=!import_get {key: torch.nn.Linear}").data
    assert data["datasets"]["fake/val"].__name__ == "Linear"


def test_an_alias_changes_alone() -> None:
    data = load("distill", "train.val_data_loader.kwargs.batch_size=9", "models.student_model.key=resnet34").data
    assert data["train"]["val_data_loader"]["kwargs"]["batch_size"] == 9
    assert data["train"]["train_data_loader"]["kwargs"]["batch_size"] == 4
    assert data["models"]["student_model"]["key"] == "resnet34"
    assert data["models"]["student_model"]["dst_ckpt"] == "./absent/fake-resnet18_from_resnet34.pt"


def test_a_private_key_changes_all_aliases() -> None:
    data = load("distill", "models.student_model._experiment=mine").data
    assert data["models"]["student_model"]["dst_ckpt"] == "./absent/mine.pt"
    train = load("engine", "_lr=0.5", "_loader.kwargs.batch_size=2", "_speed.channels_last=true").data["train"]
    assert train["optimizer"]["kwargs"]["lr"] == 0.5
    assert train["train_data_loader"]["kwargs"]["batch_size"] == 2
    assert train["val_data_loader"]["kwargs"]["batch_size"] == 2
    assert train["channels_last"] is False  # the file's own key wins over the merged one
    assert load("engine", "_speed.log_freq=9").data["train"]["log_freq"] == 9


def test_where_is_the_override() -> None:
    experiment = load("distill", "train.num_epochs=5", "train.amp={dtype: float16}")
    assert experiment.where("train", "num_epochs") == "--set train.num_epochs=5"
    assert experiment.where("train", "amp", "dtype") == "--set train.amp={dtype: float16}"
    assert experiment.where("train").endswith("distill.yaml:49:1")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.num_epocs=3", "no key 'num_epocs' in train (did you mean 'num_epochs'?)"),
        ("trian.num_epochs=3", "no key 'trian' (did you mean 'train'?)"),
        ("train.num_epochs", "expected PATH=VALUE, for example train.num_epochs=3"),
        ("=3", "expected PATH=VALUE, for example train.num_epochs=3"),
        ("train..x=3", "expected PATH=VALUE, for example train.num_epochs=3"),
        ("train.num_epochs=[1", "expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
        ("train.num_epochs=*lr", "found undefined alias 'lr'"),
        ("train.num_epochs=a\0b", "unprintable character #x0000"),
        ("train.num_epochs.x=1", "train.num_epochs is 2, not a mapping or a list"),
        ("train.num_epochs=ten", "train.num_epochs: expected a whole number of at least 0, got 'ten'"),
        (
            "train.student.forward_hook.output.2=x",
            "no item '2' in train.student.forward_hook.output: its items are 0 to 1",
        ),
        ("train.student.frozen_modules.0=x", "no item '0' in train.student.frozen_modules: it is empty"),
        (
            "datasets.fake/vall.init.kwargs.size=1",
            "no key 'fake/vall' in datasets (did you mean 'fake/val'?)",
        ),
        ("datasets.fake/val.int.kwargs.size=1", "no key 'int' in datasets.fake/val (did you mean 'init'?)"),
        (
            "train.criterion.kwargs.sub_terms.kd.weigth=1",
            "no key 'weigth' in train.criterion.kwargs.sub_terms.kd (did you mean 'weight'?)",
        ),
        (
            "train.optimizer.kwargs.momentun=1",
            "train.optimizer.kwargs: SGD takes no argument 'momentun' (did you mean 'momentum'?)",
        ),
    ],
)
def test_what_is_wrong_with_an_override(override: str, problem: str) -> None:
    assert message("distill", override) == f"--set {override}: {problem}"


def test_all_wrong_overrides_are_reported() -> None:
    text = message("distill", "train.a=1", "nonsense", "train.b=1")
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "--set nonsense",
        "--set train.a=1",
        "--set train.b=1",
    ]
