"""ViDT in two processes, which import no more than they need."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes_helper import work_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from vidt_helper import random_images, small_vidt, target


def gradients(model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
    sum(model(images, targets).values()).backward()
    own = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad for name, p in own.named_parameters() if p.requires_grad}


def two_images() -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The second without objects, and both of one size, so that padding is no question."""
    return random_images((40, 52), (40, 52), dtype=torch.float64), [
        target([[2, 3, 20, 30], [10, 10, 40, 25]], [1, 4]),
        target([], []),
    ]


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, targets = two_images()
    model = DistributedDataParallel(small_vidt().double().train())
    for _ in range(2):  # a second step fails where a parameter got no gradient in the first
        model.zero_grad()
        found = gradients(model, images[rank : rank + 1], targets[rank : rank + 1])
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


def test_two_processes_take_one_processes_step(tmp_path: Path) -> None:
    """One image each, one of them without objects, the number of objects averaged."""
    work_together(one_of_two, (tmp_path,), 2)
    expected = gradients(small_vidt().double().train(), *two_images())
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), expected, rtol=1e-7, atol=1e-9)
