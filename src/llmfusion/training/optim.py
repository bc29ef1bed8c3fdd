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

TOGETHER = 2**27  # values of parameters, over all processes, that are updated at once


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW whose update is dropped where it disagrees in sign with the gradient.

    Per tensor: ``p -= lr wd p``; first and second moments as Adam; mask = [m g > 0], scaled by ``1 / max(mean(mask), 1e-3)``
    (``mean_clamp``) or ``n / (sum(mask) + 1)`` (``numel_plus_1``, the first release's); then
    ``p -= lr sqrt(1 - b2^t) / (1 - b1^t) (m mask) / (sqrt(v) + eps)``. With ``cautious=False`` the mask is all ones: AdamW.

    Of a sharded parameter each process updates its part; mean and sum of the mask are the whole parameter's. Moments are float32 or
    wider, and so is the arithmetic, which is rounded once to the parameter: in bfloat16 a second moment times 0.999 would stay as it is.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01, cautious: bool = True, norm: str = "mean_clamp",
    ):  # fmt: skip
        super().__init__(
            parameters,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "cautious": cautious, "norm": norm},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for some in _together(params):
                self._update(some, group)

    def _update(self, whole: list[Tensor], group: dict[str, Any]) -> None:
        stored = [local_shard(p) for p in whole]
        params, grads = [upcast(p) for p in stored], [upcast(local_shard(p.grad)) for p in whole if p.grad is not None]
        states = [self._state(p) for p in whole]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        for state in states:
            state["step"] += 1
        b1, b2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        updates = _masked(m, grads, whole, group["norm"]) if group["cautious"] else m
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, group["eps"])
        t = states[0]["step"]  # all parameters of a group have been through the same steps
        torch._foreach_addcdiv_(params, updates, roots, -group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t))
        for p, updated in zip(stored, params, strict=True):
            if p is not updated:
                p.copy_(updated)

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(
                step=0,
                **{key: torch.zeros_like(local_shard(p), dtype=accum_dtype(p)) for key in ("exp_avg", "exp_avg_sq")},
            )
        return state


def _together(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters to update at once, in order: few enough that what the update makes on the way takes little memory."""
    found: list[Tensor] = []
    size = 0
    for p in params:
        if found and size + p.numel() > TOGETHER:
            yield found
            found, size = [], 0
        found, size = [*found, p], size + p.numel()
    if found:
        yield found


def _masked(m: list[Tensor], gradients: list[Tensor], whole: list[Tensor], norm: str) -> list[Tensor]:
    """Each first moment where it agrees with its gradient, 0 elsewhere, scaled up by the share of what is left."""
    masks = list(torch._foreach_mul(m, gradients))
    torch._foreach_sign_(masks)
    torch._foreach_clamp_min_(masks, 0)
    sums = torch.stack(torch._foreach_norm(masks, 1))
    if is_shard(whole[0]):
        distributed.all_reduce(sums)
    scales = [
        p.numel() / (k + 1 if norm == "numel_plus_1" else max(k, 1e-3 * p.numel()))
        for p, k in zip(whole, sums.tolist(), strict=True)
    ]
    torch._foreach_mul_(masks, scales)
    torch._foreach_mul_(masks, m)
    return masks


def clip_gradients(parameters: list[Tensor], most: float) -> float:
    """Scale gradients down to the norm ``most``, that of all of them over all processes. Returns the norm they had."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def learning_rate(step: int, steps: int, peak: float, lowest: float, warmup: float, schedule: str = "cosine") -> float:
    """Rate of optimizer step ``step`` (from 0): linear over the first ``warmup`` share, then along ``schedule``.

    ``cosine`` and ``linear`` fall to ``lowest``, ``constant`` stays at the peak.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    through = (step - rising) / max(steps - rising, 1)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * through)), "linear": 1 - through, "constant": 1.0}[schedule]
    return lowest + (peak - lowest) * left


def effective_update_fraction(model: nn.Module, rate: float) -> float:
    """Share of the weights that a step of size ``rate`` changes, up or down, in their own precision; Adam's first step is one."""
    changed = total = 0
    for parameter in model.parameters():
        weight = parameter.detach()
        changed += sum(int((weight + way * rate).ne(weight).sum()) for way in (-1, 1))
        total += 2 * weight.numel()
    return changed / total


def require_effective_updates(model: nn.Module, rate: float) -> None:
    """Raise :class:`UserError` where less than half of the weights would move at the peak rate: most of the training would be rounded away."""
    share = effective_update_fraction(model, rate)
    if share >= 0.5:
        return
    enough = next(
        (r for r in (rate * 2.0**i for i in range(1, 60)) if effective_update_fraction(model, r) >= 0.5), math.inf
    )
    raise UserError(
        f"parameters: bfloat16 at lr {rate:g}: a step of this size changes {share:.1%} of the weights, the others are rounded back to what they were. "
        f"Use parameters: float32 (precision: bfloat16 may stay), or an lr of {enough:.0e} or more"
    )
