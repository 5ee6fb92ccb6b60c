"""A tiny ImageNet for tests: fixtures, which conftest.py makes known, and damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that no test changes."""
    from vkd_plugin.datasets.tiny_imagenet import write_tree  # here: conftest.py is imported before anything else

    folder = tmp_path_factory.mktemp("sound")
    write_tree(folder, classes=3, train=8, val=2)
    return folder


@pytest.fixture
def tree(tmp_path: Path, sound: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "imagenet"))


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
