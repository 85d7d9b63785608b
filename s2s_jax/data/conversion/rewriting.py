"""Writes logs that are ORC already again, in stripes of a good size for training."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from s2s_jax.data.conversion.outcome import Converted, counted
from s2s_jax.data.conversion.progress import bar
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.data.logs import orc, orc_writer
from s2s_jax.errors import MachineError, UserError


def rewrite(settings: Settings, paths: Sequence[Path]) -> Converted:
    """Writes the rows of ORC files again, in stripes of a good size for training.

    Args:
      settings: where and how to write.
      paths: the files, in order.

    Raises:
      UserError: a file cannot be read, there are no rows, or the directory cannot be written.
    """
    files = [orc.read_footer(path) for path in paths]
    rows, read = sum(file.rows for file in files), 0
    if rows == 0:
        raise UserError(f"{paths[0]}: expected rows, found none; give other files")
    skipped: list[str] = []
    with (
        orc_writer.open_log(settings.output, settings.overwrite, settings.events_per_file) as log,
        bar("rewriting", lambda: read / rows),
    ):
        for file, stripe in ((f, i) for f in files for i in range(len(f.stripe_rows))):
            try:
                batch = orc.read_stripe(file, stripe, file.schema.names)
            except UserError as error:
                if isinstance(error, MachineError):
                    raise
                if settings.on_error == "stop":
                    remedy = "leave such stripes out with --on_error skip"
                    sentence = str(error).replace("take it out of io.data_paths", remedy)
                    raise UserError(sentence) from error
                where = f"of stripe {stripe} of {file.path}"
                skipped.append(counted(file.stripe_rows[stripe], "row", where))
                continue
            if log.rows == 0:
                # Assumes that all rows are as long as these.
                log.positions_per_stripe = orc_writer.stripe_positions(
                    orc_writer.positions(batch) * rows // max(batch.num_rows, 1)
                )
            log.write(pa.Table.from_batches([batch]))
            read += batch.num_rows
        if log.rows == 0:
            raise UserError(f"{paths[0]}: no stripe of the files can be read; give other files")
    return Converted(
        paths=log.paths, rows=log.rows, events=log.positions, skipped=tuple(skipped), bags={}
    )
