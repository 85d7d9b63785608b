"""How many users fill a batch: from some stripes of the log or, without reading any, from footers."""

import dataclasses

import numpy as np

from s2s_jax.config import Config
from s2s_jax.data import columns, features, held_out, orc
from s2s_jax.data.index import FileIndex
from s2s_jax.errors import UserError

# Share of the positions that packing should fill on average, so that little has to be cut; and how many
# times the users it should hold to be worth a note.
_WELL_FILLED, _WORTH_PACKING = 0.85, 2

# Stripes, evenly spread over the log, whose rows are looked at.
_STRIPES_READ = 8


def with_packing(config: Config, index: FileIndex) -> Config:
    """`config` with a number where `io.packing` is auto: the users that fill a batch well.

    A function of the files alone, so that all hosts, and a run that is continued, find the same.

    Raises:
      UserError: a stripe cannot be read and `io.on_error` is stop.
    """
    if config.io.packing != "auto":
        return config
    lengths = _kept_lengths(config, index)
    # Where nothing can be read, batches are empty however many users they have.
    packing = _users_that_fit(config, float(lengths.mean())) if len(lengths) else 1
    return dataclasses.replace(config, io=dataclasses.replace(config.io, packing=packing))


def _kept_lengths(config: Config, index: FileIndex) -> np.ndarray:
    """int64 positions that training sees of rows of some stripes, those with at least one."""
    stripes, cut = index.stripes, held_out.training_cut(config)
    names = features.column_names(config.features)
    chosen = np.unique(np.linspace(0, len(stripes) - 1, _STRIPES_READ).round().astype(int))
    found = [np.empty(0, np.int64)]
    for file, number, first_row in (stripes[n] for n in chosen.tolist()):
        try:
            batch = orc.read_stripe(file, number, names)
            of_columns = [columns.list_lengths(batch.column(name)) for name in names]
            lengths_N = np.maximum.reduce(of_columns).astype(np.int64)
            kept_N = cut.kept(batch, lengths_N, file, first_row)
        except UserError:
            # What cannot be read is told, once, by what reads everything.
            if config.io.on_error == "stop":
                raise
            continue
        found.append(np.minimum(kept_N[kept_N > 0], config.history_len))
    return np.concatenate(found)


def packing_notes(config: Config, index: FileIndex) -> list[str]:
    """What packing would gain, or loses.

    Args:
      config: the configuration, with a number of users or none.
      index: of the files.
    """
    packing, rows, seq_len = config.io.packing, config.io.batch_size, config.model.seq_len
    assert packing != "auto", "resolve it with with_packing"
    mean = _mean_positions(config, index)
    if not mean:
        return []
    fitting = _users_that_fit(config, mean)
    if packing is None:
        if fitting < _WORTH_PACKING * rows:
            return []
        return [
            f"rows have {mean:,.0f} positions on average, so most of the {seq_len:,} (model.seq_len) "
            f"are padding; io.packing {fitting} (or auto) would fill them with more users"
        ]
    wanted, room = packing * min(mean, config.history_len), rows * seq_len
    if wanted > room:
        return [
            f"warning: io.packing {packing} users have {wanted:,.0f} positions on average but a "
            f"device's batch only {room:,} (io.batch_size x model.seq_len), so the longest are cut; "
            f"io.packing {fitting} (or auto) would fit"
        ]
    if fitting >= _WORTH_PACKING * packing:
        return [
            f"warning: io.packing {packing} users have {wanted:,.0f} positions on average and a "
            f"device's batch {room:,} (io.batch_size x model.seq_len), so most of it is padding; "
            f"io.packing {fitting} (or auto) would fill it"
        ]
    return []


def _mean_positions(config: Config, index: FileIndex) -> float:
    """Mean positions of a row that training sees; those after `eval.split_at` count among them."""
    rows = sum(file.rows for file in index.files if file.positions)
    if not rows:
        return 0.0
    mean = sum(file.positions for file in index.files) / rows
    return max(mean - config.eval.held_out, 1.0)


def _users_that_fit(config: Config, mean: float) -> int:
    room = config.io.batch_size * config.model.seq_len
    return max(1, int(_WELL_FILLED * room / min(mean, config.history_len)))
