"""Batch sizes that are divided among processes, and statistics that they share."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from vkd_plugin.config import Experiment, load_experiment
from vkd_plugin.engine.build import build_model, for_processes
from vkd_plugin.errors import ConfigError

ROOT = Path(__file__).parents[1]
VKD = ROOT / "configs" / "digits" / "vkd" / "vit_from_cnn.yaml"
STAGED = Path(__file__).parent / "data" / "configs" / "staged.yaml"


def experiment(*overrides: str, path: Path = VKD) -> Experiment:
    return load_experiment(path, [*overrides, "train.global_batch=True"])


def test_a_global_batch_is_divided() -> None:
    one = experiment()
    before = one.data["train"]["train_data_loader"]["kwargs"]["batch_size"]
    divided = for_processes(one, 4)["train_data_loader"]["kwargs"]
    assert divided == {**one.data["train"]["train_data_loader"]["kwargs"], "batch_size": before // 4}
    assert one.data["train"]["train_data_loader"]["kwargs"]["batch_size"] == before == 64
    assert for_processes(one, 4)["val_data_loader"] == one.data["train"]["val_data_loader"]


def test_each_stages_batch_is_divided_if_it_has_one() -> None:
    staged = experiment(path=STAGED)
    before = staged.data["train"]
    after = for_processes(staged, 2)
    assert list(after) == list(before)
    for name in ("stage1", "stage2"):
        loader = before[name].get("train_data_loader")
        if loader:
            expected = loader["kwargs"]["batch_size"] // 2
            assert after[name]["train_data_loader"]["kwargs"]["batch_size"] == expected
    assert after["stage1"]["train_data_loader"]["kwargs"]["batch_size"] >= 1


def test_without_the_key_or_alone_nothing_changes() -> None:
    plain = load_experiment(VKD)
    assert for_processes(plain, 4) is plain.data["train"]
    alone = experiment()
    assert for_processes(alone, 1) is alone.data["train"]


def test_what_cannot_be_divided_has_its_line() -> None:
    with pytest.raises(ConfigError, match=r"vit_from_cnn.yaml:\d+:\d+: train.*batches of 64 cannot be divided among 3"):
        for_processes(experiment(), 3)


@pytest.mark.parametrize("key", ["{key: timm_model, kwargs: {name: test_resnet}}", "{key: resnet18, kwargs: {}}"])
@pytest.mark.parametrize(("distributed", "device"), [(True, "meta"), (True, "cpu"), (False, "meta")])
def test_statistics_of_all_processes(
    key: str, distributed: bool, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of timm's models as well as of torchvision's; on the CPU torch has no SyncBatchNorm, and a warning says so."""
    model = f"models.student_model={key[:-1]}, sync_bn: True}}"
    with caplog.at_level(logging.WARNING):
        built = build_model(load_experiment(VKD, [model]), "student_model", torch.device(device), distributed)
    normalizations = [m for m in built.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(normalizations) > 5
    synchronised = {isinstance(m, nn.SyncBatchNorm) for m in normalizations}
    assert synchronised == {distributed and device != "cpu"}
    assert ("student_model: SyncBatchNorm works on GPUs only" in caplog.text) == (distributed and device == "cpu")
