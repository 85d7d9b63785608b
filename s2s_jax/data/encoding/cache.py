"""The cache of decoded stripes on disk: `io.cache`.

There is one Arrow IPC file per stripe, with one column: a list of positions for each row, where a
position has the ids of all features. The metadata of the schema says what the file was made from
(settings, file, stripe). It is compared when the file is read, so that a stale or foreign file is never
used.
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
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.errors import UserError
from s2s_serve.encoding.blocks import Block, packed_block, starts
from s2s_serve.encoding.features import id_width

# Increased by one when the meaning of decoded ids changes without a change of settings.
DECODING_VERSION = 1
_METADATA = b"s2s_jax"


class StripeCache:
    """The cached stripes of one decoding."""

    def __init__(self, directory: str, decoding: Decoding):
        """Opens `directory`, which is created if it does not exist, for one decoding.

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
        self._lock = threading.Lock()
        note = self._dir / "made_for.json"
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                note.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"io.cache: {self._dir} cannot be written ({error})") from error

    def read(self, file: OrcFile, stripe: int) -> Block | None:
        """The decoded stripe; None if it is not cached, or its file is incomplete or outdated."""
        path = self._path(file, stripe)
        try:
            with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
                if reader.schema.metadata != self._metadata(file, stripe):
                    return None
                batch = reader.get_batch(0)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError):
            # Incomplete, for example because the disk was full: it will be decoded and written again.
            return None
        rows = batch.column(0)
        if batch.num_rows != file.stripe_rows[stripe]:
            return None
        starts_N = rows.offsets.to_numpy()
        values = rows.values.values.to_numpy()
        return packed_block(values.reshape(-1, self._columns), np.diff(starts_N))

    def write(self, file: OrcFile, stripe: int, block: Block) -> None:
        """Writes a decoded stripe, which must be a packed block.

        If this fails, for example because the disk is full, nothing more is written, and a message is
        printed once: it will cost time later, but training is not affected.
        """
        if not self._writes:
            return
        values = np.ascontiguousarray(block.values_PC).ravel()
        positions = pa.FixedSizeListArray.from_arrays(pa.array(values), self._columns)
        rows = pa.LargeListArray.from_arrays(pa.array(starts(block.lengths_N)), positions)
        schema = pa.schema([pa.field("rows", rows.type)], metadata=self._metadata(file, stripe))
        path = self._path(file, stripe)
        # Hosts and threads may write the same stripe; each moves its own file into place.
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.record_batch([rows], schema=schema))
            unfinished.replace(path)
        except (pa.ArrowException, OSError) as error:
            with self._lock:
                is_first, self._writes = self._writes, False
            with contextlib.suppress(OSError):
                unfinished.unlink()
            if not is_first:
                return
            reason = " ".join(str(error).split())
            print(
                f"io.cache: {self._dir} cannot be written ({reason}); cached stripes are used, but no "
                f"more stripes are cached",
                file=sys.stderr,
                flush=True,
            )

    def _path(self, file: OrcFile, stripe: int) -> Path:
        # Part files may have the same footer, and the same name in other directories.
        path = file.path.resolve() if isinstance(file.path, Path) else str(file.path)
        place = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return self._dir / f"{place}-{stripe}.arrow"

    def _metadata(self, file: OrcFile, stripe: int) -> dict[bytes, bytes]:
        source = {
            "size": file.size,
            "fingerprint": file.fingerprint,
            "sample": file.sample,
            # A rewritten file is decoded again, even if nothing else shows the change.
            "modified_ns": file.modified_ns,
            "stripe": stripe,
        }
        if file.version:
            source["version"] = file.version
        return {_METADATA: json.dumps(source | self._made_for).encode()}
