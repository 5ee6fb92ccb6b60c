"""torchdistill's ``wrapper: 'FullyShardedDataParallel2'``: each process keeps a part of the student's parameters.

torch's ``fully_shard`` around the student, its wrapper included, as one group. Outside of the forward and backward
pass its parameters are DTensors, of which only torch's own optimizers know; what else handles parameters goes through
the functions here. torchdistill itself shards on GPUs alone, and neither evaluates nor saves what it has sharded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves

from ..decay import NO_DECAY_MARK
from ..errors import BadValue
from .build import is_staged, stage_sections

FSDP, FSDP2 = "FullyShardedDataParallel", "FullyShardedDataParallel2"

# They look at whole matrices, or at all parameters as one vector.
_NOT_IN_SHARDS = ("Adafactor", "LBFGS", "Muon")


# Set-up.


def refuse_unsupported(train_config: Mapping[str, Any]) -> None:
    """Checks what ``train`` says of sharding before models are touched; for several processes.

    Raises:
        BadValue: it cannot be done.
    """
    staged = is_staged(train_config)
    for section in stage_sections(train_config):
        students = [_wrapper(section.get(side))[0] for side in ("student", "model")]
        teacher = _wrapper(section.get("teacher"))[0]
        if FSDP in (*students, teacher):
            raise BadValue(f"{FSDP} is not supported, {FSDP2} is (for the student)", FSDP)
        if teacher == FSDP2:
            raise BadValue(f"{FSDP2} shards what is trained, the student; the teacher stays whole", FSDP2)
        if FSDP2 in students and staged:
            raise BadValue(f"{FSDP2} cannot be combined with stages; take DistributedDataParallel", FSDP2)
        optimizer = (section.get("optimizer") or {}).get("key")
        if FSDP2 in students and optimizer in _NOT_IN_SHARDS:
            raise BadValue(f"{optimizer} cannot be combined with {FSDP2}: it needs whole parameters", optimizer)


def asks_for_shards(side: Mapping[str, Any]) -> bool:
    """Whether a model's section has ``wrapper: 'FullyShardedDataParallel2'``."""
    return _wrapper(side)[0] == FSDP2


def shard(model: nn.Module, device: torch.device, side: Mapping[str, Any]) -> None:
    """Shards ``model`` over all processes, in place, beginning with the weights and buffers of rank 0.

    Args:
        model: what trains; DistributedDataParallel must not be in it.
        device: of this process.
        side: the model's section. Of ``wrapper.kwargs`` there is ``reshard_after_forward``: True frees whole
            parameters between forward and backward pass as well.

    Raises:
        BadValue: torch cannot shard it.
    """
    options = _wrapper(side)[1]
    for name in options:
        if name != "reshard_after_forward":
            raise BadValue(f"{FSDP2}: '{name}' is not supported, reshard_after_forward is", FSDP2)
    model.to(device)
    marked = [name for name, p in model.named_parameters() if getattr(p, NO_DECAY_MARK, False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # from channels_last, which torch refuses to shard
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)
    try:
        fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)), **options)
    except (ValueError, NotImplementedError) as error:
        raise BadValue(f"{FSDP2}: {' '.join(str(error).split())}", FSDP2) from error
    for name in marked:  # the parameters are new ones
        setattr(model.get_parameter(name), NO_DECAY_MARK, True)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` has been sharded, by itself or as a part of another."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def _wrapper(side: Mapping[str, Any] | None) -> tuple[str | None, Mapping[str, Any]]:
    wrapper = (side or {}).get("wrapper")
    if isinstance(wrapper, Mapping):
        return wrapper.get("key"), wrapper.get("kwargs") or {}
    return wrapper, {}


# The backward pass.


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: FSDPModule, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.model, ctx.outputs = model, len(outputs)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.model.unshard()
        return None, gradients[0], *(None for _ in range(ctx.outputs))


class Anchor:
    """Makes the backward pass of every loss go through the outputs of a sharded model, and adds no gradient.

    torch gathers the parameters again, and averages the gradients, by hooks on the model's outputs. From a loss of
    hooked features alone they would never be called, and without a word nothing would be trained; and features are
    gone through before the output, when with ``reshard_after_forward`` the parameters are not there yet.
    """

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        self._model = model
        self._outputs: list[Tensor] = []
        model.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]

    def __call__(self, loss: Tensor) -> Tensor:
        """``loss``, tied to the outputs of the last forward pass."""
        outputs, self._outputs = self._outputs, []
        return _Anchored.apply(self._model, loss, *outputs) if outputs else loss


# What looks at parameters and gradients.


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters of ``model`` inside, to be left as they are; all processes have to take part."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``; the others are not asked."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that ``optimizer`` was given, in the order of its state dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient, (P,); of sharded ones all processes have to ask."""
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    sharded = [isinstance(gradient, DTensor) for gradient in gradients]
    if not any(sharded):
        return norms
    squares = norms.double().square()
    dist.all_reduce(squares)
    which = torch.tensor(sharded).to(norms.device, non_blocking=True)
    return torch.where(which, squares.sqrt().to(norms.dtype), norms)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Clips gradients whose norm is known; torch does not take shards and whole parameters together."""
    for sharded in (True, False):
        kind = [p for p in parameters if isinstance(p, DTensor) is sharded]
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)


# Checkpoints, in which everything is whole.


def whole(state: Any) -> Any:
    """``state`` with whole tensors on the CPU in place of shards; all processes have to take part."""
    if isinstance(state, DTensor):
        full: Tensor = state.full_tensor()
        return full.detach().cpu()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    return state


def like(value: Any, own: Tensor) -> Any:
    """A whole tensor of ``own``'s shape, the same in all processes, as a shard where ``own`` is one."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return value


def state_like(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors as ``module`` would have it."""
    own = module.state_dict()
    return {name: like(value, own[name]) if name in own else value for name, value in state.items()}


def optimizer_state_like(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors as ``optimizer`` would have it."""
    parameters = parameters_of(optimizer)
    tensors = {
        index: {name: like(value, parameters[index]) for name, value in values.items()}
        if index < len(parameters)
        else values
        for index, values in state["state"].items()
    }
    return {**state, "state": tensors}
