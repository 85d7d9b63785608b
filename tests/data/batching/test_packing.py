"""Packing: windows, layout, batches, and a model that cannot tell packed sequences from single ones."""

import dataclasses
import itertools

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import orc

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Crop,
    EvalConfig,
    FeatureConfig,
    IOConfig,
    LastEvents,
    LossConfig,
    Pack,
    Truncate,
    validate,
)
from s2s_jax.config.settings import Decoding, Reading
from s2s_jax.data.batching.batch_fill import with_packing
from s2s_jax.data.batching.dataset import WHOLE, HostSlice
from s2s_jax.data.batching.packing import NO_SEQUENCE, lay_out, lay_rows
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.batching.windows import cut_windows
from s2s_jax.errors import UserError
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.blocks import NO_ID, packed_block

L = small.SEQ_LEN
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=20)


@given(lengths, st.integers(2, 9), st.booleans())
def test_windows_predict_every_event_but_the_first_once(lengths, seq_len, newest):
    windows = cut_windows(np.array(lengths), seq_len, newest)
    found = {row: [] for row in range(len(lengths))}
    for row, begin, length in zip(*(x.tolist() for x in windows), strict=True):
        assert 0 < length <= seq_len
        found[row].append((begin, begin + length))
    for row, length in enumerate(lengths):
        predicted = [p for begin, end in found[row] for p in range(begin + 1, end)]
        assert sorted(predicted) == list(range(1, length))
        assert len(found[row]) == max(-(-(length - 1) // (seq_len - 1)), int(length > 0))
        if length:
            # The newest window comes first and is full, or the oldest one is.
            assert found[row] == sorted(found[row], reverse=True)
            whole = (max(length - seq_len, 0), length) if newest else (0, min(seq_len, length))
            assert whole in found[row]


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 8))
def test_layout_uses_each_sequence_once_and_fails_only_where_rows_are_full(lengths, bins):
    contents = lay_out(lengths, bins, 12)
    if contents is None:
        # Best fit leaves out a sequence only if it is longer than the free space of each row, so all
        # rows but at most one are at least half full.
        assert sum(lengths) > bins * 12 / 2
        return
    assert len(contents) == bins
    assert sorted(itertools.chain.from_iterable(contents)) == list(range(len(lengths)))
    assert all(sum(lengths[s] for s in row) <= 12 for row in contents)


def test_layout_fills_rows_to_the_last_position():
    assert lay_out([3, 9, 5, 7, 12, 1, 11], 4, 12) is not None


# ------------------------------------------------------------------------------------- batches


PACKED = Pack(rows=12, windows=3)
PER_EPOCH = "io.sequences.windows_per_epoch"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 50)
    return directory


def packed_config(log, sequences=PACKED, **io):
    settings = {"data_paths": str(log), "batch_size": 7, "sequences": sequences}
    return small.config(io=IOConfig(**settings | io, thread_num=0, prefetch=0, seed=3))


def sequences(batch) -> list[list[tuple]]:
    """The sequences of a batch, each a list of positions, regardless of their places in the batch."""
    found = []
    for row, length in enumerate(batch["length"].tolist()):
        ids = batch["ids"][row]
        assert (ids[max(length, 0) :] == NO_ID).all()
        sequence = np.zeros(L, int) if "sequence" not in batch else batch["sequence"][row]
        if "sequence" in batch:
            assert (sequence[length:] == NO_SEQUENCE).all()
            assert (np.diff(sequence[:length]) >= 0).all()
        positions = [tuple(ids[p].tolist()) for p in range(max(length, 0))]
        for _, group in itertools.groupby(range(len(positions)), key=lambda p: sequence[p]):
            found.append([positions[p] for p in group])
    return found


