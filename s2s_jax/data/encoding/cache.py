"""Decoded stripes on disk: `io.cache`.

One Arrow IPC file a stripe, of one column: a list of positions for each row, each position the ids of
all features side by side. What it was made from (settings, file, stripe) stands in the schema's metadata
and is compared when it is read, so that a stale or foreign file is never used.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2s_jax.config import refuse_addresses
from s2s_jax.config.settings import Decoding
from s2s_jax.data.encoding.blocks import Block, packed_block, starts
from s2s_jax.data.encoding.features import id_width
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.errors import UserError

# Raised by one when the meaning of decoded ids changes, though no setting did.
DECODING_VERSION = 1
_METADATA = b"s2s_jax"


class StripeCache:
    """The cached stripes of one decoding."""

    def __init__(self, directory: str, decoding: Decoding):
        """Opens `directory`, which is made where it does not exist, for one decoding.

        Raises:
          UserError: it cannot be written.
        """
        refuse_addresses("io.cache", directory)
        self._made_for = {"version": DECODING_VERSION} | decoding.fingerprint
        self._columns = id_width(decoding.features)
        text = json.dumps(self._made_for, indent=2)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._dir = Path(directory).expanduser() / key
        self._writes = True
        note = self._dir / "made_for.json"
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                note.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"io.cache: {self._dir} cannot be written ({error})") from error

    def read(self, file: OrcFile, stripe: int) -> Block | None:
        """The decoded stripe, None if it is not cached or what is there is not whole."""
        path = self._path(file, stripe)
        try:
            with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
                if reader.schema.metadata != self._metadata(file, stripe):
                    return None
                batch = reader.get_batch(0)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError):
            # Torn by a full disk, say: decoded and written again.
            return None
        rows = batch.column(0)
        if batch.num_rows != file.stripe_rows[stripe]:
            return None
        starts_N = rows.offsets.to_numpy()
        values = rows.values.values.to_numpy()
        return packed_block(values.reshape(-1, self._columns), np.diff(starts_N))

    def write(self, file: OrcFile, stripe: int, block: Block) -> None:
        """Keeps a decoded stripe, a packed block.

        Where that fails, because the disk is full say, nothing more is kept, which is said once: it
        costs time later, but nothing is wrong with the stripe.
        """
        if not self._writes:
            return
        values = np.ascontiguousarray(block.values_PC).ravel()
        positions = pa.FixedSizeListArray.from_arrays(pa.array(values), self._columns)
        rows = pa.LargeListArray.from_arrays(pa.array(starts(block.lengths_N)), positions)
        schema = pa.schema([pa.field("rows", rows.type)], metadata=self._metadata(file, stripe))
        path = self._path(file, stripe)
        # Hosts and threads may write the same stripe; each renames a file of its own into place.
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.record_batch([rows], schema=schema))
            unfinished.replace(path)
        except (pa.ArrowException, OSError) as error:
            self._writes = False
            with contextlib.suppress(OSError):
                unfinished.unlink()
            reason = " ".join(str(error).split())
            print(
                f"io.cache: {self._dir} cannot be written ({reason}); what is there is used, and no "
                f"more stripes are kept",
                file=sys.stderr,
                flush=True,
            )

    def _path(self, file: OrcFile, stripe: int) -> Path:
        # Part files may have the same footer, and the same name in other directories.
        place = hashlib.sha256(os.fsencode(file.path.resolve())).hexdigest()[:16]
        return self._dir / f"{place}-{stripe}.arrow"

    def _metadata(self, file: OrcFile, stripe: int) -> dict[bytes, bytes]:
        source = {
            "size": file.size,
            "fingerprint": file.fingerprint,
            "sample": file.sample,
            # A file that was written anew is decoded anew, also if nothing else tells.
            "modified_ns": file.modified_ns,
            "stripe": stripe,
        }
        return {_METADATA: json.dumps(source | self._made_for).encode()}
