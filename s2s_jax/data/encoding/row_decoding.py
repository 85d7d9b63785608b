"""Decodes rows of a log for training: held-out events are cut off, and long rows truncated."""

import numpy as np
import pyarrow as pa

from s2s_jax.config.settings import Decoding
from s2s_jax.data.encoding import held_out
from s2s_jax.errors import MachineError, UserError
from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.arrow import Source
from s2s_serve.encoding.blocks import Block


def decode_rows(batch: pa.RecordBatch, file: Source, first_row: int, decoding: Decoding) -> Block:
    """Decodes all features of a record batch, see `features.decode`.

    Args:
      batch: rows with the columns of the features and of the split.
      file: source of the rows, for messages.
      first_row: number of the first row in the file, for messages.
      decoding: what is held out, and how features are truncated, hashed and bagged.

    Raises:
      UserError: see `features.decode`, or a row would be truncated although `io.check_length` forbids
        it.
      MachineError: there is too little memory.
    """

    def keep(whole: Block) -> Block:
        longest = decoding.history_len
        if longest is not None and decoding.check_length:
            _refuse_long_rows(whole.lengths_N, longest, file, first_row, decoding.windows)
        cut = held_out.training_cut(decoding.split)
        kept = blocks.take_first(whole, cut.kept(batch, whole.lengths_N, file, first_row))
        return kept if longest is None else blocks.truncate(kept, longest, decoding.keep_newest)

    try:
        return features.decode(batch, file, first_row, decoding.features, keep)
    except MemoryError as error:
        raise MachineError(
            f"{file.path}: rows from {first_row:,} on cannot be decoded: too little memory; give the "
            f"job more, lower io.thread_num, or rewrite the log in smaller stripes"
        ) from error


def _refuse_long_rows(
    lengths_N: np.ndarray, longest: int, file: Source, first_row: int, windows: int
) -> None:
    if lengths_N.max(initial=0) <= longest:
        return
    row = int(np.argmax(lengths_N > longest))
    in_windows = "" if windows == 1 else f" in {windows} windows"
    raise UserError(
        f"{file.path}: row {first_row + row} has {lengths_N[row]} positions, expected at most "
        f"{longest} (model.seq_len{in_windows}); unset io.check_length to truncate"
    )