def epoch(config, rows, host_slice=WHOLE):
    reader = of_config.reader(config, rows, host_slice)
    return [batch.arrays for batch in itertools.islice(reader, reader.steps_per_epoch)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_batches_hold_the_windows_of_whole_rows(log, side):
    config = packed_config(log, truncate_side=side, batch_size=20)
    batches = epoch(config, 24)
    whole = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, sequences=Truncate()),
        model=dataclasses.replace(config.model, seq_len=40),
    )
    expected = []
    for batch in epoch(whole, 50):
        for row, length in enumerate(batch["length"].tolist()):
            ids = [tuple(x) for x in batch["ids"][row, :length].tolist()]
            ends = range(length, 1, 1 - L) if side == "left" else range(0, length - 1, L - 1)
            expected += [
                ids[max(at - L, 0) : at] if side == "left" else ids[at : at + L] for at in ends
            ]
    found = [s for batch in batches for s in sequences(batch)]
    assert sorted(found) == sorted(expected)
    assert sum(batch["examples"].sum() for batch in batches) == 50
    assert sum(batch["cut"].sum() for batch in batches) == 0
    # 24 users on two devices with 20 rows each.
    assert {batch["length"].shape for batch in batches} == {(40,)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_epoch_trains_on_a_run_of_each_history(log, side):
    config = packed_config(log, Crop(windows=4), truncate_side=side, batch_size=50)
    validate(config)
    whole = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, sequences=Truncate()),
        model=dataclasses.replace(config.model, seq_len=Decoding.of(config).history_len),
    )
    runs, histories = (itertools.islice(of_config.reader(c, 50), 60) for c in (config, whole))
    at_end, offs = [], []
    for run, history in zip(runs, histories, strict=True):
        for row, length in enumerate(run.arrays["length"].tolist()):
            most = int(history.arrays["length"][row])
            assert length == min(most, L)
            if most <= L:
                np.testing.assert_array_equal(
                    run.arrays["ids"][row, :length], history.arrays["ids"][row, :length]
                )
                continue
            places = [
                begin
                for begin in range(most - L + 1)
                if np.array_equal(
                    run.arrays["ids"][row], history.arrays["ids"][row, begin : begin + L]
                )
            ]
            (begin,) = places
            spare = most - L
            off = spare - begin if side == "left" else begin
            # Half of the crops are random; for these, every place is equally likely.
            at_end.append((off == 0) - 0.5 - 0.5 / (spare + 1))
            offs += [] if off == 0 else [off / spare - (spare + 1) / 2 / spare]
    assert len(offs) > 200
    assert abs(np.mean(at_end)) < 0.05
    assert abs(np.mean(offs)) < 0.05


def test_runs_do_not_depend_on_who_reads_them(log):
    config = packed_config(log, Pack(rows=12, windows=4, windows_per_epoch=1), batch_size=30)
    alone = dataclasses.replace(
        config, io=dataclasses.replace(config.io, sequences=Crop(windows=4))
    )
    expected = sorted(s for batch in epoch(alone, 50) for s in sequences(batch))
    assert max(map(len, expected)) == L
    for rows, hosts in ((12, 1), (24, 1), (24, 2)):
        shares = [epoch(config, rows, HostSlice(host, hosts)) for host in range(hosts)]
        batches = itertools.chain.from_iterable(shares)
        assert sorted(s for batch in batches for s in sequences(batch)) == expected
    reader, other = of_config.reader(config, 24), of_config.reader(config, 24)
    for _ in range(4):
        next(reader)
    other.set_state(reader.get_state())
    continued, batch = next(other), next(reader)
    for name, array in continued.arrays.items():
        np.testing.assert_array_equal(array, batch.arrays[name])


@given(lengths, st.integers(1, 9), st.integers(2, 9), st.booleans())
def test_what_does_not_fit_is_cut_from_the_longest_and_counted(lengths, bins, seq_len, newest):
    lengths = lengths[: bins * seq_len]
    begins = np.cumsum([0, *lengths])
    log = packed_block(np.arange(begins[-1], dtype=np.int32)[:, None], np.array(lengths))
    found = lay_rows(log, bins, seq_len, newest)
    used = np.zeros(bins, int)
    np.add.at(used, found.bin_W, found.lengths_W)
    assert used.max(initial=0) <= seq_len
    places = [np.arange(b, b + n) for b, n in zip(found.begins_W, found.lengths_W, strict=True)]
    kept = set(itertools.chain.from_iterable(x.tolist() for x in places))
    of_rows = [kept & set(range(b, b + n)) for b, n in zip(begins, lengths, strict=False)]
    longest = max(map(len, of_rows))
    for row, begin, length in zip(of_rows, begins, lengths, strict=False):
        n = min(length, longest)
        first = begin + length - n if newest else begin
        assert row == set(range(first, first + n))
    assert found.cut == sum(lengths) - len(kept)
    if found.cut:
        more = np.minimum(lengths, longest + 1)
        windows = cut_windows(more, seq_len, newest)
        assert lay_out(windows.lengths_W.tolist(), bins, seq_len) is None


def test_hosts_and_continued_readers_see_the_same_batches(log):
    config = packed_config(log)
    whole = epoch(config, 24)
    shares = [epoch(config, 24, HostSlice(host, 2)) for host in range(2)]
    for number, batch in enumerate(whole):
        for name, array in batch.items():
            halves = [share[number][name] for share in shares]
            np.testing.assert_array_equal(np.concatenate(halves), array)
    reader = of_config.reader(config, 24)
    next(reader)
    other = of_config.reader(config, 24)
    other.set_state(reader.get_state())
    for name, array in next(other).arrays.items():
        np.testing.assert_array_equal(array, whole[1][name])


