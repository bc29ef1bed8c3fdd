from itertools import chain

import pytest
import torch

from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.training.corpus import Corpus
from tests.unit.stand_ins import artifact
from tests.unit.training.options import run_of

RUN = run_of(batch_size=4, epochs=3, seed=7)


@pytest.fixture(scope="module")
def corpus(mix, tokenizer):
    return Corpus([mix], tokenizer)


def order(corpus, run=RUN, first=0, steps=21):
    return list(corpus.batches(run, first, steps))


def test_all_usable_samples_are_held_and_the_others_counted(mix, tokenizer, samples):
    short = artifact(mix.folder, max_length=40)
    encoded = {s["id"]: encode(s, tokenizer, 40) for s in samples}
    kept = [i for i, e in encoded.items() if not isinstance(e, str)]
    corpus = Corpus([short, mix], tokenizer)
    assert [sample.sample["id"] for sample in corpus.samples] == kept + [s["id"] for s in samples]
    assert [sample.encoded for sample in corpus.samples[: len(kept)]] == [encoded[i].compact() for i in kept]
    assert all(
        list(sample.encoded.ids) == encoded[i].ids and sample.encoded.label_ids == encoded[i].label_ids
        for sample, i in zip(corpus.samples, kept, strict=False)
    )
    assert corpus.rejected.counts == {"too long": len(samples) - len(kept)}
    assert len(kept) < len(samples)


def test_steps_are_full_batches_times_epochs_or_as_given(corpus):
    assert len(corpus) == 29
    assert corpus.steps(RUN) == 29 // 4 * 3
    assert corpus.steps(run_of(batch_size=4, steps=5)) == 5
    assert corpus.steps(run_of(epochs=2)) == 2  # the paper's batch of 16
    with pytest.raises(UserError, match="29 usable samples do not fill one batch of 30"):
        corpus.steps(run_of(batch_size=30, epochs=1))


def test_the_order_depends_on_seed_and_epoch_alone(corpus):
    torch.manual_seed(1)
    first = order(corpus)
    torch.manual_seed(2)
    assert order(corpus) == first
    assert order(corpus, RUN.model_copy(update={"seed": 8})) != first
    assert [step for step, _ in first] == list(range(21))


@pytest.mark.parametrize("start", [1, 6, 7, 8, 20])
def test_going_on_anywhere_gives_what_would_have_followed(corpus, start):
    assert order(corpus, first=start) == order(corpus)[start:]


def test_an_epoch_shows_no_sample_twice_and_another_epoch_another_order(corpus):
    batches = [indices for _, indices in order(corpus)]
    epochs = [list(chain.from_iterable(batches[i : i + 7])) for i in (0, 7, 14)]
    assert all(len(set(epoch)) == 28 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_drawing_batches_leaves_the_global_random_state_alone(corpus):
    before = torch.get_rng_state()
    order(corpus)
    assert torch.equal(before, torch.get_rng_state())
