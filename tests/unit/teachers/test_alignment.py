import json

import pytest
import torch

from llmfusion.errors import UserError
from llmfusion.teachers.alignment import (
    join_matches,
    match_spans,
    redistribute_by_bytes,
    responses,
    row_spans,
    token_bytes,
    token_spans,
)
from tests.unit.stand_ins import question

TEXTS = [
    "Das Café kostet 1234 €.",
    "漢字 and kana: かな, 한글",
    "a 🙂👩‍🔬 in between\n\n  two spaces",
    "12 + 3456 = 3468\n#### 3468",
    "x",
    "",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Byte-level vocabularies that split digits and characters differently, and one like SentencePiece's."""
    from llmfusion.models.scratch import make_tokenizer
    from llmfusion.study.schema.base_models import Tokenizer

    file = tmp_path_factory.mktemp("texts") / "samples.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": str(i), "domain": "general", "text": text}) + "\n"
            for i, text in enumerate(TEXTS[:-1] * 3)
        )
    )
    sizes = {"bytes": (258, 3), "single digits": (330, 1), "groups of digits": (480, 3)}
    made = {}
    for name, (size, digits) in sizes.items():
        options = Tokenizer.model_construct(
            vocabulary_size=size, digits=digits
        )  # of bytes alone: a study asks for more
        made[name] = make_tokenizer(options, file, None)
    return made | {"sentencepiece": sentencepiece()}


def sentencepiece():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghiknorstwx:,.+=#1234",
        "▁a",
        "▁an",
        "▁and",
        "in",
        "be",
        "▁be",
    ]
    merges = [("▁", "a"), ("▁a", "n"), ("▁an", "d"), ("i", "n"), ("b", "e"), ("▁", "be")]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=False)


NAMES = ["bytes", "single digits", "groups of digits", "sentencepiece"]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("name", NAMES)
def test_spans_lie_end_to_end_and_cut_the_text_as_the_tokens_do(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, text)
    found = token_spans(token_bytes(tokenizer), ids, text).tolist()
    assert len(found) == len(ids)
    assert [end for _, end in found[:-1]] == [start for start, _ in found[1:]]
    pieces = [text.encode()[start:end] for start, end in found]
    assert b"".join(pieces).decode() == text
    for i in range(len(ids)):
        decoded = tokenizer.decode(ids[: i + 1])
        if "\ufffd" not in decoded:  # the prefix ends between characters
            assert decoded == b"".join(pieces[: i + 1]).decode()


def test_a_character_in_several_tokens_has_a_span_for_each_of_its_bytes(tokenizers):
    tokenizer = tokenizers["bytes"]
    found = token_spans(token_bytes(tokenizer), ids_of(tokenizer, "é漢🙂"), "é漢🙂").tolist()
    assert found == [[i, i + 1] for i in range(2 + 3 + 4)]


