from llmfusion.data.rejections import Rejected


def test_rejected_counts_all_and_names_the_first_five():
    rejected = Rejected()
    for i in range(7):
        rejected.add("too long", i)
    rejected.add("empty", "x")
    assert rejected.facts() == {
        "empty": {"count": 1, "first": ["x"]},
        "too long": {"count": 7, "first": ["0", "1", "2", "3", "4"]},
    }
