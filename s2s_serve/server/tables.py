"""Histories and answers as streams of Arrow.

What comes from outside may be damaged or hostile: it is refused if it has an unusual type, refers
outside of its bytes, or would take more memory than it has bytes.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_serve.server.protocol import Recommended

_DICTIONARY, _BATCH = 2, 3


class UnfitError(Exception):
    """A stream that is refused, with one sentence."""


def read(body: bytes, max_rows: int) -> pa.Table:
    """The table of a stream.

    Args:
      body: the bytes of the stream.
      max_rows: most rows.

    Raises:
      UnfitError: the stream is damaged, compressed, or has other columns than lists.
    """
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            _check_schema(reader.schema)
            batches, rows = [], 0
            for batch in reader:
                rows += batch.num_rows
                if rows > max_rows:
                    raise UnfitError(
                        f"body: expected at most {max_rows} rows, found {rows} or more"
                    )
                batch.validate(full=True)
                for column in batch.columns:
                    _check_lengths(column, len(body))
                batches.append(batch)
            return pa.Table.from_batches(batches, reader.schema)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        IndexError,
        struct.error,
    ) as error:
        reason = " ".join(str(error).split())[:150]
        raise UnfitError(
            f"body: expected a stream of Arrow, found other bytes ({reason})"
        ) from None


def longest(column: pa.ChunkedArray) -> int:
    """The number of entries of the longest list of a column."""
    if pa.types.is_null(column.type):
        return 0
    found = pc.max(pc.list_value_length(column)).as_py()
    return 0 if found is None else found


def _check_schema(given: pa.Schema) -> None:
    for field in given:
        inner = _inner(field.type)
        # A bag has several ids for an event.
        leaf = None if inner is None else _inner(inner) or inner
        if not pa.types.is_null(field.type) and (leaf is None or not _is_id(leaf)):
            kind = str(field.type)[:80]
            raise UnfitError(
                f"{field.name[:80]}: expected lists of ids, or of lists of ids, found {kind}"
            )
    for name in given.names:
        if given.names.count(name) > 1:
            raise UnfitError(f"{name[:80]}: expected one column of this name, found several")
    if not given.names:
        raise UnfitError("body: expected columns, found none")


def _check_lengths(column: pa.Array, most: int) -> None:
    """Refuses more entries than bytes: nulls and empty lists may take none, but will take memory."""
    while _inner(column.type) is not None:
        column = column.values
        if len(column) > most:
            raise UnfitError(
                f"body: expected at most an entry for each of its {most} bytes, found {len(column)}"
            )


def _inner(kind: pa.DataType) -> pa.DataType | None:
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return kind.value_type if is_list else None


def _is_id(kind: pa.DataType) -> bool:
    return (
        # Lists without a single id.
        pa.types.is_null(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_timestamp(kind)
        or pa.types.is_date(kind)
    )


# ------------------------------------------------------------------------------- compressed bodies


def _refuse_compressed(body: bytes) -> None:
    """Refuses streams with compressed buffers, of which few bytes could fill the memory.

    The messages of the stream are FlatBuffers (Arrow's format/Message.fbs), whose tables begin with the
    distance to a list of the places of their fields.
    """
    place = 0
    while place + 4 <= len(body):
        (size,) = struct.unpack_from("<I", body, place)
        place += 4
        if size == 0xFFFFFFFF:
            (size,) = struct.unpack_from("<I", body, place)
            place += 4
        if size == 0:
            return
        message = memoryview(body)[place : place + size]
        root = struct.unpack_from("<I", message)[0]
        kind, header = _field(message, root, 1), _field(message, root, 2)
        length = _field(message, root, 3)
        if kind and header and message[kind] in (_DICTIONARY, _BATCH):
            if message[kind] == _DICTIONARY:
                raise UnfitError("body: expected a stream without dictionaries, found one")
            if _field(message, header + struct.unpack_from("<I", message, header)[0], 3):
                raise UnfitError(
                    "body: expected a stream without compression, found compressed buffers"
                )
        content = struct.unpack_from("<q", message, length)[0] if length else 0
        if content < 0:
            raise UnfitError("body: expected a stream of Arrow, found a negative length")
        place += size + content


def _field(message: memoryview, table: int, number: int) -> int:
    """The place of a field of a table; 0: the table does not have it."""
    fields = table - struct.unpack_from("<i", message, table)[0]
    if fields < 0:
        raise UnfitError("body: expected a stream of Arrow, found other bytes")
    size = struct.unpack_from("<H", message, fields)[0]
    at = 4 + 2 * number
    offset = struct.unpack_from("<H", message, fields + at)[0] if at + 2 <= size else 0
    return table + offset if offset else 0


# ------------------------------------------------------------------------------- answers


def recommendations(results: Sequence[Recommended], version: int, item: pa.DataType) -> bytes:
    """Answers as a stream: a row for each history, and the version in the metadata.

    Args:
      results: one for each history.
      version: the version that answered.
      item: the type of ids.
    """
    columns = {
        "items": pa.array([list(each.items) for each in results], pa.list_(item)),
        "scores": pa.array([list(each.scores) for each in results], pa.list_(pa.float32())),
        "unknown": pa.array([each.unknown for each in results], pa.int32()),
        "by": pa.array([each.by for each in results], pa.string()),
    }
    return _stream(pa.table(columns), version)


def vectors(vectors_NE: np.ndarray, version: int) -> bytes:
    """Vectors as a stream: a row for each history, and the version in the metadata."""
    flat = pa.array(np.ascontiguousarray(vectors_NE, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors_NE.shape[1])
    return _stream(pa.table({"vector": column}), version)


def _stream(table: pa.Table, version: int) -> bytes:
    table = table.replace_schema_metadata({"version": str(version)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
