"""Batches on their way to the device."""

import pytest
import torch
from torch import Tensor

from vkd_plugin.engine.transfer import Transfer


def test_on_a_cpu_nothing_is_copied() -> None:
    batch = [torch.ones(2)], {"labels": torch.zeros(2)}, "name"
    calls = []
    assert Transfer(torch.device("cpu"))(lambda: calls.append(0) or batch) is batch
    assert calls == [0]


@pytest.mark.gpu
def test_kernels_find_each_batch_complete_and_its_memory_is_not_the_next_ones() -> None:
    device = torch.device("cuda")
    transfer = Transfer(device)
    batches = [torch.full((1 << 24,), float(number)).pin_memory() for number in range(20)]
    slow = torch.randn(4096, 4096, device=device)

    def move(batch: Tensor) -> tuple[list[Tensor], dict[str, object]]:
        labels = batch[:8].to(device, non_blocking=True)
        return [batch.to(device, non_blocking=True)], {"name": "batch", "labels": labels}

    sums = []
    torch.cuda.synchronize()
    for batch in batches:  # the host is through before the device has begun
        (moved,), named = transfer(lambda batch=batch: move(batch))
        slow = (slow @ slow).tanh()  # what reads the batch comes long after its copy
        sums.append(torch.stack([moved.double().mean(), named["labels"].double().mean()]))  # type: ignore[attr-defined]
        del moved, named
    expected = [[float(number)] * 2 for number in range(len(batches))]
    assert torch.stack(sums).tolist() == expected
