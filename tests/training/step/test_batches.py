"""Times travel with the ids of events, in every layout of a batch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small

from s2s_jax.config import TimeGaps
from s2s_jax.config.settings import Decoding
from s2s_jax.data.batching.packing import to_packed
from s2s_jax.training.step.batches import ITEM_SHARE, SEQUENCE, TIME, unpack
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding import blocks

L = small.SEQ_LEN
LENGTHS = np.array([3, 0, 6, 1, 2])


def config(log_q="none"):
    plain = small.config()
    return small.config(
        model=dataclasses.replace(plain.model, time_bias=TimeGaps()),
        loss=dataclasses.replace(plain.loss, log_q=log_q),
    )


def block():
    """Rows whose items are numbered, and whose times are 100 times these numbers."""
    total, features = int(LENGTHS.sum()), config().features
    values_PC = np.zeros((total, sum(f.bag_size for f in features) + 1), np.int32)
    values_PC[:, 0] = np.arange(total)
    values_PC[:, -1] = 100 * np.arange(total)
    return blocks.packed_block(values_PC, LENGTHS)


@pytest.mark.parametrize("log_q", ["none", "catalogue"])
@pytest.mark.parametrize("layout", ["dense", "flat", "packed"])
def test_each_event_has_its_time(layout, log_q):
    settings = StepSettings.of(config(log_q))
    if layout == "packed":
        arrays = to_packed([block()], 1, len(LENGTHS), 3, L, keep_newest=True)
    elif layout == "flat":
        arrays = blocks.to_flat([block()], len(LENGTHS), L, len(LENGTHS))
    else:
        arrays = blocks.to_dense([block()], len(LENGTHS), L)
    if log_q == "catalogue":
        # The share of an item follows.
        name = "ids" if "ids" in arrays else "values"
        share = np.full((*arrays[name].shape[:-1], 1), 2**29, np.int32)
        arrays[name] = np.concatenate([arrays[name], share], axis=-1)
    batch = unpack(settings, {name: jnp.asarray(x)[None] for name, x in arrays.items()})
    real = np.asarray(batch["ids/item_id"][..., 0]) >= 0
    assert real.sum() == LENGTHS.sum()
    assert np.array_equal(batch[TIME][real], 100 * batch["ids/item_id"][real][:, 0])
    assert (SEQUENCE in batch) == (layout == "packed")
    assert (ITEM_SHARE in batch) == (log_q == "catalogue")
    if log_q == "catalogue":
        assert (np.asarray(batch[ITEM_SHARE])[real] == 0.5).all()


def test_without_the_option_nothing_is_decoded_for_times():
    plain, timed = small.config(), config()
    assert plain.decoded_features == plain.features
    before, after = Decoding.of(plain).fingerprint, Decoding.of(timed).fingerprint
    # So caches of decoded stripes are used again without the option, and are others with it.
    assert not any("time_bias" in key for key in before)
    assert {key: after[key] for key in after if key not in before} == {
        "model.time_bias.column": "timestamp",
        "model.time_bias.time_unit": "s",
    }
    assert before == {key: after[key] for key in before}
