"""Logs with nothing to learn from are refused with the likely reason; odd logs cause one warning."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import of_config
import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.config import (
    ByTime,
    Config,
    EvalConfig,
    FeatureConfig,
    IOConfig,
    LastEvents,
    ModelConfig,
    TimeGaps,
)
from s2s_jax.data.logs import orc
from s2s_jax.errors import MachineError, UserError

TYPES = {"item_id": pa.list_(pa.int64()), "timestamp": pa.list_(pa.int64())}
DAY = 86_400
SPRING_2015 = 1_427_846_400


def config(path: Path, time: dict | None = None, loss: dict | None = None, **settings) -> Config:
    base = Config()
    features = (
        FeatureConfig(name="item_id", hash_bucket_size=1000),
        FeatureConfig(name="timestamp", op="hour_of_day", hash_bucket_size=24, **time or {}),
    )
    return dataclasses.replace(
        base,
        io=IOConfig(data_paths=str(path), batch_size=4),
        features=features,
        model=ModelConfig(seq_len=8),
        loss=dataclasses.replace(base.loss, target_features=("item_id",), **loss or {}),
        eval=EvalConfig(**settings),
    )


def look(config: Config) -> list[str]:
    return of_config.first_look(config)


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        look(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(count: int, length: int, step: int = DAY, start: int = SPRING_2015) -> list[dict]:
    return [
        {
            "item_id": [n * 7 + k for k in range(length)],
            "timestamp": [start + step * k for k in range(length)],
        }
        for n in range(count)
    ]


def write_stripes(directory: Path, log: list[dict], rows: int) -> None:
    """Writes a file for each stripe, since pyarrow would merge small stripes."""
    for number in range(0, len(log), rows):
        write_log(directory / f"{number:04}.orc", log[number : number + rows], TYPES)


def test_an_ordinary_log_is_no_news(tmp_path):
    write_stripes(tmp_path, rows(40, 5), 4)
    assert look(config(tmp_path)) == []
    assert look(config(tmp_path, split=LastEvents(events=2))) == []
    assert look(config(tmp_path, split=ByTime(at="2015-04-03"))) == []


# ------------------------------------------------------------------------------------- refused


def test_all_is_held_out(tmp_path):
    write_log(tmp_path / "a.orc", rows(9, 5), TYPES)
    assert look(config(tmp_path, split=LastEvents(events=3))) == []
    for held_out in (4, 5, 99):
        message = refusal(config(tmp_path, split=LastEvents(events=held_out)))
        assert message.startswith("eval.split.events: there is nothing to learn from")
        assert f"{held_out} events of every row" in message
        assert "the longest row has 5" in message


@pytest.mark.parametrize("pairing", ["next", "previous"])
def test_one_event_a_row(tmp_path, pairing):
    write_log(tmp_path / "a.orc", rows(9, 1), TYPES)
    message = refusal(config(tmp_path, loss={"pairing": pairing}))
    assert "no row has more than one event" in message
    assert "s2s convert" in message


def test_padding_that_is_scored_is_nothing_to_learn_from(tmp_path):
    write_log(tmp_path / "a.orc", rows(9, 1), TYPES)
    assert "no row has more than one event" in refusal(
        config(tmp_path, loss={"mask_padding": False, "pairing": "previous"})
    )


def test_rows_without_events(tmp_path):
    empty = [{"item_id": [], "timestamp": None}, {"item_id": None, "timestamp": []}]
    write_log(tmp_path / "a.orc", empty, TYPES)
    assert "all 2 rows are empty in item_id, timestamp" in refusal(config(tmp_path))


def test_no_event_has_an_item(tmp_path):
    log = [row | {"item_id": [None] * 5} for row in rows(9, 5)] + [
        {"item_id": [3], "timestamp": [1]}
    ]
    write_log(tmp_path / "a.orc", log, TYPES)
    message = refusal(config(tmp_path))
    assert message.startswith("loss.item_feature: ")
    assert "has an item (column item_id)" in message


def test_all_events_are_of_one_item(tmp_path):
    """There are no negatives, for example in a column of behaviours that are all views."""
    log = [row | {"item_id": [4] * 5} for row in rows(9, 5)]
    write_log(tmp_path / "a.orc", log, TYPES)
    assert "all events are of one item (column item_id)" in refusal(config(tmp_path))
    log[8] = log[8] | {"item_id": [4, 4, 4, 4, 5]}
    write_log(tmp_path / "a.orc", log, TYPES)
    assert look(config(tmp_path)) == []


def test_a_split_before_all_times(tmp_path):
    write_log(tmp_path / "a.orc", rows(9, 5), TYPES)
    message = refusal(config(tmp_path, split=ByTime(at="2015-01-01")))
    assert message.startswith("eval.split.at: ")
    assert "run from 2015-04-01 to 2015-04-05 if time_unit is s" in message
    message = refusal(config(tmp_path, split=ByTime(at="2015-06-01", validation_at="2015-04-02")))
    assert message.startswith("eval.split.validation_at: ")
    assert "before 2015-04-02" in message


@pytest.mark.parametrize(("unit", "factor"), [("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_times_in_another_unit(tmp_path, unit, factor, kind):
    log = rows(9, 5, DAY * factor, SPRING_2015 * factor)
    if kind == pa.string():
        log = [row | {"timestamp": [str(t) for t in row["timestamp"]]} for row in log]
    write_log(tmp_path / "a.orc", log, TYPES | {"timestamp": pa.list_(kind)})
    message = refusal(config(tmp_path, split=ByTime(at="2015-04-04")))
    assert "the year" in message
    assert f"or from 2015-04-01 to 2015-04-05 if it is {unit}" in message
    assert "time_unit of feature timestamp" in message
    # Without a split, only hours would be wrong.
    (note,) = look(config(tmp_path))
    assert note.startswith("warning: times of column timestamp run from the year")
    assert note.endswith(f"it is likely {unit}")
    assert look(config(tmp_path, time={"time_unit": unit}, split=ByTime(at="2015-04-04"))) == []


def test_seconds_read_as_milliseconds(tmp_path):
    """With this unit, all events are before the split, and nothing is held out."""
    write_log(tmp_path / "a.orc", rows(9, 5), TYPES)
    notes = look(config(tmp_path, time={"time_unit": "ms"}, split=ByTime(at="2015-04-04")))
    assert any(
        "nothing is held out" in note and "eval.split.at 2015-04-04" in note for note in notes
    )
    assert any(note.endswith("it is likely s") for note in notes)


def test_only_the_whole_log_is_refused(tmp_path):
    """A single pair anywhere is enough, although usually only a few stripes are read."""
    log = rows(60, 1)
    log[33] = rows(34, 3)[33]
    write_stripes(tmp_path, log, 1)
    (note,) = look(config(tmp_path))
    assert "give nothing to learn from: " in note
    log[33] = rows(34, 1)[33]
    write_stripes(tmp_path, log, 1)
    assert "no row has more than one event" in refusal(config(tmp_path))


def test_few_stripes_are_looked_at_where_they_have_pairs(tmp_path, monkeypatch):
    write_stripes(tmp_path, rows(60, 3), 2)
    read = []
    real = orc.read_stripe
    monkeypatch.setattr(orc, "read_stripe", lambda *a: read.append(a[0]) or real(*a))
    assert look(config(tmp_path)) == []
    assert len(read) == 8


# ----------------------------------------------------------------------------------- unreadable


def damaged(tmp_path: Path, monkeypatch, error: UserError, stripes: set[int] | None) -> None:
    write_stripes(tmp_path, rows(40, 5), 4)
    real = orc.read_stripe

    def read(file, number, names):
        if stripes is None or int(file.path.stem) // 4 in stripes:
            raise error
        return real(file, number, names)

    monkeypatch.setattr(orc, "read_stripe", read)


def test_a_log_of_which_nothing_can_be_read(tmp_path, monkeypatch):
    damaged(tmp_path, monkeypatch, UserError("a.orc: broken"), None)
    message = refusal(config(tmp_path))
    assert message == (
        f"io.data_paths: no stripe of {tmp_path} can be read (of 10); the first: a.orc: broken"
    )


def test_what_can_be_read_is_enough(tmp_path, monkeypatch):
    damaged(tmp_path, monkeypatch, UserError("broken"), set(range(9)))
    assert look(config(tmp_path)) == []


def test_trouble_of_the_machine_is_not_the_files(tmp_path, monkeypatch):
    damaged(tmp_path, monkeypatch, MachineError("no time zones"), {0})
    assert refusal(config(tmp_path)) == "no time zones"


# ------------------------------------------------------------------------------- mostly nothing


def test_most_rows_give_nothing(tmp_path):
    log = [*rows(6, 1), *rows(3, 2), *rows(1, 9), {"item_id": None, "timestamp": None}]
    write_log(tmp_path / "a.orc", log, TYPES)
    (note,) = look(config(tmp_path, split=LastEvents(events=1)))
    assert note == (
        "warning: 10 (90.9%) of the 11 rows looked at give nothing to learn from: 9% are empty, "
        "55% have one event, 27% have fewer than two events left by eval.split.events 1"
    )


def test_pairs_are_those_that_training_scores(tmp_path):
    """Compares with the pairs of the loss: both events are real, and the target has an item."""
    rng = np.random.default_rng(0)
    log = []
    for _ in range(50):
        length = int(rng.integers(0, 6))
        items = [
            int(i) if keep else None
            for i, keep in zip(rng.integers(9, size=length), rng.random(length) < 0.4, strict=True)
        ]
        log.append({"item_id": items, "timestamp": list(range(length))})
    log += rows(1, 3)
    write_log(tmp_path / "a.orc", log, TYPES)
    for pairing, held_out in itertools.product(("next", "previous"), (0, 1, 2)):
        none = 0
        for row in log:
            kept = row["item_id"][: max(len(row["item_id"]) - held_out, 0)]
            scored = kept[1:] if pairing == "next" else kept[:-1]
            none += all(item is None for item in scored)
        notes = look(config(tmp_path, split=LastEvents(events=held_out), loss={"pairing": pairing}))
        (warning,) = [note for note in notes if "nothing to learn from" in note] or [""]
        assert (f"warning: {none} (" in warning) == (none > 51 / 2), (
            pairing,
            held_out,
            none,
            warning,
        )


# ---------------------------------------------------------------------------------------- order


def test_events_newest_first(tmp_path):
    log = [{name: values[::-1] for name, values in row.items()} for row in rows(9, 5)]
    write_log(tmp_path / "a.orc", log, TYPES)
    (note,) = look(config(tmp_path))
    assert note.startswith(
        "warning: events are stored newest first in 9 (100.0%) of the 9 rows looked at"
    )


def test_some_times_step_back(tmp_path):
    log = rows(9, 5)
    log[4]["timestamp"][2] -= 3 * DAY
    write_log(tmp_path / "a.orc", log, TYPES)
    (note,) = look(config(tmp_path))
    assert note.startswith(
        "warning: times of column timestamp step back in 1 (11.1%) of the 9 rows"
    )


def test_times_that_are_no_feature_are_looked_at_by_name(tmp_path):
    """Equal times, missing times and the border between two rows do not count as steps back."""
    log = rows(9, 5)
    log[0]["timestamp"] = [SPRING_2015, None, SPRING_2015, SPRING_2015 - 0, None]
    write_log(tmp_path / "a.orc", log, TYPES)
    only_items = dataclasses.replace(config(tmp_path), features=config(tmp_path).features[:1])
    assert look(only_items) == []
    log[0]["timestamp"][3] -= 1
    write_log(tmp_path / "a.orc", log, TYPES)
    (note,) = look(only_items)
    assert "times of column timestamp step back in 1 (11.1%)" in note


def with_gaps(path: Path, **gaps) -> Config:
    made = config(path)
    return dataclasses.replace(made, model=ModelConfig(seq_len=8, time_bias=TimeGaps(**gaps)))


def test_true_times_are_accepted_for_time_gaps(tmp_path):
    write_log(tmp_path / "part.orc", rows(20, 5), TYPES)
    assert look(with_gaps(tmp_path)) == []


@pytest.mark.parametrize(
    ("log", "gaps", "found"),
    [
        (rows(20, 5, step=0), {}, "the same time for all events of each row"),
        (rows(20, 5, start=1000 * SPRING_2015), {}, "it is ms"),
        (rows(20, 5), {"time_unit": "ms"}, "if it is s"),
        ([row | {"timestamp": None} for row in rows(20, 5)], {}, "no times"),
    ],
)
def test_times_that_cannot_be_true_are_refused_for_time_gaps(tmp_path, log, gaps, found):
    write_log(tmp_path / "part.orc", log, TYPES)
    message = refusal(with_gaps(tmp_path, **gaps))
    assert message.startswith("model.time_bias: expected true times in column timestamp")
    assert found in message


def test_times_that_step_back_or_are_missing_are_refused_for_time_gaps(tmp_path):
    log = rows(20, 5)
    log[0]["timestamp"].reverse()
    write_log(tmp_path / "part.orc", log, TYPES)
    assert "row 0, column timestamp: expected times that never step back" in refusal(
        with_gaps(tmp_path)
    )
    missing = refusal(with_gaps(tmp_path, column="when"))
    assert "no column when (model.time_bias.column)" in missing
