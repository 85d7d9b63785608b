"""The batch that is shown is the one that training gets, with the times and targets of the log."""

import contextlib
import dataclasses
import datetime
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
import small
from jobs_of import one_device
from logs import write_log

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig, LastEvents, Pack, validate
from s2s_jax.errors import UserError
from s2s_jax.jobs import train as training
from s2s_jax.jobs.batch import NO_TARGET, ShownBatch, show_batch
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.training.step.batches import unpack
from s2s_jax.training.step.settings import StepSettings

BIG = 2**40
USERS = 23


def items_of(user: int) -> list[int]:
    """Rows of 1 to 5 events, whose items no other row has."""
    return [-BIG - user * 10 if n == 2 else BIG + user * 10 + n for n in range(user % 5 + 1)]


def seconds_of(user: int) -> list[int]:
    return [1_600_000_000 + user * 1000 + n * 60 for n in range(user % 5 + 1)]


def write(path: Path, times: pa.DataType | None = None, values=lambda seconds: seconds) -> None:
    ints = pa.list_(pa.int64())
    types = {"item_id": ints, "behavior_id": ints, "tags": pa.list_(ints)}
    if times is not None:
        types["timestamp"] = pa.list_(times)
    rows = [
        {
            "item_id": items_of(user),
            "behavior_id": [user % 3] * len(items_of(user)),
            "tags": [[user, n] if n % 2 else [] for n in range(len(items_of(user)))],
            "timestamp": [] if times is None else [values(s) for s in seconds_of(user)],
        }
        for user in range(USERS)
    ]
    write_log(path / "a.orc", [{name: row[name] for name in types} for row in rows], types)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write(directory, pa.int64())
    return directory


def config_of(log: Path, base: Config | None = None, **changes) -> Config:
    """Raw ids in growing tables; rows in the order of the log."""
    made = small.growing(small.config()) if base is None else base
    io = {"data_paths": str(log), "batch_size": 8, "shuffle": False}
    for key, value in changes.items():
        section, name = key.split("__")
        if section == "io":
            io[name] = value
        else:
            part = dataclasses.replace(getattr(made, section), **{name: value})
            made = dataclasses.replace(made, **{section: part})
    made = dataclasses.replace(made, io=dataclasses.replace(made.io, **io))
    validate(made)
    return made


def row_ids(batch: ShownBatch, row: int, begin: int = 0, stop: int | None = None) -> list[int]:
    """Raw items of some positions of a row of the first microbatch."""
    words = batch.arrays["ids/item_id"][0, row, begin:stop, 0].astype(np.int64)
    return ((words[:, 1] << 32) | (words[:, 0] & 0xFFFFFFFF)).tolist()


def test_ids_times_and_targets_are_those_of_the_log(log):
    batch = show_batch(config_of(log), 2, one_device())
    lengths = batch.arrays["length"][0]
    assert lengths.tolist() == [len(items_of(user)) for user in range(8, 16)]
    for row, user in enumerate(range(8, 16)):
        length = lengths[row]
        assert row_ids(batch, row, 0, length) == items_of(user)
        assert set(row_ids(batch, row, length)) <= {-1}
        assert batch.arrays["ids/behavior_id"][0, row, :length, 0].tolist() == [user % 3] * length
        assert batch.target[0, row].tolist() == [
            n + 1 if n + 1 < length else NO_TARGET for n in range(small.SEQ_LEN)
        ]
        times = batch.times[0, row, :length].astype(int).tolist()
        assert times == seconds_of(user)
        assert np.isnat(batch.times[0, row, length:]).all()
    assert (batch.counts["examples"], batch.counts["tokens"]) == (8, lengths.sum())
    assert batch.log_rows == 8


def test_the_last_batch_of_an_epoch_is_not_full(log):
    batch = show_batch(config_of(log), 3, one_device())
    assert batch.counts["examples"] == USERS - 16
    assert batch.arrays["length"][0, USERS - 16 :].tolist() == [0] * (24 - USERS)


def test_positions_are_scored_against_the_event_before_them_if_that_is_the_pairing(log):
    batch = show_batch(config_of(log, loss__pairing="previous"), 1, one_device())
    for row in range(8):
        length = len(items_of(row))
        expected = [n - 1 if 0 < n < length else NO_TARGET for n in range(small.SEQ_LEN)]
        assert batch.target[0, row].tolist() == expected


def test_an_event_without_an_item_is_no_target(tmp_path):
    types = {"item_id": pa.list_(pa.int64()), "behavior_id": pa.list_(pa.int64())}
    types["tags"] = pa.list_(pa.list_(pa.int64()))
    rows = [{"item_id": [1, None, 3], "behavior_id": [1, 1, 1], "tags": [[1], [2], [3]]}]
    write_log(tmp_path / "a.orc", rows, types)
    batch = show_batch(config_of(tmp_path), 1, one_device())
    assert batch.target[0, 0, :3].tolist() == [NO_TARGET, 2, NO_TARGET]
    assert batch.times is None


