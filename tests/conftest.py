"""Shared by all tests: no test leaves torchdistill's or torch's global state changed for the next."""

import os

# For this process and those that tests start: models are small, and threads that wait for each other cost more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from imagenet_helper import sound, tree  # noqa: F401 - fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
