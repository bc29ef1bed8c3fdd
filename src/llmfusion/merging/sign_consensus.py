"""What TIES, SCE and RSAF share: a sign is elected at every position, and only the deltas that have it are merged.

TIES: Yadav et al. 2023, arXiv 2306.01708. SCE: Wan et al. 2024, arXiv 2408.07990. RSAF: arXiv 2501.02795, Algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmfusion.io.lazy import np
from llmfusion.merging.blocks import Array, Block, FloatArray, PivotDeltas, TensorMerge
from llmfusion.merging.lazy import kernels
from llmfusion.merging.selection import SortKeys, TopKSelection


@dataclass
class SelectedDeltas:
    """The deltas that are merged: one selection a model, and the keys it was made by, a row for all models or each."""

    sort_keys: SortKeys
    selections: Sequence[TopKSelection]

    def zero_unselected(self, block: Block) -> None:
        """Set the deltas of a block that are not selected to 0, in place."""
        keys = self.sort_keys(block, False)  # (1, c) or (J, c)
        for j, selection in enumerate(self.selections):
            selection.zero_unselected(block.start, keys[j % len(keys)], block.deltas[j])


def merge_agreeing(
    tensor: PivotDeltas,
    votes: Array,
    weights: Array,
    *,
    normalize: bool,
    scale: float = 1.0,
    selected: SelectedDeltas | None = None,
) -> Callable[[Block], Array]:
    """``theta + scale sum_j weights_j delta_j`` over the models whose delta has the elected sign, that of ``sum_j
    votes_j delta_j``.

    ``normalize`` divides by the weights that agree. With ``selected`` only those deltas vote and are merged.
    """
    out = tensor.scratch()
    factor = np.float32(scale)

    def merge_block(block: Block) -> Array:
        if selected is not None:
            selected.zero_unselected(block)
        kernels.add_agreeing(block.theta, block.deltas, votes, weights, normalize, factor, out)
        return out[: block.theta.size]

    return merge_block


def merge_by_energy(
    tensor: PivotDeltas,
    squares: FloatArray,
    notes: dict[str, float],
    *,
    normalize: bool,
    selected: SelectedDeltas | None = None,
) -> TensorMerge:
    """Coefficients ``eta_j`` from the selected ``squares (J,)``; then the deltas whose sign is the majority's, weighted
    by them.

    Without ``selected`` all deltas are merged with these coefficients (FuseChat's code), with it only the selected ones
    (the papers); ``normalize`` divides by the coefficients that agree.
    """
    total = float(squares.sum())
    # an exact test for 0: small deltas change nothing
    eta = squares / total if total > 0 else np.full(tensor.models, 1 / tensor.models)
    kept = energy_share(total, tensor)
    notes = {**notes, **{f"eta_{j}": float(share) for j, share in enumerate(eta)}, "kept_energy": kept}
    merge_block = merge_agreeing(
        tensor, np.ones(tensor.models, np.float32), eta.astype(np.float32), normalize=normalize, selected=selected
    )
    return TensorMerge(merge_block, notes, 1.0 if selected is None else kept)


def energy_share(squares: float, tensor: PivotDeltas) -> float:
    """The share that ``squares`` are of the sum of squares of all deltas; 0 where there are none."""
    energy = float(tensor.energies.sum())
    return squares / energy if energy else 0.0
