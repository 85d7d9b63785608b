"""What a part of recommendations says about itself, in the metadata of its Parquet file.

It is in the file of the rows, so that an interruption cannot save one without the other.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_jax.errors import UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place

_COUNTS, _DIGEST = b"s2s_jax.counts", b"s2s_jax.made_for"
# Parts that are read at the same time.
_READS = 8


class Said(NamedTuple):
    """What a part says about itself.

    Attributes:
      digest: the digest of what it was made for.
      counts: its counts.
      rows: its number of rows.
    """

    digest: str
    counts: Counter[str]
    rows: int


def digest_of(made_for: Mapping[str, Any]) -> str:
    """A text that is the same only for the same JSON."""
    return hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()


def signed(table: pa.Table, digest: str, counts: Mapping[str, int]) -> pa.Table:
    """The table of a part, with what it says about itself."""
    return table.replace_schema_metadata({_COUNTS: json.dumps(counts), _DIGEST: digest})


def said_by(metadata: Mapping[bytes, bytes] | None, rows: int) -> Said | None:
    """What a part with this metadata says about itself; None if it is no part."""
    if metadata is None or not {_COUNTS, _DIGEST} <= metadata.keys():
        return None
    return Said(metadata[_DIGEST].decode(), Counter(json.loads(metadata[_COUNTS])), rows)


def read_all(paths: Iterable[Place]) -> list[Said | None]:
    """What parts say about themselves, without their rows; None for files that are no complete parts.

    Raises:
      OSError: a part of a disk cannot be read, or a part is gone.
      MachineError: the store does not give a part.
    """
    with ThreadPoolExecutor(_READS, "s2s-parts") as pool:
        return list(pool.map(_read, paths))


def read_rows(path: Place) -> pa.Table:
    """All of a part.

    Raises:
      UserError: it is damaged.
      OSError: a part of a disk cannot be read, or a part is gone.
      MachineError: the store does not give it.
    """
    try:
        with file_systems.opened(path) as file:
            return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        # Parquet also raises errors like those of the system, but without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"--output: {path} is damaged ({reason}); remove this file and start the same command "
            f"again, which makes it again"
        ) from error


def _read(path: Place) -> Said | None:
    try:
        with file_systems.opened(path) as file:
            found = pq.read_metadata(file)
    except pa.ArrowInvalid:
        return None
    return said_by(found.metadata, found.num_rows)
