"""One model sharded over the processes of a training (torch's FSDP2): weights, gradients and moments.

Every layer is gathered when it computes and resharded after; embeddings, last norm and head are gathered once a step,
so that the fused loss has the whole head. Shards are cut along the first dimension. Gradients are summed, as in
:mod:`llmfusion.training.distributed`: losses are divided by counts of the whole step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import require
from llmfusion.models.batches import default_device
from llmfusion.models.loading import empty_model, load_model, meta_copy
from llmfusion.study.schema.training import Training
from llmfusion.training.distributed import rank, world_size


class FinalHiddenStates(nn.Module):
    """What a training calls of a causal language model. Its head takes part in the loss alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The hidden states (B, T, d) after the last norm, of ids and attention mask (B, T)."""
        return self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def layers_of(model: Any) -> list[nn.Module]:
    """The layers whose activations can be recomputed and whose weights are gathered one layer at a time.

    Raises :class:`UserError` for a model without any.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    name = type(model).__name__
    require(
        bool(layers), f"transformers marks no layers in {name}: leave out `sharding` and `activation_checkpointing`"
    )
    return layers


def shard(model: Any) -> FinalHiddenStates:
    """Shard a model over all processes. Only the first one's weights count; others give an empty one (:func:`load`).

    The first process needs the whole model in host memory until then; on a device no process ever holds more than its
    shard and one whole weight.
    """
    mesh = init_device_mesh(default_device(), (world_size(),))
    weights = dict(model.named_parameters())
    sharded = FinalHiddenStates(meta_copy(model))
    for name, parameter in sharded.model.named_parameters():
        parameter.data = parameter.data.to(weights[name].dtype)
    for layer in layers_of(sharded):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _replace_parameters(sharded.model, lambda name: nn.Parameter(_distribute(weights.pop(name).detach(), mesh)))
    _broadcast_buffers(sharded.model, model)
    return sharded


def _distribute(weight: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's shard of the first process's ``weight``."""
    device = default_device()
    whole = weight.to(device) if rank() == 0 else torch.empty(weight.shape, dtype=weight.dtype, device=device)
    return distribute_tensor(whole, mesh, [Shard(0)])


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are shards."""
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    """Whether this is one process's shard of a tensor."""
    return isinstance(tensor, DTensor)


def load(artifact: Artifact, run: Training) -> Any:
    """The model to train, in float32; of one that will be sharded only the first process reads the weights."""
    return load_model(artifact, "float32") if run.sharding == "none" or rank() == 0 else empty_model(artifact)


def gather_full_model(model: Any, dtype: torch.dtype) -> Any:
    """The model as it was before :func:`shard`, in ``dtype`` on the CPU of the first process; None in the others.

    All must call. Weights are gathered one by one, so the first process holds the model once. A model that is not
    sharded is returned as it is.
    """
    if not is_sharded(model):
        return model
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach().full_tensor()
        if rank() == 0:
            weights[name] = whole.to("cpu", dtype)
        del whole
    if rank() != 0:
        return None
    full_model = meta_copy(model)
    _replace_parameters(full_model, lambda name: nn.Parameter(weights.pop(name)))
    return full_model


def set_is_last_backward(module: nn.Module, is_last: bool) -> None:
    """Tell a sharded module before each micro-batch whether it is the step's last.

    Until then embeddings and head stay gathered, with their gradients.
    """
    if isinstance(module, FSDPModule):
        module.set_reshard_after_backward(is_last, recurse=False)
        module.set_requires_gradient_sync(is_last, recurse=False)


def reshard(module: nn.Module) -> None:
    """Reshard what is gathered, so that the module's parameters are the shards."""
    if isinstance(module, FSDPModule):
        module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard, in the same memory; a tensor that is not sharded as it is. Not differentiable."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else tensor


def _replace_parameters(model: nn.Module, make: Callable[[str], nn.Parameter]) -> None:
    """Put another parameter, made from its name, in the place of each one; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = make(name)
        _set(model, name, made[parameter])


def _broadcast_buffers(model: nn.Module, original: nn.Module) -> None:
    """Every process has the first one's buffers, whole."""
    buffers = dict(original.named_buffers())
    for name, buffer in list(model.named_buffers()):
        value = buffers[name].detach().to(default_device(), buffer.dtype).contiguous()
        distributed.broadcast(value, 0)
        _set(model, name, value)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)
