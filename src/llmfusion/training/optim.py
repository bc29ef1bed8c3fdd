"""C-AdamW (Liang et al. 2024, arXiv 2411.16085) and AdamW, and the learning rate."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from llmfusion.errors import UserError
from llmfusion.fusion.head import accum_dtype, upcast
from llmfusion.training.sharding import is_shard, local_shard

CHUNK_VALUES = 2**27  # values of parameters, over all processes, that are updated at once


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW whose update is dropped where it disagrees in sign with the gradient.

    Per tensor: ``p -= lr wd p``; first and second moments as Adam; mask = [m g > 0], scaled by ``1 / max(mean(mask),
    1e-3)`` (``mean_clamp``) or ``n / (sum(mask) + 1)`` (``numel_plus_1``, the first release's); then ``p -= lr sqrt(1
    - b2^t) / (1 - b1^t) (m mask) / (sqrt(v) + eps)``. With ``cautious=False`` the mask is all ones: AdamW.

    Of a sharded parameter each process updates its shard; mean and sum of the mask are the whole parameter's. Moments
    are float32 or wider, and so is the arithmetic, which is rounded once to the parameter: in bfloat16 a second
    moment times 0.999 would stay as it is.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        cautious: bool = True,
        norm: str = "mean_clamp",
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, {**defaults, "cautious": cautious, "norm": norm})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameters in _chunks([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        stored = [local_shard(p) for p in parameters]
        values = [upcast(p) for p in stored]
        grads = [upcast(local_shard(p.grad)) for p in parameters if p.grad is not None]
        states = [self._state(p) for p in parameters]
        m = [state["exp_avg"] for state in states]
        v = [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        t = states[0]["step"]  # all parameters of a group have been through the same steps
        b1, b2 = group["betas"]
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        updates = _masked(m, grads, parameters, group["norm"]) if group["cautious"] else m
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(values, updates, roots, -group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t))
        for p, updated in zip(stored, values, strict=True):
            if p is not updated:
                p.copy_(updated)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(local_shard(parameter), dtype=accum_dtype(parameter))
        return state


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters to update at once, in order: few enough that the update's intermediate values take little memory."""
    chunk: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if chunk and size + parameter.numel() > CHUNK_VALUES:
            yield chunk
            chunk = []
            size = 0
        chunk.append(parameter)
        size += parameter.numel()
    if chunk:
        yield chunk


def _masked(m: list[Tensor], grads: list[Tensor], parameters: list[Tensor], norm: str) -> list[Tensor]:
    """Each first moment where it agrees in sign with its gradient, 0 elsewhere, scaled up by the share that is left."""
    masks = list(torch._foreach_mul(m, grads))
    torch._foreach_sign_(masks)
    torch._foreach_clamp_min_(masks, 0)
    sums = torch.stack(torch._foreach_norm(masks, 1))
    if is_shard(parameters[0]):
        distributed.all_reduce(sums)
    scales = [
        p.numel() / (k + 1 if norm == "numel_plus_1" else max(k, 1e-3 * p.numel()))
        for p, k in zip(parameters, sums.tolist(), strict=True)
    ]
    torch._foreach_mul_(masks, scales)
    torch._foreach_mul_(masks, m)
    return masks


def clip_grad_norm(parameters: list[Tensor], max_norm: float) -> float:
    """Scale gradients down to ``max_norm``, that of all of them over all processes. Returns the norm they had."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def learning_rate(step: int, steps: int, lr: float, lr_min: float, warmup: float, schedule: str = "cosine") -> float:
    """Rate of optimizer step ``step`` (from 0): linear over the first ``warmup`` share, then along ``schedule``.

    ``cosine`` and ``linear`` fall from the peak ``lr`` to ``lr_min``, ``constant`` stays at the peak.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return lr_min + (lr - lr_min) * left


def effective_update_fraction(model: nn.Module, lr: float) -> float:
    """Share of the weights that a step of size ``lr``, as Adam's first one is, changes in their own precision."""
    changed = 0
    total = 0
    for parameter in model.parameters():
        weight = parameter.detach()
        changed += sum(int((weight + sign * lr).ne(weight).sum()) for sign in (-1, 1))
        total += 2 * weight.numel()
    return changed / total


def require_effective_updates(model: nn.Module, lr: float) -> None:
    """Raise :class:`UserError` where less than half of the weights would change at the peak rate.

    Most of the training would be rounded away.
    """
    share = effective_update_fraction(model, lr)
    if share >= 0.5:
        return
    higher = (lr * 2.0**i for i in range(1, 60))
    enough = next((rate for rate in higher if effective_update_fraction(model, rate) >= 0.5), math.inf)
    raise UserError(
        f"parameters: bfloat16 at lr {lr:g}: a step of this size changes {share:.1%} of the weights, "
        "the others are rounded back to what they were. "
        f"Use parameters: float32 (precision: bfloat16 may stay), or an lr of {enough:.0e} or more"
    )
