"""Times of events as seconds since the first one of their row, compared with plain Python."""

import random

import numpy as np
import pyarrow as pa
import pytest

from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.feature import EventTime, FeatureConfig
from s2s_serve.encoding.plain_histories import HistorySource, to_rows
from s2s_serve.errors import UserError

ITEM = FeatureConfig(name="item_id", hash_bucket_size=100)
TYPES = {
    "numbers": (pa.int64(), 1000),
    "texts": (pa.string(), 1000),
    "microseconds": (pa.timestamp("us"), 10**6),
}


def decoded(rows, kind, keep=lambda block: block, times=None):
    """int32 `[P, 2]`: the items and times of rows of times, in milliseconds or the type's unit."""
    times = EventTime(column="at", time_unit="ms") if times is None else times
    lists = pa.array([[[t] if t is not None else [] for t in row] for row in rows], typed(kind))
    items = pa.array([[7] * len(row) for row in rows], pa.list_(pa.int64()))
    batch = pa.record_batch([items, lists], ["item_id", "at"])
    source = HistorySource(batch.schema, "log")
    features.check_schema(source, (ITEM, times))
    return blocks.positions_of(features.decode(batch, source, 0, (ITEM, times), keep))


def typed(kind):
    return pa.list_(pa.list_(pa.string() if kind == "texts" else TYPES[kind][0]))


def seconds(row, per_second):
    """The definition, for one row."""
    first, last, found = None, None, []
    for time in row:
        if time is not None:
            last = int(time) // per_second
            first = last if first is None else first
        found.append(0 if last is None else min(last - first, 2**31 - 1))
    return found


@pytest.mark.parametrize("kind", TYPES)
def test_times_are_seconds_since_the_first_of_the_row(kind):
    draws = random.Random(0)
    per_second = TYPES[kind][1]
    rows = [[]]
    for length in (1, 2, 3, 9, 30):
        # Some before 1970; some gaps below a second; some events without a time.
        times, time = [], draws.randrange(-(10**5), 10**5) * per_second
        for _ in range(length):
            time += draws.choice([0, 1, 300, 40_000, 86_400_000])
            times.append(None if draws.random() < 0.3 else time)
        rows.append(times)
    rows += [[None, None], [], [None, 10**6]]
    given = (
        [[None if t is None else str(t) for t in row] for row in rows] if kind == "texts" else rows
    )
    found = decoded(given, kind)
    assert found.dtype == np.int32
    assert found[:, 1].tolist() == [s for row in rows for s in seconds(row, per_second)]
    assert max(found[:, 1]) > 500


def test_the_gaps_of_a_part_are_those_of_the_whole():
    row = [1_999, 2_000, 5_500, 10_000_999, 10_001_000]
    whole = decoded([row], "numbers")[:, 1]
    part = decoded([row[2:]], "numbers")[:, 1]
    kept = decoded([row], "numbers", lambda block: blocks.truncate(block, 3, keep_newest=True))[
        :, 1
    ]
    assert np.diff(whole)[2:].tolist() == np.diff(part).tolist() == np.diff(kept).tolist()


def test_gaps_too_long_for_32_bits_are_as_long_as_possible():
    found = decoded([[0, 2**62, 2**62], [-(2**63), 2**63 - 1]], "numbers")
    assert found[:, 1].tolist() == [0, 2**31 - 1, 2**31 - 1, 0, 2**31 - 1]


def test_a_placeholder_at_the_beginning_leaves_later_gaps_as_they_are():
    now = 1_700_000_000_000
    row = [None, -62_135_596_800_000, None, now - 7_200_000, now - 3_600_000, None, now]
    found = decoded([row, [now, now + 5_000]], "numbers")[:, 1]
    assert found[:3].tolist() == [0, 0, 0]
    assert np.diff(found[3:7]).tolist() == [3_600, 0, 3_600]
    assert found[6] == 2**31 - 1
    assert found[7:].tolist() == [0, 5]


@pytest.mark.parametrize("row", [[5, 4], [1, None, 3, None, 2], [7, 7, 8, 7]])
def test_times_that_step_back_are_refused(row):
    with pytest.raises(
        UserError, match=r"^log: row 1, column at: expected times that never step b"
    ):
        decoded([[9, None, 9], row, [1, 0]], "numbers")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"item_id": [1, 2]}, r"row 0 has no at, only item_id"),
        ({"item_id": [1, 2], "at": [9, 3]}, r"row 0, column at: .* never step back .* sort"),
        ({"item_id": [1, 2], "at": [9]}, r"features disagree in length"),
        ({"item_id": [1, 2], "at": ["x", "y"]}, r"expected a time .*model.time_bias.*found 'x'"),
        ({"item_id": [1, 2], "at": [[1, 2], [3]]}, r"one time for each event .* found 2"),
        ({"item_id": [1, 2], "at": [0.5, 1.5]}, r"at: expected list<T> .*model.time_bias.*double"),
    ],
)
def test_histories_with_wrong_times_are_refused_in_one_sentence(given, message):
    described = (ITEM, EventTime(column="at"))

    def decode():
        rows = to_rows([given], described, {})
        features.decode(rows, HistorySource(rows.schema), 0, described, lambda block: block)

    with pytest.raises(UserError, match=rf"^histories: .*{message}") as caught:
        decode()
    assert "\n" not in str(caught.value)
    assert "time of the event" not in str(caught.value)
