"""A step's samples are dealt out whole, whatever their lengths, and sorting them saves padding."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfusion.training.batching import micro_batches, padding

LENGTHS = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.just(n), st.integers(1, 6).flatmap(lambda m: st.lists(st.integers(1, 50), min_size=n * m, max_size=n * m))
    )
)


def test_without_options_each_process_takes_its_consecutive_samples_at_once():
    assert micro_batches([5] * 6, 1) == [[[0, 1, 2, 3, 4, 5]]]
    assert micro_batches([5] * 6, 2) == [[[0, 1, 2]], [[3, 4, 5]]]
    assert micro_batches([5] * 8, 2, micro_batch_size=2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_by_tokens_the_longest_come_first_and_padded_batches_keep_the_budget():
    lengths = [3, 10, 4, 9, 5, 2]
    assert micro_batches(lengths, 1, micro_batch_tokens=20) == [[[1, 3], [4, 2, 0, 5]]]  # 2 x 10, 4 x 5
    assert micro_batches(lengths, 1, micro_batch_tokens=9) == [
        [[1], [3], [4], [2, 0], [5]]
    ]  # the first is longer than the budget: alone
    assert padding(lengths, [[1, 3], [4, 2, 0, 5]]) == 1 + (1 + 2 + 3)


def test_processes_that_share_a_model_have_the_same_number_of_micro_batches():
    cuts = micro_batches([10, 10, 10, 1, 1, 1, 1, 1], 2, micro_batch_tokens=10)
    assert cuts == [[[0], [2], [4, 6]], [[1], [3, 5], [7]]]


@given(LENGTHS, st.integers(1, 120))
def test_every_sample_is_in_one_micro_batch_and_none_is_too_large(case, tokens):
    processes, lengths = case
    cuts = micro_batches(lengths, processes, micro_batch_tokens=tokens)
    assert sorted(i for groups in cuts for group in groups for i in group) == list(range(len(lengths)))
    assert len({len(groups) for groups in cuts}) == 1
    assert {sum(map(len, groups)) for groups in cuts} == {len(lengths) // processes}
    for group in (group for groups in cuts for group in groups):
        assert group
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= tokens


@pytest.mark.parametrize("processes", [1, 2])
def test_sorting_saves_most_of_the_padding(processes):
    random = Random(0)
    lengths = [random.randint(20, 400) for _ in range(64)]
    by_count = micro_batches(lengths, processes, micro_batch_size=4)
    by_tokens = micro_batches(lengths, processes, micro_batch_tokens=4 * max(lengths))
    padded, saved = (sum(padding(lengths, groups) for groups in cuts) for cuts in (by_count, by_tokens))
    assert saved < padded / 2
