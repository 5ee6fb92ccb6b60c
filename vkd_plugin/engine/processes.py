"""The process group: one process, or N of them under torchrun (or Slurm), on CPUs or GPUs."""

import gc
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Args:
        rank: 0 for the main process, the one that writes files.
        world_size: number of processes.
        device: where this process computes.
        host_group: a process group for CPU tensors; None is the default group.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: Any = None

    @property
    def distributed(self) -> bool:
        """Whether a process group is there (also with a single process under torchrun)."""
        return dist.is_initialized()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    @property
    def device_ids(self) -> list[int] | None:
        """The one GPU of this process, or None on the CPU.

        Given to torchdistill in a single process too, whose ``wrapper`` would otherwise spread the model over all
        GPUs that are visible.
        """
        return [self.device.index or 0] if self.device.type == "cuda" else None

    def barrier(self) -> None:
        """Waits for the other processes."""
        if self.distributed:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; all of them have to ask. The device is not waited for."""
        if not self.distributed:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.host_group)
        return bool(votes.item())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers; all of them have to ask."""
        return min(self.gather(number))

    def gather(self, thing: T) -> list[T]:
        """What each process gives (anything that can be pickled), by rank, in every process."""
        if not self.distributed:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.host_group)
        return things

    def share(self, thing: T) -> T:
        """What the main process gives, in every process."""
        if not self.distributed:
            return thing
        things = [thing]
        dist.broadcast_object_list(things, src=0, group=self.host_group)
        return things[0]

    def share_result(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the main process, which alone calls it, in every process.

        Raises:
            UserError: the function raised it; so it is in every process.
        """
        result: T | None = None
        failure: UserError | None = None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                failure = error
        message, result = self.share((None if failure is None else str(failure), result))
        if message is not None:
            raise failure or UserError(message)
        return result  # type: ignore[return-value]


class Votes:
    """Asks at each step whether any process wants something, and has all of them act on it at the same step.

    The answer is that to the question before, one step old: it has come in while the step ran, so that no process
    waits for the slowest. A process on its own answers itself.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pending: tuple[torch.Tensor, Any] | None = None

    def cast(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag was true in any process when it was last cast; all processes have to cast."""
        if not self._processes.distributed:
            return flags
        before = self._pending
        votes = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._processes.host_group, async_op=True)
        self._pending = votes, work
        if before is None:
            return (False,) * len(flags)
        answer, work = before
        work.wait()
        return tuple(bool(value) for value in answer.tolist())


@contextmanager
def process_group(device: str | None, dist_url: str = "env://") -> Iterator[Processes]:
    """Joins the process group that the launcher describes in the environment, and leaves it at the end.

    torchdistill's own initialisation knows NCCL on CUDA only; here gloo serves the CPU.

    Args:
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``; None takes CUDA where it is.
        dist_url: how the processes meet (``--dist_url``).

    Raises:
        UserError: a device that does not exist, or another process has ended. Of all processes that fail, the first
            to do so is the one to print why.
    """
    rank, world_size, local_rank = _launched()
    chosen = _device(device, local_rank if world_size is not None else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    host_group: Any = None
    if world_size is not None:
        _meet("nccl" if chosen.type == "cuda" else "gloo", dist_url, rank, world_size)
        if chosen.type == "cuda":
            host_group = dist.new_group(backend="gloo")
    try:
        yield Processes(rank, world_size or 1, chosen, host_group)
        if dist.is_initialized():
            dist.barrier(group=host_group)  # what is still under way there ends before, such as a vote
            gc.collect()  # DistributedDataParallel refers to the group
    except UserError as error:
        error.spoken = _first_to_fail(otherwise=False)
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        ended = UserError("another process of this run has ended")
        ended.spoken = _first_to_fail(otherwise=True)  # one that was killed has said nothing
        raise ended from error
    finally:
        if dist.is_initialized():
            _leave(host_group)


def _meet(backend: str, dist_url: str, rank: int, world_size: int) -> None:
    """Joins the process group.

    torchrun with the c10d rendezvous keeps one store over all attempts of a job (``--max-restarts``). Without a prefix
    a process that is started again finds its peer's address of the attempt before, and the next start fails too.
    """
    timeout = timedelta(minutes=30)
    try:
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=timeout))
        store = dist.PrefixStore(f"attempt{_attempt()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"the processes cannot meet ({dist_url}, rank {rank} of {world_size}): {text}") from error


def _attempt() -> int:
    """How often torchrun has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _leave(host_group: Any) -> None:
    """Ends the process group and its threads.

    One of gloo's threads may be the last to hold a tensor. It then needs the interpreter, and if that has ended, the
    process aborts. The end of a group waits for its threads, but only if nothing refers to the group any more, and
    torch's FSDP keeps it in caches for good: such threads are given time to let go.
    """
    groups = [weakref.ref(group) for group in (dist.group.WORLD, host_group) if group is not None]
    dist.destroy_process_group()
    if any(group() is not None for group in groups):
        time.sleep(0.2)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def _first_to_fail(otherwise: bool) -> bool | None:
    """Whether no other process has failed before; None without a process group.

    Args:
        otherwise: the answer where the process that keeps the store is gone.
    """
    if not dist.is_initialized():
        return None
    try:
        return dist.distributed_c10d._get_default_store().add("vkd_plugin/failed", 1) == 1
    except RuntimeError:
        return otherwise


def restarted_job() -> str | None:
    """This job's name, if torchrun has started it again after one of its processes failed (``--max-restarts``)."""
    return job() if _attempt() > 0 else None


def job() -> str | None:
    """A name that all attempts of one torchrun share and no other job has; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    # What torchrun calls a job that --rdzv_id does not name: then it is this process's parent on this machine, whose
    # number a later one may have again, in a container for one.
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{platform.node()}:{parent}:{started}"


def _launched() -> tuple[int, int | None, int]:
    """Rank, world size (None without a launcher) and local rank, as torchrun or Slurm's srun say."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, None, 0


def _device(name: str | None, local_rank: int | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device (use cpu, cuda or cuda:N)") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA device is available here (use --device cpu)")
        if device.index is None:
            device = torch.device("cuda", local_rank or 0)
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise UserError(f"--device {name}: training runs on cpu or cuda")
    return device