def test_packed_sequences_are_rows_of_the_log(log):
    config = config_of(log, io__sequences=Pack(rows=12), io__batch_size=8)
    batch = show_batch(config, 1, one_device())
    assert batch.log_rows == 12
    found = []
    for row, length in enumerate(batch.arrays["length"][0].tolist()):
        sequence_L = batch.arrays["sequence"][0, row]
        assert (sequence_L[length:] == -1).all()
        for number in range(sequence_L.max() + 1):
            (positions,) = np.nonzero(sequence_L == number)
            begin, stop = positions[0], positions[-1] + 1
            ids = row_ids(batch, row, begin, stop)
            (user,) = [user for user in range(12) if items_of(user) == ids]
            found.append(user)
            times = batch.times[0, row, begin:stop].astype(int).tolist()
            assert times == seconds_of(user)
            expected = [*range(begin + 1, stop), NO_TARGET]
            assert batch.target[0, row, begin:stop].tolist() == expected
    assert sorted(found) == list(range(12))


def test_buckets(log):
    config = config_of(log, small.config())
    batch = show_batch(config, 1, one_device())
    for row in range(8):
        found = batch.arrays["ids/item_id"][0, row, : len(items_of(row)), 0].tolist()
        assert found == [item % 2**64 % 300 for item in items_of(row)]
    assert batch.times[0, 4, :5].astype(int).tolist() == seconds_of(4)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string(), str),
        (pa.int64(), lambda s: s * 1000),
        (pa.int64(), lambda s: s * 10**9),
        (pa.timestamp("ns"), lambda s: datetime.datetime.fromtimestamp(s, datetime.UTC)),
        (pa.date32(), lambda s: datetime.datetime.fromtimestamp(s, datetime.UTC).date()),
    ],
)
def test_times_of_every_kind(kind, value, tmp_path):
    write(tmp_path, kind, value)
    batch = show_batch(config_of(tmp_path), 1, one_device())
    unit = "datetime64[D]" if kind == pa.date32() else "datetime64[s]"
    expected = np.array(seconds_of(4), "datetime64[s]").astype(unit)
    assert batch.times[0, 4, :5].astype(unit).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("kind", "value"), [(None, None), (pa.string(), lambda s: "noon"), (pa.float64(), float)]
)
def test_values_that_are_not_times_are_not_shown(kind, value, tmp_path):
    write(tmp_path, kind, value)
    batch = show_batch(config_of(tmp_path), 1, one_device())
    assert batch.times is None
    assert row_ids(batch, 4, 0, 5) == items_of(4)


def test_rows_that_only_times_make_longer_are_not_shown_longer(tmp_path):
    """Rows without any feature have no positions, whatever times they have."""
    ints = pa.list_(pa.int64())
    types = {"item_id": ints, "behavior_id": ints, "tags": pa.list_(ints), "timestamp": ints}
    none = {"item_id": None, "behavior_id": None, "tags": None, "timestamp": [1, 2]}
    some = {"item_id": [7], "behavior_id": [1], "tags": [[1]], "timestamp": [3]}
    write_log(tmp_path / "a.orc", [none, some], types)
    batch = show_batch(config_of(tmp_path), 1, one_device())
    assert batch.arrays["length"][0, :2].tolist() == [0, 1]
    assert batch.times is None


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"io__shuffle": True},
        {"io__layout": "flat", "train__gradient_accumulation_steps": 2},
        {"io__sequences": Pack(rows="auto", windows=2), "eval__split": LastEvents(events=1)},
        {"loss__negatives": "mixed", "loss__num_negatives": 5, "loss__log_q": "catalogue"},
    ],
    ids=["shuffled", "flat", "packed", "negatives"],
)
def test_the_batch_is_the_one_that_training_uses(log, tmp_path, changes, devices):
    config = config_of(log, **changes)
    train = dataclasses.replace(config.train, output_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=train)
    mesh = make_mesh(jax.devices()[:devices])
    shown = show_batch(config, 2, mesh)
    assert list(tmp_path.iterdir()) == []
    with contextlib.closing(Checkpoints(Path(train.output_dir), 1)) as checkpoints:
        job, _ = training._prepare(config, mesh, checkpoints)
        with contextlib.closing(job.reader):
            next(job.reader)
            sent = next(job.reader).arrays
        sent |= {} if job.items is None else job.items.draw(2)
    expected = unpack(StepSettings.of(config), sent)
    assert list(expected) == list(shown.arrays)
    for name, array in shown.arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_cache_is_neither_read_nor_written(log, tmp_path):
    config = config_of(log, io__cache=str(tmp_path / "cache"))
    shown = show_batch(config, 1, one_device())
    np.testing.assert_array_equal(
        shown.arrays["length"], show_batch(config_of(log), 1, one_device()).arrays["length"]
    )
    assert list(tmp_path.iterdir()) == []


def test_errors_of_training_are_raised_here_too(log, tmp_path):
    with pytest.raises(UserError, match=r"io\.drop_remainder: a batch has 32 rows"):
        show_batch(config_of(log, io__batch_size=32, io__drop_remainder=True), 1, one_device())
    with pytest.raises(UserError, match=r"io\.data_paths"):
        show_batch(config_of(tmp_path / "nowhere"), 1, one_device())
    missing = FeatureConfig(name="shop", hash_bucket_size=5)
    base = small.config()
    base = dataclasses.replace(base, features=(*base.features, missing))
    with pytest.raises(UserError, match="no column shop"):
        show_batch(config_of(log, base), 1, one_device())
