from llmfusion.data.chat import Encoded
from llmfusion.models.batches import label_positions, pad


def test_padding_stands_on_the_right_and_is_masked():
    ids, mask = pad([[5, 6, 7], [8]], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_label_is_predicted_by_the_position_before_it():
    assert label_positions(Encoded([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True])) == [1, 2, 4]