def test_sentencepieces_first_space_is_cut_off_and_its_byte_tokens_count_one_each(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    pieces, ids = token_bytes(tokenizer), ids_of(tokenizer, "and é")
    assert [pieces[i] for i in ids] == [b" and", b" ", b"\xc3", b"\xa9"]
    assert token_spans(pieces, ids, "and é").tolist() == [[0, 3], [3, 4], [4, 5], [5, 6]]


def test_a_text_whose_first_token_is_no_label_is_placed_from_its_end():
    pieces = [b"ab", b"c", b"de"]
    assert token_spans(pieces, [1, 2], "abcde").tolist() == [[2, 3], [3, 5]]


def test_tokens_that_do_not_write_the_text_have_no_spans_and_only_the_end_matches(tokenizers):
    pieces = [b"ab", b"c", b"<end>"]
    assert token_spans(pieces, [0, 1], "abC") is None
    found = row_spans(pieces, [0, 1, 2, 0, 1, 2], [0, 3], ["abC", "abc"])
    assert found.tolist() == [[0, 0], [0, 0], [3, 4], [4, 6], [6, 7], [7, 8]]
    assert match_spans(found, found).tolist() == [-1, -1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["\n\nab 12 \n", " a", "b \u2003", "\t#### 3468"])
def test_an_answer_that_a_template_trims_aligns_with_the_same_answer_untrimmed(tokenizers, name, text):
    tokenizer = tokenizers[name]
    found = token_spans(token_bytes(tokenizer), ids_of(tokenizer, text.strip()), text).tolist()
    before = len(text.encode()) - len(text.lstrip().encode())
    cut = b"".join(text.encode()[start:end] for start, end in found).decode()
    if name == "sentencepiece" and text.startswith(" "):  # its first token writes a space, here the text's own
        assert cut == " " + text.strip()
    else:
        assert cut == text.strip()
        assert found[0][0] == before
    whole = sample_spans(tokenizer, [text])
    trimmed = row_spans(token_bytes(tokenizer), [*ids_of(tokenizer, text.strip()), tokenizer.eos_token_id], [0], [text])
    matches = match_spans(whole, trimmed).tolist()
    assert matches[-1] == len(trimmed) - 1  # what closes them


@pytest.mark.parametrize("name", NAMES)
def test_white_space_before_the_closing_token_covers_nothing(tokenizers, name):
    tokenizer = tokenizers[name]
    labels = [*ids_of(tokenizer, "ab 12"), *ids_of(tokenizer, "\n"), tokenizer.eos_token_id]
    spans = row_spans(token_bytes(tokenizer), labels, [0], ["ab 12"]).tolist()
    plain = sample_spans(tokenizer, ["ab 12"]).tolist()
    assert [span for span in spans if span[0] < span[1]] == [span for span in plain if span[0] < span[1]]


def test_other_vocabularies_are_refused():
    class WordPiece:
        def get_vocab(self):
            return {"[UNK]": 0, "中": 1, "##ing": 2}

        def get_added_vocab(self):
            return {"[UNK]": 0}

    with pytest.raises(UserError, match="neither byte-level nor SentencePiece"):
        token_bytes(WordPiece())


def test_added_tokens_stand_for_their_own_text(tokenizers):
    tokenizer = tokenizers["single digits"]
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == tokenizer.eos_token.encode()


def labels_of(tokenizer, texts):
    """Labels of responses and the first row of each, as a sample of several turns has them."""
    labels, starts = [], []
    for text in texts:
        starts.append(len(labels))
        labels += [*ids_of(tokenizer, text), tokenizer.eos_token_id]
    return labels, starts


def sample_spans(tokenizer, texts):
    labels, starts = labels_of(tokenizer, texts)
    return row_spans(token_bytes(tokenizer), labels, starts, texts)


def matches_by_hand(one, other, texts):
    """Pairs of rows with the same text before and in them, found by walking both token lists of each response (ETA)."""
    pairs, first, second = [], 0, 0
    for text in texts:
        a, b = (list_of_bytes(tokenizer, text) for tokenizer in (one, other))
        done_a, starts_a = b"", {}
        for i, token in enumerate(a):
            starts_a[(done_a, token)] = i
            done_a += token
        done_b = b""
        for j, token in enumerate(b):
            if token and (done_b, token) in starts_a:
                pairs.append((first + starts_a[(done_b, token)], second + j))
            done_b += token
        pairs.append((first + len(a), second + len(b)))
        first, second = first + len(a) + 1, second + len(b) + 1
    return pairs


def list_of_bytes(tokenizer, text):
    pieces = [token_bytes(tokenizer)[i] for i in ids_of(tokenizer, text)]
    if pieces and tokenizer.eos_token == "</s>":
        pieces[0] = pieces[0].removeprefix(b" ")
    return pieces


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("one", NAMES)
def test_rows_are_partners_where_their_labels_and_all_before_them_cover_the_same_text(tokenizers, one, other):
    first, second = tokenizers[one], tokenizers[other]
    found = match_spans(sample_spans(first, TEXTS), sample_spans(second, TEXTS))
    expected = matches_by_hand(first, second, TEXTS)
    assert [(i, j) for i, j in enumerate(found.tolist()) if j >= 0] == sorted(expected)
    assert len(expected) > len(TEXTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_and_itself_align_row_by_row(tokenizers, name):
    found = sample_spans(tokenizers[name], TEXTS)
    whole = [i for i, (start, end) in enumerate(found.tolist()) if start < end]
    aligned = match_spans(found, found)
    assert aligned[whole].tolist() == whole
    assert len(found) - len(whole) <= len(TEXTS)  # SentencePiece's first space, where it is a token of its own


def test_digits_cut_differently_match_only_where_whole_tokens_agree(tokenizers):
    ones, groups = tokenizers["single digits"], tokenizers["groups of digits"]
    text = "12 + 3456 = 3468\n#### 3468"
    aligned = match_spans(sample_spans(ones, [text]), sample_spans(groups, [text])).tolist()
    tokens = [token_bytes(ones)[i] for i in ids_of(ones, text)]
    assert aligned[0] == -1
    assert tokens[0] == b"1"
    assert aligned[tokens.index(b" =")] >= 0
    assert aligned[-1] >= 0  # the end


def test_equal_responses_of_one_sample_are_not_taken_for_each_other(tokenizers):
    one, other = (
        sample_spans(tokenizers["bytes"], ["ab", "ab"]),
        sample_spans(tokenizers["single digits"], ["ab", "ab"]),
    )
    assert match_spans(one, one).tolist() == [0, 1, 2, 3, 4, 5]
    assert match_spans(one, other).tolist()[2::3] == [len(other) // 2 - 1, len(other) - 1]  # the ends


def test_partners_of_a_batch_are_rows_of_the_batch():
    parts = [torch.tensor([0, -1, 1]), torch.tensor([-1]), torch.tensor([2, 0])]
    assert join_matches(parts, [2, 4, 3]).tolist() == [0, -1, 1, -1, 8, 6]


def test_values_are_spread_over_bytes_and_keep_the_samples_total(tokenizers):
    for one in NAMES[:3]:
        for other in NAMES[:3]:
            student, teacher = sample_spans(tokenizers[one], TEXTS), sample_spans(tokenizers[other], TEXTS)
            values = torch.rand(len(teacher), 2, dtype=torch.float64)
            found, covered = redistribute_by_bytes(student, teacher, values)
            assert covered.all()
            torch.testing.assert_close(found.sum(0), values.sum(0))
            expected = torch.zeros_like(found)
            per_byte = {
                b: values[j] / (end - start)
                for j, (start, end) in enumerate(teacher.tolist())
                for b in range(start, end)
            }
            for i, (start, end) in enumerate(student.tolist()):
                for b in range(start, end):
                    expected[i] += per_byte[b]
            torch.testing.assert_close(found, expected)


def test_spreading_between_equal_spans_hands_values_over_as_they_are(tokenizers):
    same = sample_spans(tokenizers["single digits"], TEXTS)
    values = torch.rand(len(same), 2)
    found, covered = redistribute_by_bytes(same, same, values)
    torch.testing.assert_close(found, values)
    assert covered.all()


def test_rows_whose_text_the_teacher_has_no_rows_for_are_masked():
    student, teacher = torch.tensor([[0, 2], [2, 4], [4, 4], [4, 5]]), torch.tensor([[1, 3], [3, 4], [4, 5]])
    found, covered = redistribute_by_bytes(student, teacher, torch.tensor([[2.0], [4.0], [8.0]]))
    assert covered.tolist() == [0, 1, 0, 1]
    assert found[:, 0].tolist() == [1, 5, 0, 8]


def test_responses_are_the_assistants_turns_or_the_text():
    assert responses(question("s", "q", "a", "q2", "b")) == ["a", "b"]
    assert responses({"id": "s", "text": "raw"}) == ["raw"]
