"""A frozen teacher stays as it is: evaluation mode at every forward pass, and a digest that proves it.

torchdistill freezes a teacher by ``requires_grad = False`` only. Left in training mode, its BatchNorm layers
normalise by batch statistics and move their running mean and variance at every step.
"""

import hashlib

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def frozen_roots(model: nn.Module) -> list[nn.Module]:
    """The largest submodules of ``model`` (itself included) that have parameters, none of them trainable.

    Modules without parameters (activations, dropout) follow the module that they are part of.
    """
    parameters = list(model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [model]
    return [root for child in model.children() for root in frozen_roots(child)]


def keep_in_eval(teacher: nn.Module, runs: nn.Module) -> RemovableHandle:
    """Puts the frozen parts of ``teacher`` into evaluation mode, now and before each forward pass of ``runs``.

    Args:
        teacher: the bare teacher. Layers that an auxiliary wrapper adds around it keep their own mode (SRD's
            BatchNorm on the teacher's side is meant to normalise by batch statistics).
        runs: the module whose forward pass runs the teacher: itself, or what it is wrapped in.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    roots = frozen_roots(teacher)

    def enforce(module: nn.Module, args: object) -> None:
        for root in roots:
            if root.training:
                root.eval()

    enforce(runs, ())
    return runs.register_forward_pre_hook(enforce)


@torch.no_grad()
def state_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers of ``model``.

    Buffers that are not part of the state dict count too: whatever changes what the model computes.
    """
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
