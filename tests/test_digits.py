"""The digits: the same splits everywhere, balanced fractions, usable from torchdistill's YAML."""

import hashlib

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 (torchdistill.datasets looks for it in sys.modules)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.datasets.registry import get_dataset

from vkd_plugin.datasets import Digits

YAML = """
datasets:
  digits/train: !import_call
    key: 'vkd_plugin.datasets.Digits'
    init:
      kwargs:
        split: 'train'
        fraction: 0.1
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.RandomAffine', init: {kwargs: {degrees: 10}}}
                - !import_call {key: 'torchvision.transforms.ToTensor', init: }
"""


def pixels(dataset: Digits) -> list[bytes]:
    return [image.tobytes() for image, _ in dataset]


def test_splits_share_out_all_images():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1297, 500)
    every = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(pixels(train) + pixels(test)) == sorted(image.tobytes() for image in every)
    assert np.bincount(test.targets).tolist() == [50] * 10
    assert np.bincount(train.targets).min() > 120


@pytest.mark.parametrize(("split", "digest"), [("train", "d821308ce6afe749"), ("test", "8b3af4cda00aeeeb")])
def test_splits_are_the_same_everywhere(split, digest):
    dataset = Digits(split)
    content = b"".join(pixels(dataset)) + bytes(dataset.targets)
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == digest


def test_item():
    image, label = Digits("test")[0]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert image.getextrema() == (0, 239)  # 15 of 16 is the darkest of this one
    assert isinstance(label, int)
    dataset = Digits("test", transform=np.asarray, target_transform=str)
    assert dataset[0][0].shape == (8, 8)
    assert dataset[0][1] == dataset.classes[label]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 2**40))
def test_fractions_are_balanced_and_nested(a, b, seed):
    small, large = (Digits("train", fraction=f, seed=seed) for f in sorted((a, b)))
    counts = np.bincount(small.targets, minlength=10)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1 + 9 * min(a, b)  # classes themselves differ by nine images
    assert set(pixels(small)) <= set(pixels(large))


def test_the_seed_chooses_the_fraction():
    one, other, again = (pixels(Digits("train", fraction=0.2, seed=s)) for s in (1, 2, 1))
    assert one == again != other


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "val"}, r"no split of Digits 'val' \(choose from test, train\)"),
        ({"split": "tran"}, "did you mean 'train'"),
        ({"split": "train", "fraction": 0}, r"fraction must lie in \(0, 1\], got 0"),
        ({"split": "train", "fraction": 1.5}, "got 1.5"),
        ({"split": "test", "fraction": 0.5}, "fraction is for the train split"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Digits(**kwargs)


def test_from_yaml(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(YAML)
    dataset = load_yaml_file(str(path))["datasets"]["digits/train"]
    sample, _ = dataset[0]
    assert (sample.shape, sample.dtype) == ((1, 8, 8), torch.float32)
    assert len(dataset) == 129
    assert get_dataset("Digits") is Digits
