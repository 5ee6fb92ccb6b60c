"""Nested parts of a data set, the same on every machine."""

import hashlib
from collections.abc import Sequence


def shuffled(indices: Sequence[int], seed: int | str) -> list[int]:
    """``indices`` in a random order that depends on ``seed`` and on nothing else.

    Sorted by a hash of each, as libraries change their generators.
    """
    return sorted(indices, key=lambda index: hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest())


def kept_fraction(indices: Sequence[int], fraction: float) -> list[int]:
    """The first ``fraction`` of ``indices``, at least one of them."""
    return list(indices[: max(1, round(fraction * len(indices)))])