def test_a_host_without_rows_has_growing_ids_too(log):
    features = (FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=0),)
    config = dataclasses.replace(
        packed_config(log, Truncate(), batch_size=8),
        features=features,
        loss=LossConfig(target_features=("item_id",)),
    )
    shapes = [{b["ids"].shape for b in epoch(config, 32, HostSlice(host, 4))} for host in range(4)]
    assert shapes == [{(8, L, 2)}] * 4


@pytest.mark.parametrize(
    ("io", "path"),
    [
        ({"sequences": Pack(rows=0)}, "io.sequences.rows"),
        ({"sequences": Pack(rows=2 * L + 1), "batch_size": 2}, "io.sequences.rows"),
        ({"sequences": Pack(windows=0)}, "io.sequences.windows"),
        ({"sequences": Pack(windows=3, windows_per_epoch=0)}, PER_EPOCH),
        ({"sequences": Pack(windows=3, windows_per_epoch=3)}, PER_EPOCH),
        ({"sequences": Pack(windows=3, windows_per_epoch=1), "shuffle": False}, PER_EPOCH),
        ({"sequences": Crop(windows=1)}, "io.sequences.windows"),
        ({"sequences": Crop(windows=2), "shuffle": False}, "io.shuffle"),
        ({"layout": "flat"}, "io.layout"),
    ],
)
def test_settings_that_cannot_work_are_named(log, io, path):
    config = packed_config(log)
    with pytest.raises(UserError, match=f"^{path}: expected"):
        validate(dataclasses.replace(config, io=dataclasses.replace(config.io, **io)))


@pytest.mark.parametrize(
    ("made", "note"),
    [
        (Pack(rows=5, windows=3), None),
        (Pack(rows=40, windows=3), "the longest are cut; io.sequences.rows 4 (or auto) would fit"),
        (
            Pack(rows=2, windows=3),
            "most of it is padding; io.sequences.rows 4 (or auto) would fill it",
        ),
        (Pack(windows=3), None),
        (Truncate(), None),
    ],
)
def test_notes_say_what_packing_fits(log, made, note):
    config = packed_config(log, made)
    notes = of_config.packing_notes(config, of_config.index(config))
    assert len(notes) == (note is not None)
    assert all(note in found for found in notes)


def test_packing_is_suggested_for_short_rows(log):
    config = packed_config(log, Truncate())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=64))
    (note,) = of_config.packing_notes(config, of_config.index(config))
    assert "are padding; io.sequences pack would fill them" in note


@pytest.mark.parametrize(
    ("held_out", "windows", "per_epoch"), [(0, 3, None), (2, 3, None), (0, 1, None), (2, 3, 1)]
)
def test_auto_packs_users_that_fill_a_batch(log, held_out, windows, per_epoch):
    config = packed_config(log, Pack(windows=windows, windows_per_epoch=per_epoch), batch_size=20)
    split = LastEvents(events=held_out) if held_out else None
    config = dataclasses.replace(config, eval=EvalConfig(split=split))
    whole = dataclasses.replace(
        packed_config(log, Truncate()),
        model=dataclasses.replace(config.model, seq_len=40),
    )
    (batch,) = epoch(whole, 50)
    kept = np.minimum(batch["length"] - held_out, (per_epoch or windows) * (L - 1) + 1)
    # Rows of which nothing is kept take places, too.
    mean = np.maximum(kept, 0).mean()
    packing = with_packing(Reading.of(config), of_config.index(config)).sequences.packing
    assert packing * mean <= 0.85 * 20 * L < (packing + 1) * mean
    # A number stays unchanged.
    config = packed_config(log)
    given = Reading.of(config)
    assert with_packing(given, of_config.index(config)) is given


@pytest.mark.parametrize("short", [0, 2])
def test_auto_fills_batches_of_a_log_whose_rows_are_mostly_held_out(tmp_path, short):
    small.write_log(tmp_path, 50, files=1)
    (path,) = tmp_path.iterdir()
    long = orc.read_table(str(path))
    few = pa.table(
        {
            name: pa.array([row[:short] for row in long[name].to_pylist()], long[name].type)
            for name in long.column_names
        }
    )
    orc.write_table(pa.concat_tables([long, few, few, few, few]), str(path))
    config = dataclasses.replace(
        packed_config(tmp_path, Pack(windows=3), batch_size=20),
        eval=EvalConfig(split=LastEvents(events=2)),
    )
    reading = with_packing(Reading.of(config), of_config.index(config))
    reader = Reader(reading, reading.sequences.packing)
    full = [int(next(reader).arrays["length"].sum()) / (20 * L) for _ in range(3)]
    reader.close()
    # Each batch has a share of the 50 long rows, and the log ends in the middle of the last one.
    assert 0.6 < np.mean(full) <= 1


