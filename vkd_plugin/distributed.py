"""Sums over the ranks that gradients pass through.

Every rank computes its own loss, and DistributedDataParallel averages the gradients of the W ranks, so the
objective is L = (1 / W) sum_r L_r. A statistic s = sum_r s_r that every L_k reads has dL/ds_r = (1 / W)
sum_k dL_k/ds: the backward of a sum over ranks is again a sum over ranks, and the average is left to DDP.

These are collectives: every rank has to call them, in the same order, forward and backward.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return _AllReduceSum.apply(grads[0])


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over the ranks, the same bits on each; ``x`` has one shape on all of them."""
    return _AllReduceSum.apply(x)


def row_counts(x: Tensor) -> list[int]:
    """The number of rows that each rank holds, known to the host (so it waits for the device)."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    counts[dist.get_rank()] = x.shape[0]
    dist.all_reduce(counts)
    return counts.tolist()


def gather_rows(x: Tensor, counts: list[int]) -> tuple[Tensor, slice]:
    """All rows (sum of ``counts``, C), rank after rank, and where this rank's own rows (N, C) are in them.

    A sum over zero-padded rows, since ranks may hold different numbers of them.
    """
    rank = dist.get_rank()
    before, after = sum(counts[:rank]), sum(counts[rank + 1 :])
    return all_reduce_sum(F.pad(x, (0, 0, before, after))), slice(before, before + x.shape[0])
