"""How a step's samples are shared by processes and cut into micro-batches. The loss does not depend on it."""

from collections.abc import Sequence

MicroBatches = list[list[int]]  # positions of samples in the step's batch, by micro-batch


def micro_batches(
    lengths: Sequence[int],
    world_size: int,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
) -> list[MicroBatches]:
    """For each process its micro-batches of a step's samples, of ``lengths`` in tokens; all get equally many samples.

    ``micro_batch_size``: consecutive samples, so many at a time (default: all of a process's).
    ``micro_batch_tokens``: sorted by length, as many as padded to the longest of them hold at most so many tokens; a
    sample that is longer alone is taken alone. Then all processes have the same number of micro-batches: those that
    shard a model gather its layers together.
    """
    if micro_batch_tokens is None:
        share = len(lengths) // world_size
        shares = [range(rank * share, (rank + 1) * share) for rank in range(world_size)]
        return [_consecutive(positions, micro_batch_size or share) for positions in shares]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cuts = [_cut_by_tokens(longest_first[rank::world_size], lengths, micro_batch_tokens) for rank in range(world_size)]
    number = max(map(len, cuts))
    return [_split_to(groups, number) for groups in cuts]


def padding(lengths: Sequence[int], groups: MicroBatches) -> int:
    """Padded places in these micro-batches."""
    return sum(max(lengths[i] for i in group) * len(group) - sum(lengths[i] for i in group) for group in groups)


def _consecutive(positions: range, size: int) -> MicroBatches:
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]


def _cut_by_tokens(longest_first: Sequence[int], lengths: Sequence[int], tokens: int) -> MicroBatches:
    groups: MicroBatches = []
    for i in longest_first:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _split_to(groups: MicroBatches, number: int) -> MicroBatches:
    """The largest micro-batch in two until there are ``number``."""
    while len(groups) < number:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = (len(groups[largest]) + 1) // 2
        halves = [groups[largest][:half], groups[largest][half:]]
        groups = [*groups[:largest], *halves, *groups[largest + 1 :]]
    return groups
