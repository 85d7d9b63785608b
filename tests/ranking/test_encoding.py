"""Users are encoded at about their own lengths, and no user's vector depends on the others."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.data.batching.encoding_shapes import Shapes, by_length, lengths, stretches
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.seen import distinct
from s2s_jax.ranking.encode import UserEncoder
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding import blocks

L, USERS = 20, 90
SHAPES = Shapes(lengths(L), 40, 1)


def configured(position, grows):
    config = small.config()
    model = dataclasses.replace(config.model, seq_len=L, num_layers=1, position=position)
    config = dataclasses.replace(config, model=model)
    return small.growing(config) if grows else config


def batch_of(ids_NLC, length_N, users):
    """A batch of histories of these users, and some padding."""
    size = len(users) + 3
    length_N = length_N[users].astype(np.int64)
    values = np.concatenate(
        [ids_NLC[user, :end] for user, end in zip(users, length_N, strict=True)]
    )
    events_U = np.zeros(size, np.int32)
    events_U[: len(users)] = length_N
    none = np.full(int(length_N.sum()), -1, np.int32)
    return Histories(
        blocks.packed_block(values, length_N),
        len(users),
        np.zeros(len(users), np.int32),
        np.asarray(users),
        np.full(size, -1, np.int32),
        events_U,
        none,
        distinct(none, none),
    )


@pytest.mark.parametrize(
    ("position", "grows"),
    [pytest.param("learned", False, marks=pytest.mark.slow), ("rope", True)],
    ids=["learned", "rope-growing"],
)
def test_vectors_are_those_of_the_padded_histories_whoever_is_beside(position, grows):
    config = configured(position, grows)
    drawn = small.batch(config, USERS, 0)
    # Mostly short histories, but some of all lengths.
    rng = np.random.default_rng(1)
    length_N = np.where(rng.random(USERS) < 0.7, rng.integers(1, 9, USERS), drawn["length"])
    length_N = np.minimum(length_N, np.maximum(drawn["length"], 1)).astype(np.int32)
    ids_NLC = np.where(np.arange(L)[:, None] < length_N[:, None, None], drawn["ids"], -1)
    settings = StepSettings.of(config)
    found = {}
    for devices in (1,) if grows else (1, 4):
        mesh = make_mesh(jax.devices()[:devices])
        functions = make_step_functions(settings, mesh)
        state = functions.init()
        if grows:
            # Half of the ids get rows.
            known = {"length": length_N[: USERS // 2], "ids": ids_NLC[: USERS // 2]}
            known = {name: np.concatenate([x, x[:3]]) for name, x in known.items()}
            state, _ = functions.train_step(state, put_batch(known, 1, mesh))
        encoder = UserEncoder(functions, state, SHAPES._replace(devices=devices), mesh)
        users = np.arange(USERS)
        (all_at_once,) = encoder.encode([batch_of(ids_NLC, length_N, users)])
        found[devices] = all_at_once.users_UE[:USERS]
        assert not all_at_once.users_UE[USERS:].any()
        mixed = rng.permutation(users)
        groups = [mixed[:1], mixed[1:30], mixed[30:31], mixed[31:77], mixed[77:]]
        parts = encoder.encode([batch_of(ids_NLC, length_N, group) for group in groups[:2]])
        parts += [encoder.encode([batch_of(ids_NLC, length_N, g)])[0] for g in groups[2:]]
        for group, part in zip(groups, parts, strict=True):
            # Bit for bit: a command that was interrupted continues with other neighbours.
            assert (part.users_UE[: len(group)] == found[devices][group]).all()
            assert (part.unknown_U[: len(group)] == all_at_once.unknown_U[group]).all()
        assert (all_at_once.unknown_U.sum() > 0) == grows
        short = encoder.encode([batch_of(ids_NLC, length_N, users)], least_events=5)[0]
        assert (short.users_UE[:USERS].any(axis=1) == (length_N >= 5)).all()
        padded = {"length": length_N, "ids": ids_NLC}
        padded = {name: np.concatenate([x, x[:2]]) for name, x in padded.items()}
        sent = put_batch(padded, 1, mesh)
        encoded = functions.predict(state, {name: x[0] for name, x in sent.items()})
        preds_NLE = np.asarray(encoded.preds_ME).reshape(USERS + 2, L, -1)
        expected_NE = preds_NLE[users, length_N - 1]
        expected_NE /= np.linalg.norm(expected_NE, axis=1, keepdims=True)
        np.testing.assert_allclose(found[devices], expected_NE, rtol=1e-4, atol=1e-6)
    if not grows:
        assert (found[1] == found[4]).all()


def test_encoding_costs_what_the_histories_cost():
    """Short histories are padded to at most twice their length, or to the smallest length."""
    rng = np.random.default_rng(0)
    length_N = np.concatenate([rng.integers(1, 20, 5_000), [200, 150, 128, 129]])
    values = rng.integers(0, 9, (length_N.sum(), 2)).astype(np.int32)
    histories = blocks.packed_block(values, length_N)
    shapes = Shapes(lengths(200), 2_048, 2)
    wanted_N = length_N != 3
    done, positions = [], 0
    for same in by_length(histories, wanted_N, shapes):
        ids = same.ids_MC.reshape(2, 2_048, -1)[:, : 2_048 // same.seq_len * same.seq_len]
        ids = ids.reshape(-1, same.seq_len, 2)
        assert len(ids) == len(same.length_B) == shapes.rows(same.seq_len)
        for n, ids_LC in zip(same.chosen, ids, strict=False):
            begin, length = histories.begins_N[n], length_N[n]
            assert (ids_LC[:length] == values[begin : begin + length]).all()
            assert (ids_LC[length:] == -1).all()
            assert length <= same.seq_len <= max(2 * length - 2, 8)
        assert (ids[len(same.chosen) :] == -1).all()
        assert same.length_B.sum() == length_N[same.chosen].sum()
        done += same.chosen.tolist()
        positions += ids.shape[0] * same.seq_len
    assert sorted(done) == np.flatnonzero(wanted_N).tolist()
    # All lengths have one last batch that is not full.
    assert positions < 2 * length_N.sum() + 2 * 2_048 * len(shapes.lengths)


def test_stretches_are_long_enough_to_fill_batches_but_bounded(monkeypatch):
    def batch(users, events):
        ids_NLC, length_N = np.zeros((users, events, 1), np.int32), np.full(users, events)
        return batch_of(ids_NLC, length_N, np.arange(users))

    shapes = Shapes((8, 16), 32, 1)
    assert shapes.stretch_positions == 64 * 32
    batches = [batch(10, 16)] * 31
    assert [len(s) for s in stretches(batches, shapes)] == [13, 13, 5]
    assert [b for s in stretches(batches, shapes) for b in s] == batches
    place = "s2s_jax.data.batching.encoding_shapes"
    monkeypatch.setattr(f"{place}._MOST_USERS", 30)
    assert [len(s) for s in stretches(batches, shapes)] == [3] * 10 + [1]
    monkeypatch.setattr(f"{place}._MOST_EVENTS", 200)
    assert [len(s) for s in stretches(batches, shapes)] == [2] * 15 + [1]
    assert list(stretches([], shapes)) == []
