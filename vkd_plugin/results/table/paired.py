"""Two rows of a table, compared seed by seed."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """What one row is above another, over the seeds that both have.

    Attributes:
        difference: its mean.
        p: of the two-sided paired t-test (Student), which takes the differences as drawn from a normal distribution:
            how probable a mean at least as far from 0 is if theirs is 0. None for fewer than two seeds, or where all
            differ by as much.
        n: number of seeds.
    """

    difference: float
    p: float | None
    n: int


def compare(row: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """The comparison of two rows' values by seed; None where they share no seed."""
    from scipy.stats import ttest_rel  # here: most tables compare nothing, and it takes a while

    seeds = [seed for seed in row if seed in other]
    if not seeds:
        return None
    differences = [row[seed] - other[seed] for seed in seeds]
    p: float | None = None
    if any(not math.isclose(d, differences[0], rel_tol=1e-9, abs_tol=1e-9) for d in differences):
        p = float(ttest_rel([row[seed] for seed in seeds], [other[seed] for seed in seeds]).pvalue)
    return Paired(statistics.mean(differences), p, len(seeds))
