"""C-AdamW (Liang et al. 2024, arXiv 2411.16085) and AdamW, and the learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW whose update is dropped where it disagrees in sign with the gradient.

    Per tensor: ``p -= lr wd p``; first and second moments as Adam; mask = [m g > 0], scaled by ``1 / max(mean(mask), 1e-3)``
    (``mean_clamp``) or ``n / (sum(mask) + 1)`` (``numel_plus_1``, the first release's); then
    ``p -= lr sqrt(1 - b2^t) / (1 - b1^t) (m mask) / (sqrt(v) + eps)``. With ``cautious=False`` the mask is all ones: AdamW.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01, cautious: bool = True, norm: str = "mean_clamp",
    ):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "cautious": cautious, "norm": norm})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        states = [self._state(p) for p in params]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        for state in states:
            state["step"] += 1
        b1, b2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        updates = _masked(m, grads, group["norm"]) if group["cautious"] else m
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, group["eps"])
        t = states[0]["step"]  # all parameters of a group have been through the same steps
        torch._foreach_addcdiv_(params, updates, roots, -group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t))

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return state


def _masked(m: list[Tensor], gradients: list[Tensor], norm: str) -> list[Tensor]:
    """Each first moment where it agrees with its gradient, 0 elsewhere, scaled up by the share of what is left."""
    masks = list(torch._foreach_mul(m, gradients))
    torch._foreach_sign_(masks)
    torch._foreach_clamp_min_(masks, 0)
    kept = torch.stack(torch._foreach_norm(masks, 1)).tolist()
    scales = [t.numel() / (k + 1 if norm == "numel_plus_1" else max(k, 1e-3 * t.numel())) for t, k in zip(m, kept, strict=True)]
    torch._foreach_mul_(masks, scales)
    torch._foreach_mul_(masks, m)
    return masks


def learning_rate(step: int, steps: int, peak: float, lowest: float, warmup: float) -> float:
    """Rate of optimizer step ``step`` (from 0): linear over the first ``warmup`` share, then a cosine to ``lowest``."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    through = (step - rising) / max(steps - rising, 1)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * through))
