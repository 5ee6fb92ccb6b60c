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


def check_fraction(split: str, fraction: float) -> None:
    """Only of the training images a part may be taken.

    Raises:
        ValueError: a fraction out of (0, 1], or of another split.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    if split != "train" and fraction != 1:
        raise ValueError(f"fraction is for the train split; results on a part of the {split} split do not compare")
