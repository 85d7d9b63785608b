"""Facts and warnings about users with several rows, ids that share table rows, and times."""

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import of_config
import pyarrow as pa
import pytest
from logs import write_log
from places import REPO

from s2s_jax.cli.commands.inspect import main as inspect
from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.inspection.hash_tally import HashTally
from s2s_jax.data.inspection.row_sharing import RowSharing
from s2s_jax.data.inspection.time_facts import TimeFacts
from s2s_jax.data.inspection.user_rows import UserRows, user_column
from s2s_jax.errors import UserError
from s2s_serve.encoding import hashing

LIST = pa.list_(pa.int64())
CONFIG = """
from s2s_jax.config import *
def get_config():
    return Config(
        features=(
            FeatureConfig(name="item_id", hash_bucket_size=10),
            FeatureConfig(name="at", op="hour_of_day", hash_bucket_size=24, time_unit="ms"),
        ),
        model=ModelConfig(seq_len=3),
        loss=LossConfig(target_features=("item_id",)),
    )
"""


def config(path: Path, *features: FeatureConfig) -> Config:
    base = Config()
    return dataclasses.replace(
        base,
        io=IOConfig(data_paths=str(path)),
        features=features or (FeatureConfig(name="item_id", hash_bucket_size=100),),
        model=ModelConfig(seq_len=4),
        loss=dataclasses.replace(base.loss, target_features=None),
    )


def look(config: Config) -> list[str]:
    return of_config.first_look(config)


def daily_log(directory: Path, days: int, users: int, user: str = "user_id") -> None:
    for day in range(days):
        log = [{user: n, "item_id": [n, day, n + day]} for n in range(users)]
        write_log(directory / f"{day}.orc", log, {user: pa.int32(), "item_id": LIST})


# ---------------------------------------------------------------------------------------- tally


@pytest.mark.parametrize("most", [10**6, 500])
def test_a_tally_counts_all_or_an_even_sample_of_groups(most):
    rng = np.random.default_rng(0)
    tally, expected = HashTally(most), Counter()
    groups: dict[int, int] = {}
    for _ in range(30):
        numbers = rng.zipf(1.3, size=400) % 5000
        expected.update(numbers.tolist())
        hash_T = hashing.hash_integers(numbers, "murmur")
        group_T = hashing.hash_integers(numbers // 3, "murmur")
        groups |= dict(zip(hash_T.tolist(), group_T.tolist(), strict=True))
        tally.add(hash_T, group_T)
    of_hash = dict(
        zip(
            hashing.hash_integers(np.array(list(expected)), "murmur").tolist(),
            expected.values(),
            strict=True,
        )
    )
    hash_U, group_U, count_U = tally.counts()
    assert len(hash_U) <= most
    assert tally.exact == (most > 500)
    assert dict(zip(hash_U.tolist(), count_U.tolist(), strict=True)).items() <= of_hash.items()
    # A group is completely in the sample or not at all.
    chosen = set(group_U.tolist())
    assert len(hash_U) == sum(group in chosen for group in groups.values())
    assert tally.of_all(len(hash_U)) == pytest.approx(len(of_hash), rel=0 if tally.exact else 0.3)


# ---------------------------------------------------------------------------------------- users


def test_users_with_a_row_a_day_are_reported(tmp_path, capsys):
    daily_log(tmp_path, 3, 50)
    (note,) = look(config(tmp_path))
    assert note.startswith(
        "warning: 50 (100.0%) of the 50 users looked at have more than one row (column user_id)"
    )
    assert inspect([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "Users: 50 in 150 rows (column user_id)" in output
    assert note in output


def test_a_log_without_readable_rows_and_a_configuration(tmp_path, capsys):
    settings = ["--config", str(REPO / "configs/quickstart.py")]
    (tmp_path / "bad.orc").write_text("hello")
    assert inspect([str(tmp_path), *settings]) == 2
    out, errors = capsys.readouterr()
    assert "bad.orc" in errors
    assert "no stripe of" in out
    (tmp_path / "bad.orc").unlink()
    write_log(tmp_path / "empty.orc", [], {"item_id": pa.list_(pa.int64())})
    assert inspect([str(tmp_path), *settings]) == 0
    assert f"io.data_paths: expected rows in {tmp_path}, found none" in capsys.readouterr().out


def test_users_of_one_row_are_no_news(tmp_path):
    daily_log(tmp_path, 1, 50)
    assert look(config(tmp_path)) == []
    write_log(
        tmp_path / "x.orc",
        [{"user_id": None, "item_id": [1, 2]}] * 3,
        {"user_id": pa.int64(), "item_id": LIST},
    )
    assert look(config(tmp_path)) == []


def test_the_column_of_users_can_be_named(tmp_path, capsys):
    daily_log(tmp_path, 2, 5, "who")
    assert inspect([str(tmp_path)]) == 0
    assert "Users:" not in capsys.readouterr().out
    assert inspect([str(tmp_path), "--user_column", "who"]) == 0
    assert "5 (100.0%) of the 5 users looked at have more than one row" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--user_column: .* no such column item_id"):
        inspect([str(tmp_path), "--user_column", "item_id"])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["item_id", "user_id"], "user_id"),
        (["UserId", "x"], "UserId"),
        (["uid", "user"], "user"),
        (["item_id"], None),
        (["user_id", "user_id"], None),
    ],
)
def test_columns_of_users_by_name(names, found):
    assert user_column(pa.schema([(name, pa.string()) for name in names])) == found
    assert user_column(pa.schema([("user_id", LIST)])) is None


