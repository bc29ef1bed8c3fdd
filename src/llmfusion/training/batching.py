"""How one optimizer step's samples are shared by processes and cut into micro-batches. The loss does not depend on it."""

from collections.abc import Sequence

Groups = list[list[int]]  # positions of samples in the step, by micro-batch


def micro_batches(
    lengths: Sequence[int], processes: int, size: int | None = None, tokens: int | None = None
) -> list[Groups]:
    """For each process its micro-batches of a step's samples, which have ``lengths`` in tokens; all get equally many samples.

    ``size``: consecutive samples, so many at a time (default: all of a process's). ``tokens``: sorted by length, as many as
    padded to the longest of them hold at most so many tokens; a sample that is longer alone is taken alone. Then all processes
    have the same number of micro-batches: those that split a model gather its layers together.
    """
    if tokens is None:
        each = len(lengths) // processes
        return [_consecutive(range(process * each, (process + 1) * each), size or each) for process in range(processes)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = [_cut(order[process::processes], lengths, tokens) for process in range(processes)]
    most = max(map(len, groups))
    return [_split(own, most) for own in groups]


def padding(lengths: Sequence[int], groups: Groups) -> int:
    """Padded places in these micro-batches."""
    return sum(max(lengths[i] for i in group) * len(group) - sum(lengths[i] for i in group) for group in groups)


def _consecutive(own: range, size: int) -> Groups:
    return [list(own[at : at + size]) for at in range(0, len(own), size)]


def _cut(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Groups:
    out: Groups = []
    for i in order:
        if out and lengths[out[-1][0]] * (len(out[-1]) + 1) <= tokens:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _split(groups: Groups, number: int) -> Groups:
    """The largest group in two until there are ``number``."""
    while len(groups) < number:
        at = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = (len(groups[at]) + 1) // 2
        groups = [*groups[:at], groups[at][:half], groups[at][half:], *groups[at + 1 :]]
    return groups
