"""Estimates how many users fill a batch, from a few stripes of the log or only from footers."""

import dataclasses

import numpy as np

from s2s_jax.config.settings import Reading, Sequences
from s2s_jax.data.encoding import held_out
from s2s_jax.data.logs import orc, stripe_sample
from s2s_jax.data.logs.index import FileIndex, may_skip
from s2s_jax.errors import UserError
from s2s_serve.encoding import arrow, features

# The share of positions that packing should fill on average, so that little is cut. Packing is
# suggested if it would put at least this many times as many users into a batch.
_WELL_FILLED, _WORTH_PACKING = 0.85, 2


def with_packing(reading: Reading, index: FileIndex) -> Reading:
    """Return `reading` with packing auto replaced by the number of users that fill a batch well.

    The number depends only on the files and settings, so all hosts and continued runs find the same one.

    Raises:
      UserError: a stripe cannot be read, and may not be skipped.
    """
    if reading.sequences.packing != "auto":
        return reading
    mean = _mean_kept(reading, index)
    # If nothing can be read, batches are empty for any number of users.
    packing = 1 if mean is None else _users_that_fit(reading.sequences, mean)
    packed = dataclasses.replace(reading.sequences, packing=packing)
    return dataclasses.replace(reading, sequences=packed)


def packing_notes(reading: Reading, index: FileIndex) -> list[str]:
    """Return notes on batches that are mostly padding, or whose rows are cut.

    Raises:
      UserError: see `with_packing`.
    """
    sequences = reading.sequences
    packing, rows, seq_len = sequences.packing, sequences.rows, sequences.seq_len
    if packing == "auto":
        return []
    if packing is None:
        mean = _mean_in_footers(index)
        fitting = 0 if mean is None else _users_that_fit(sequences, mean)
        if fitting < _WORTH_PACKING * rows:
            return []
        return [
            f"rows have {mean:,.0f} positions on average, so most of the {seq_len:,} (model.seq_len) "
            f"are padding; io.sequences pack would fill them with about {fitting} users"
        ]
    mean = _mean_kept(reading, index)
    if mean is None:
        return []
    wanted, room, fitting = packing * mean, rows * seq_len, _users_that_fit(sequences, mean)
    fill = (
        f"warning: {packing} users (io.sequences.rows) have {wanted:,.0f} positions on average, and a "
        f"device's batch has {room:,} (io.batch_size x model.seq_len), so"
    )
    if wanted > room:
        return [f"{fill} the longest are cut; io.sequences.rows {fitting} (or auto) would fit"]
    if fitting >= _WORTH_PACKING * packing:
        return [
            f"{fill} most of it is padding; io.sequences.rows {fitting} (or auto) would fill it"
        ]
    return []


def _mean_in_footers(index: FileIndex) -> float | None:
    """Return the mean number of positions of a row in the log; None if no row has any."""
    positions = sum(file.positions for file in index.files)
    return positions / sum(file.rows for file in index.files) if positions else None


def _mean_kept(reading: Reading, index: FileIndex) -> float | None:
    """Return the mean number of positions that training sees of a row; None if no row has any.

    Rows of which training sees nothing count, because batches have places for them. Reads a sample of
    the stripes.
    """
    stripes, decoding = index.stripes, reading.decoding
    cut = held_out.training_cut(decoding.split)
    names = features.column_names(decoding.features)
    rows = positions = 0
    for file, number, first_row in (stripes[n] for n in stripe_sample.spread(index)):
        try:
            batch = orc.read_stripe(file, number, names)
            of_columns = [arrow.list_lengths(batch.column(name)) for name in names]
            kept_N = cut.kept(batch, np.maximum.reduce(of_columns), file, first_row)
        except UserError as error:
            # The real reading will report what cannot be read.
            if not may_skip(error, reading.logs):
                raise
            continue
        rows += len(kept_N)
        positions += int(np.minimum(kept_N, reading.epoch_history_len).sum())
    return positions / rows if positions else None


def _users_that_fit(sequences: Sequences, mean: float) -> int:
    """Return how many users with `mean` positions fill a batch well."""
    room = sequences.rows * sequences.seq_len
    # Many rows may be empty, but a batch of others needs a position for each user.
    return min(max(1, int(_WELL_FILLED * room / mean)), room)
