"""One model split over the processes of a training (torch's FSDP2): each holds its part of every weight, gradient and moment.

Every layer is gathered when it computes and given up again; embeddings, last norm and head are gathered once a step, so that
the fused loss has the whole head. Parts are cut along the first dimension. Gradients are summed, as in
:mod:`llmfusion.training.distributed`: losses are divided by counts of the whole step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import require
from llmfusion.models.batches import default_device
from llmfusion.models.loading import empty_model, load_model, meta_copy
from llmfusion.study.schema.training import Training
from llmfusion.training.distributed import rank, world_size


class FinalHiddenStates(nn.Module):
    """What a training calls of a causal language model: ids (B, T) to final states (B, T, d). Its head takes part in the loss alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The final states, after the last norm."""
        return self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def layers_of(model: Any) -> list[nn.Module]:
    """The layers whose activations can be computed anew and whose weights are gathered one by one. Raises :class:`UserError` without any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    name = type(model).__name__
    require(bool(found), f"transformers marks no layers in {name}: leave out `sharding` and `activation_checkpointing`")
    return found


def shard(model: Any) -> FinalHiddenStates:
    """Split a model over all processes. Only the first one's weights count: the others may give an empty one (:func:`hollow`).

    The first process needs the whole model in host memory until then; on a device no process ever holds more than its part and
    one whole weight.
    """
    mesh = init_device_mesh(default_device(), (world_size(),))
    given = dict(model.named_parameters())
    states = FinalHiddenStates(meta_copy(model))
    for name, parameter in states.model.named_parameters():
        parameter.data = parameter.data.to(given[name].dtype)
    for layer in layers_of(states):
        fully_shard(layer, mesh=mesh)
    fully_shard(states, mesh=mesh, reshard_after_forward=False)
    for module in states.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def part(name: str, empty: nn.Parameter) -> nn.Parameter:
        value = given.pop(name).detach()
        full = (
            value.to(default_device())
            if rank() == 0
            else torch.empty(value.shape, dtype=value.dtype, device=default_device())
        )
        return nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))

    _replace(states.model, part)
    _share_buffers(states.model, model)
    return states


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are parts."""
    return any(is_shard(p) for p in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    """Whether this is one process's part of a sharded tensor."""
    return isinstance(tensor, DTensor)


def load(artifact: Artifact, run: Training) -> Any:
    """The model to train, in float32; of one that will be sharded only the first process reads the weights."""
    return load_model(artifact, "float32") if run.sharding == "none" or rank() == 0 else empty_model(artifact)


def gather_full_model(model: Any, dtype: torch.dtype) -> Any:
    """The model as it was before :func:`shard`, in ``dtype`` on the CPU of the first process; None in the others. All must call.

    Weights are gathered one by one, so the first process holds the model once. A model that is not sharded is returned as it is.
    """
    if not is_sharded(model):
        return model
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.detach().full_tensor()
        if rank() == 0:
            found[name] = full.to("cpu", dtype)
        del full
    if rank() != 0:
        return None
    out = meta_copy(model)
    _replace(out, lambda name, _: nn.Parameter(found.pop(name)))
    return out


def next_backward(states: nn.Module, last: bool) -> None:
    """Tell before each micro-batch whether it is the step's last: until then embeddings and head stay gathered, with their gradients."""
    if isinstance(states, FSDPModule):
        states.set_reshard_after_backward(last, recurse=False)
        states.set_requires_gradient_sync(last, recurse=False)


def reshard(states: nn.Module) -> None:
    """Give up what is gathered, so that the model's parameters are the parts."""
    if isinstance(states, FSDPModule):
        states.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor as it is. Not differentiable."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else tensor


def _replace(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put another parameter in the place of each one; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if old not in made:
            made[old] = make(name, old)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, made[old])


def _share_buffers(model: nn.Module, given: nn.Module) -> None:
    """Every process has the first one's buffers, whole."""
    theirs = dict(given.named_buffers())
    for name, buffer in list(model.named_buffers()):
        value = theirs[name].detach().to(default_device(), buffer.dtype).contiguous()
        distributed.broadcast(value, 0)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, value)
