"""Shared by all tests: no test leaves torchdistill's or torch's global state changed for the next."""

import os

# For this process and those that tests start: models are small, and threads that wait for each other cost more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from imagenet_helper import sound, tree  # noqa: F401 - fixtures

LONGEST_FIRST = (
    "test_faults.py",
    "test_run.py",
    "test_check.py",
    "test_mistakes_catalogue.py",
    "test_imagenet_evidence.py",
    "test_sharding.py",
    "test_torchdistill_compat.py",
    "test_docs.py",
    "test_switches.py",
    "test_teacher_cache.py",
    "test_report.py",
    "test_contract.py",
    "test_coco_configs.py",
    "test_imagenet_configs.py",
    "test_vidt_parity.py",
    "test_vidt.py",
    "test_checkpoint_files.py",
)
"""Files that take longest, in the order in which they start: one that starts last keeps one process busy alone."""


def pytest_configure(config: pytest.Config) -> None:
    """``--dist loadfile`` takes the files as they are collected, and not those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What is there by now stays; the garbage collector is to leave it alone."""
    import frozen_helper  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; tests marked ``gpu`` are skipped where there is no CUDA device."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