def test_auto_packs_no_more_users_than_a_batch_has_positions(tmp_path):
    """A batch may have only users that training sees, although most rows are held out."""
    small.write_log(tmp_path, 60, files=1)
    (path,) = tmp_path.iterdir()
    log = orc.read_table(str(path))
    log = log.filter(pc.greater(pc.list_value_length(log["item_id"]), 2))

    def cut(length):
        columns = {
            name: [row[:length] for row in log[name].to_pylist()] for name in log.column_names
        }
        return pa.table({name: pa.array(x, log[name].type) for name, x in columns.items()})

    orc.write_table(pa.concat_tables([cut(3), *[cut(2)] * 5]), str(path))
    config = dataclasses.replace(
        packed_config(tmp_path, Pack(), batch_size=2, shuffle=False),
        eval=EvalConfig(split=LastEvents(events=2)),
    )
    reading = with_packing(Reading.of(config), of_config.index(config))
    assert reading.sequences.packing == 2 * L
    reader = Reader(reading, reading.sequences.packing)
    assert next(reader).arrays["length"].sum() == 2 * L
    reader.close()


# --------------------------------------------------------------------------------------- model


def packed_and_not(config, users, bins, seed):
    """The same random users, once in separate rows and once packed by hand."""
    alone = small.batch(config, users, seed)
    ids, sequence = np.full((bins, *alone["ids"].shape[1:]), NO_ID, np.int32), None
    contents = lay_out(np.maximum(alone["length"], 0).tolist(), bins, L)
    assert contents is not None
    sequence = np.full((bins, L), NO_SEQUENCE, np.int32)
    length = np.zeros(bins, np.int32)
    places = {}
    for row, users_of_row in enumerate(contents):
        for number, user in enumerate(users_of_row):
            at = slice(length[row], length[row] + alone["length"][user])
            ids[row, at] = alone["ids"][user, : alone["length"][user]]
            sequence[row, at] = number
            length[row] += alone["length"][user]
            places[user] = (row, at)
    counts = {name: np.zeros(bins, np.int32) for name in ("examples", "skipped", "cut")}
    packed = {"length": length, "ids": ids, "sequence": sequence, **counts}
    return alone, packed, places


@pytest.mark.parametrize(
    "position", [pytest.param("none", marks=pytest.mark.slow), "learned", "rope"]
)
def test_sequences_are_encoded_as_if_alone(position):
    config = small.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, position=position))
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    alone, packed, places = packed_and_not(config, 16, 12, seed=1)

    def encode(batch):
        batch = {name: x[0] for name, x in put_batch(batch, 1, mesh).items()}
        encoded = functions.predict(state, batch)
        return [np.asarray(x).reshape(-1, L, x.shape[-1]) for x in encoded]

    preds, targets = encode(packed)
    assert sum(len(users) > 1 for users in map(set, packed["sequence"].tolist())) > 3
    for user, (row, at) in places.items():
        for ours, theirs in ((preds, encode(alone)[0]), (targets, encode(alone)[1])):
            length = alone["length"][user]
            np.testing.assert_allclose(ours[row, at], theirs[user, :length], rtol=1e-5, atol=1e-5)
    # If another sequence of the row changes, this one stays the same, to the last bit.
    changed = dict(packed, ids=packed["ids"].copy())
    row = next(row for row, at in places.values() if at.start > 0)
    first = packed["sequence"][row] == 0
    changed["ids"][row, first, 0] += 1
    now = encode(changed)[0]
    real = np.arange(L) < packed["length"][row]
    np.testing.assert_array_equal(now[row, ~first & real], preds[row, ~first & real])
    assert np.abs(now[row, first] - preds[row, first]).min(axis=0).max() > 0


@pytest.mark.parametrize(
    ("devices", "microbatches", "pairing"),
    [
        pytest.param(1, 1, "next", marks=pytest.mark.slow),
        pytest.param(1, 1, "previous", marks=pytest.mark.slow),
        (2, 1, "next"),
        pytest.param(2, 2, "next", marks=pytest.mark.slow),
    ],
)
def test_a_packed_step_is_the_step_of_single_rows(devices, microbatches, pairing):
    config = small.config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1),
        loss=dataclasses.replace(config.loss, pairing=pairing),
    )
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    results = []
    for batch in packed_and_not(config, 16, 12, seed=2)[:2]:
        arrays = put_batch(batch, microbatches, mesh)
        state, metrics = functions.train_step(functions.init(), arrays)
        results.append(jax.device_get((state, metrics)))
    (one, metrics), (other, others) = results
    for name in ("loss", "hit_rate", "grad_norm", "tokens"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)
    # First moments are a tenth of the gradients, of tables and of the dense part.
    for ours, theirs in zip(
        jax.tree.leaves(other.opt_state), jax.tree.leaves(one.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
