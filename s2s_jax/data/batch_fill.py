"""How many users fill a batch, as far as the footers of the files tell how long their rows are."""

import dataclasses

from s2s_jax.config import Config
from s2s_jax.data.index import FileIndex

# Share of the positions that packing should fill on average, so that little has to be cut; and how many
# times the users it should hold to be worth a note.
_WELL_FILLED, _WORTH_PACKING = 0.85, 2


def with_packing(config: Config, index: FileIndex) -> Config:
    """`config` with a number where `io.packing` is auto: the users that fill a batch well."""
    if config.io.packing != "auto":
        return config
    packing = _users_that_fit(config, _mean_positions(config, index))
    return dataclasses.replace(config, io=dataclasses.replace(config.io, packing=packing))


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
    if not mean:
        return config.io.batch_size
    return max(1, int(_WELL_FILLED * room / min(mean, config.history_len)))
