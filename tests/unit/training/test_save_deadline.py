import pytest

from llmfusion.training import save_deadline
from llmfusion.training.save_deadline import SaveDeadline, TimeLimit


@pytest.fixture
def now(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(save_deadline.time, "monotonic", lambda: seconds[0])
    return seconds


def test_what_is_kept_back_is_the_start_and_a_step_and_a_save_a_fifth_slower_than_the_slowest(now):
    deadline = SaveDeadline(parameters=10**9)  # 12 GB of resume state at 200 MB/s: 60 s, until one has been measured
    assert deadline.seconds(minutes=600) == pytest.approx(60 + 1.2 * 60)
    assert deadline.seconds(minutes=1) == pytest.approx(15 + 1.2 * 60)  # a short job keeps a quarter for its start
    for seconds in (3, 8, 2):
        with deadline.step():
            now[0] += seconds
    for seconds in (20, 30, 10):
        with deadline.save():
            now[0] += seconds
    assert deadline.seconds(minutes=600) == pytest.approx(60 + 1.2 * (8 + 30))


def test_a_job_is_over_when_less_is_left_than_is_kept_back_and_never_without_a_limit(now):
    deadline = SaveDeadline(parameters=10**9)
    limit = TimeLimit(minutes=10, began=100.0)
    last = 100 + 600 - (60 + 1.2 * 60)
    now[0] = last - 0.1
    assert not deadline.is_over(limit)
    now[0] = last + 0.1
    assert deadline.is_over(limit)
    assert limit.seconds_left() == pytest.approx(60 + 1.2 * 60 - 0.1)
    assert not deadline.is_over(None)
