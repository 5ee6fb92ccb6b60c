"""The global generators of python, numpy and torch (CPU), put back as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_restored() -> Iterator[None]:
    """Whatever the block draws or seeds, afterwards the global generators are what they were before it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - transforms draw from the global one
    cpu = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(cpu)