def test_users_of_any_integer_type_and_text():
    rows = UserRows("u")
    rows.add(pa.array([1, 2, None], pa.int32()))
    rows.add(pa.array([2, 3], pa.int64()))
    assert rows.sentences() == ["Users: 3 in 4 rows (column u)"]
    assert rows.warnings()[0].startswith("warning: 1 (33.3%) of the 3 users")
    rows = UserRows("u")
    rows.add(pa.array(["a", "b", "a"]))
    assert rows.warnings()[0].startswith("warning: 1 (50.0%) of the 2 users")


# ------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("hash_type", [None, "murmur", "farm"])
def test_ids_that_share_a_row_against_a_count(hash_type):
    rng = np.random.default_rng(1)
    feature = FeatureConfig(name="item_id", hash_bucket_size=50, hash_type=hash_type)
    sharing = RowSharing(feature, is_item=True)
    events: list[int] = []
    for _ in range(3):
        part = rng.integers(0, 60, size=40)
        events += part.tolist()
        sharing.add(pa.array(part))
    rows = defaultdict(set)
    for item in events:
        key = item
        if hash_type is not None:
            key = int(hashing.hash_integers(np.array([item]), hash_type)[0])
        rows[key % 50].add(item)
    alike = {item for ids in rows.values() if len(ids) > 1 for item in ids}
    different = len(set(events))
    sentence = sharing.sentences()[0]
    assert sentence.startswith(
        f"Feature item_id: {different} distinct ids for 50 rows of its table; {len(alike)} ("
    )
    share = sum(item in alike for item in events) / len(events)
    (warning,) = sharing.warnings()
    assert f"{share:.1%} of the events have such an id" in warning
    assert "a hit on one counts for all of a row" in warning
    assert ("without hash_type" in warning) == (hash_type is None)


def test_ids_beyond_a_table_without_a_hash_are_reported(tmp_path, capsys):
    write_log(
        tmp_path / "a.orc", [{"item_id": [n, n + 100, 7]} for n in range(60)], {"item_id": LIST}
    )
    features = [FeatureConfig(name="item_id", hash_bucket_size=size) for size in (100, 160)]
    (note,) = look(config(tmp_path, features[0]))
    assert "120 (100.0%) of the distinct ids" in note
    assert "ids outside 0 to 99 wrap around, and they run from 0 to 159" in note
    assert look(config(tmp_path, features[1])) == []


def test_a_few_collisions_of_hashes_are_no_news(tmp_path):
    write_log(tmp_path / "a.orc", [{"item_id": list(range(200))}], {"item_id": LIST})
    few = FeatureConfig(name="item_id", hash_bucket_size=100_000, hash_type="murmur")
    assert look(config(tmp_path, few)) == []
    many = dataclasses.replace(few, hash_bucket_size=100)
    (note,) = look(config(tmp_path, many))
    assert "hash_bucket_size 100 is small for them" in note


def test_negative_ids_are_reported(tmp_path):
    write_log(tmp_path / "a.orc", [{"item_id": [1, -1, 2, -1]}] * 3, {"item_id": LIST})
    (note,) = look(config(tmp_path))
    assert "6 of the ids looked at are negative (down to -1)" in note


def test_inspect_with_a_configuration(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    log = [{"item_id": [n, n + 10, 3, None], "at": [1, 2, 3, 4]} for n in range(10)]
    write_log(tmp_path / "log" / "a.orc", log, {"item_id": LIST, "at": LIST})
    assert inspect([str(tmp_path / "log"), "--config", str(tmp_path / "config.py")]) == 0
    output = capsys.readouterr().out
    assert "At a seq_len of 3, 10 (100.0%) of the rows are truncated" in output
    assert "20 distinct ids for 10 rows of its table; 20 (100.0%) of those" in output
    assert "Times of column at run from 1970-01-01 to 1970-01-01 if time_unit is ms" in output
    assert "Times of column at never step back within a row" in output
    assert inspect([str(tmp_path / "log")]) == 0
    assert "distinct ids for" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        ["--eval.split", "by_time", "--eval.split.at", "2020-01-01", "--eval.split.feature", "at"],
        ["--model.time_bias", "gaps", "--model.time_bias.column", "at"],
    ],
)
def test_inspect_says_why_training_refuses_fractions_as_times(tmp_path, capsys, more):
    times = 'op="hour_of_day", hash_bucket_size=24, time_unit="ms"'
    fractions = 'op="bucketize", boundaries=(1.0,), hash_bucket_size=2'
    (tmp_path / "config.py").write_text(CONFIG.replace(times, fractions))
    rows = [{"item_id": [1, 2, 3, 4], "at": [0.5, 1.5, 2.0, 3.0]}]
    write_log(tmp_path / "log" / "a.orc", rows, {"item_id": LIST, "at": pa.list_(pa.float64())})
    arguments = [str(tmp_path / "log"), "--config", str(tmp_path / "config.py"), *more]
    assert inspect(arguments) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "column at" in output
    assert "of times" in output


