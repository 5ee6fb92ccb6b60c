"""A step that one of several processes takes by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is its only one: a sum over all would wait for peers that take no such step."""
    with patch("torch.distributed.is_initialized", return_value=False):
        yield