def test_inspect_tells_of_nothing_to_learn_from(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = [str(tmp_path / "log"), "--config", str(tmp_path / "config.py")]
    write_log(
        tmp_path / "log" / "a.orc", [{"item_id": [1], "at": [1]}] * 3, {"item_id": LIST, "at": LIST}
    )
    assert inspect(arguments) == 0
    output = capsys.readouterr().out
    assert f"warning: io.data_paths: there is nothing to learn from in {tmp_path / 'log'}" in output
    assert "No row has more than one event" in output
    write_log(tmp_path / "log" / "a.orc", [{"item_id": [1, 2, 3]}] * 3, {"item_id": LIST})
    assert inspect(arguments) == 0
    assert "can be read (of 1); the first: " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- times

NOW = 1_700_000_000


def facts(values: list, kind: pa.DataType = LIST, unit: str | None = "s") -> TimeFacts:
    found = TimeFacts("t", unit, now=NOW)
    found.add(pa.array(values, kind))
    return found


def test_ranges_as_dates():
    days = [[1_600_000_000, 1_600_086_400]]
    assert facts(days).sentences() == [
        "Times of column t run from 2020-09-13 to 2020-09-14 if time_unit is s",
        "Times of column t never step back within a row",
    ]
    milliseconds = [[time * 1000 for time in days[0]]]
    (warning,) = facts(milliseconds).warnings()
    assert "run from the year 52,671 to the year 52,674 if time_unit is s" in warning
    assert "or from 2020-09-13 to 2020-09-14 if it is ms; it is likely ms" in warning
    # Without a configuration, inspect shows the likely unit.
    assert (
        "2020-09-13 to 2020-09-14 if time_unit is ms"
        in facts(milliseconds, unit=None).sentences()[0]
    )
    stamps = pa.list_(pa.timestamp("ns"))
    typed = facts([[time * 10**9 for time in days[0]]], stamps)
    assert typed.sentences()[0] == "Times of column t run from 2020-09-13 to 2020-09-14"
    assert typed.warnings() == []
    dates = facts([[18_000, 18_001]], pa.list_(pa.date32()))
    assert dates.sentences()[0] == "Times of column t run from 2019-04-14 to 2019-04-15"


def test_one_wrong_time_does_not_hide_the_unit():
    milliseconds = [[1_600_000_000_000 + n, 1_600_000_100_000 + n] for n in range(100)]
    for odd in ([], [1, 1_600_000_000_000], [1, 9 * 10**18]):
        found = facts([*milliseconds, odd])
        assert "it is likely ms" in found.warnings()[0]
        assert found.why_untrue() is not None
        assert facts([*milliseconds, odd], unit="ms").why_untrue() is None
    half = [[1, 1_600_000_000_000]] * 100
    assert facts(half).why_untrue() is None


def test_zeros_and_the_future():
    sentences = facts([[0, -5, 1_600_000_000], [NOW + 10]]).sentences()
    assert "2 (50.0%) of the times of column t are 0 or before 1970" in sentences
    assert "The last time of column t is in the future" in sentences
    assert facts([[0], None, []]).sentences()[0] == "Column t has no time after 1970"
    assert facts([None, []]).sentences() == []


def test_order_of_bags_nulls_and_empty_rows():
    bags = pa.list_(LIST)
    rising = [[[5], [], [6], None, [6]], [], None, [[None], [1]], [[9], [9]]]
    assert facts(rising, bags).warnings() == []
    newest_first = [[[3], None, [2]], [[5], [4], [4]], [[1]]]
    (warning,) = facts(newest_first, bags).warnings()
    assert "newest first in 2 (100.0%) of the 2 rows" in warning
    (warning,) = facts([[1, 2, 1], [3, 2], [1, 2]]).warnings()
    assert "step back in 2 (66.7%) of the 3 rows" in warning


def test_times_as_floats():
    floats = facts(
        [[1.6e9, 1.6e9 + 0.5, None], [float("nan"), 1.61e9, 1.6e9]], pa.list_(pa.float64())
    )
    assert "from 2020-09-13 to 2021-01-07" in floats.sentences()[0]
    assert "step back in 1 (50.0%) of the 2 rows" in floats.warnings()[0]


def test_text_that_is_no_time_is_no_column_of_times():
    assert facts([["noon"]], pa.list_(pa.string())).sentences() == []
