"""Reads ORC files stripe by stripe as Arrow record batches; errors name file, stripe and column."""

import bisect
import contextlib
import dataclasses
import errno
import hashlib
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.orc

from s2s_jax.data.logs.source import Source, open_source
from s2s_jax.errors import MachineError, UserError
from s2s_jax.storage.ranges import StoreError
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.file_systems import open_file, unreachable, version_of

# What pyarrow raises for broken files. ORC has no checksums, so damaged uncompressed data may go
# unnoticed.
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)
# Errors of the operating system that are not caused by the file, and their remedies.
_REMEDY_OF_SYSTEM = {
    errno.EACCES: "let this user read it",
    errno.EPERM: "let this user read it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "give the job more memory",
    errno.ENOTCONN: "mount its file system again",
    errno.ESTALE: "mount its file system again",
    errno.ETIMEDOUT: "check that its file system responds",
    errno.EHOSTDOWN: "check that its file system responds",
    errno.EHOSTUNREACH: "check that its file system responds",
}
# No machine has this much memory; a file that asks for it is damaged.
_MOST_MEMORY = 2**46

# The sample that distinguishes files with the same footer: this many bytes in total, read at this many
# places. There are few places, since each is a request to a remote file system.
_SAMPLE_BYTES, _SAMPLES = 2**18, 4


@dataclasses.dataclass(frozen=True)
class OrcFile:
    """The contents of an ORC file's footer.

    Attributes:
      path: the file.
      size: its size in bytes.
      schema: names and types of its columns.
      stripe_rows: rows of each stripe.
      positions: the most entries of any list column, according to the footer's statistics; null entries
        and columns without statistics do not count.
      fingerprint: hash of the footer, which has places, sizes and statistics of all stripes. It may stay
        the same if only the order of events changes.
      encrypted: columns that are fully or partly encrypted. Reading them gives their masks (for example
        nulls, or hashes of the values) instead of the original values.
      sample: hash of bytes from all over the file, or of the whole file if it is small. It is the same
        for copies of the file.
      modified_ns: time of the last modification, in nanoseconds since 1970; 0 in a store.
      version: what a store says that changes with every change of the file; "" if nothing.
      stripe_ranges: the first byte of each stripe, and the one after its last.
      compression: how its bytes are compressed, in the words of pyarrow.
    """

    path: Place
    size: int
    schema: pa.Schema
    stripe_rows: tuple[int, ...]
    fingerprint: str
    positions: int = 0
    encrypted: frozenset[str] = frozenset()
    sample: str = ""
    modified_ns: int = 0
    version: str = ""
    stripe_ranges: tuple[tuple[int, int], ...] = ()
    compression: str = "-"

    @property
    def rows(self) -> int:
        """Number of rows of the file."""
        return sum(self.stripe_rows)


def read_footer(path: Place) -> OrcFile:
    """Reads the footer of `path`.

    A file of 0 bytes counts as a file without rows: Hive and others write such files for tasks without
    rows.

    Raises:
      UserError: it is not a readable ORC file.
      MachineError: it cannot be read on this machine.
    """
    with _open(path) as source:
        if source.size == 0:
            return OrcFile(path, 0, pa.schema([]), (), hashlib.sha256(b"").hexdigest()[:16])
        try:
            reader = pyarrow.orc.ORCFile(source.file)
            schema = reader.schema
            # Decodes the names now, since pyarrow does so only on first use.
            _ = schema.names, str(schema)
            tail = reader.reader.serialized_file_tail()
            footer = _last_bytes(tail, 2)
            stripe_rows = tuple(_stripe_rows(footer))
            stripe_ranges = tuple(_stripe_ranges(footer))
            positions = _positions(footer, schema)
            numbers = _encrypted_columns(footer)
            encrypted = frozenset(n for i, n in enumerate(schema.names) if i in numbers)
            nrows, nstripes = reader.nrows, reader.nstripes
            compression = _compression(reader)
            sample = _sample(source)
        except _READ_ERRORS as error:
            _raise_if_machine_error(error, f"{path} cannot be read")
            raise UserError(f"{path}: expected an ORC file, but {_reason(error)}") from error
    if sum(stripe_rows) != nrows or len(stripe_rows) != nstripes:
        raise UserError(
            f"{path}: its footer is damaged: {len(stripe_rows)} stripes with {sum(stripe_rows)} "
            f"rows, expected {nstripes} with {nrows}; rewrite the file"
        )
    fingerprint = hashlib.sha256(tail).hexdigest()[:16]
    return OrcFile(
        path,
        source.size,
        schema,
        stripe_rows,
        fingerprint,
        positions,
        encrypted,
        sample,
        source.modified_ns,
        source.version,
        stripe_ranges,
        compression,
    )


def _compression(reader: pyarrow.orc.ORCFile) -> str:
    try:
        return str(reader.compression).lower()
    except pa.ArrowException:
        # A kind that pyarrow has no name for, though it can read it.
        return "-"


def _sample(source: Source) -> str:
    """Hash of bytes at the start, in between and at the end; of the whole file if it is small."""
    size, chunk = source.size, _SAMPLE_BYTES // _SAMPLES
    ranges = [(0, size)]
    if size > _SAMPLE_BYTES:
        begins = [(size - chunk) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
        ranges = [(begin, begin + chunk) for begin in begins]
    digest = hashlib.sha256()
    for data in source.read(ranges):
        digest.update(data)
    return digest.hexdigest()[:16]


def read_stripe(file: OrcFile, stripe: int, columns: Sequence[str]) -> pa.RecordBatch:
    """Reads some columns of one stripe.

    Args:
      file: the file, as returned by `read_footer`.
      stripe: index of the stripe.
      columns: names of top-level columns; the file must have them.

    Raises:
      UserError: the stripe cannot be read.
      MachineError: it cannot be read on this machine, or has changed since the footer was read.
    """
    # Of a file with many other columns, only the ranges that are read are requested.
    whole = 2 * len(columns) >= len(file.schema)
    with _open(file.path, file.stripe_ranges[stripe] if whole else None) as source:
        _check_same(file, source.size, source.version)
        try:
            batch = pyarrow.orc.ORCFile(source.file).read_stripe(stripe, columns=list(columns))
        except _READ_ERRORS as error:
            _raise_if_machine_error(error, f"{file.path}: stripe {stripe} cannot be read")
            _ask_whether_same(file)
            raise UserError(
                f"{file.path}: stripe {stripe} cannot be read ({_reason(error)}); "
                f"rewrite the file or take it out of io.data_paths"
            ) from error
    _ask_whether_same(file)
    if batch.num_rows != file.stripe_rows[stripe]:
        raise MachineError(
            f"{file.path}: stripe {stripe} has {batch.num_rows} rows, expected "
            f"{file.stripe_rows[stripe]} as in its footer; do not change files while they are read"
        )
    for name in columns:
        if name not in batch.schema.names:
            raise UserError(
                f"{file.path}: stripe {stripe} has no column {name}, perhaps because a field inside "
                f"another column has the same name; give the column a name without a dot"
            )
    return batch


def _ask_whether_same(file: OrcFile) -> None:
    """Checks a file of a store after it was read, because requests of ranges ask for no version."""
    if isinstance(file.path, StorePath):
        try:
            with open_file(file.path) as now:
                size, version = now.size(), version_of(now)
        except _READ_ERRORS as error:
            raise unreachable(str(file.path), error) from error
        _check_same(file, size, version)


def _check_same(file: OrcFile, size: int, version: str) -> None:
    in_store = isinstance(file.path, StorePath)
    if in_store and (size, version) != (file.size, file.version):
        # Not a part that may be skipped: the footer, the order and the counts are of another file.
        raise MachineError(
            f"{file.path}: it has changed since its footer was read; do not change files while they "
            f"are read"
        )


@contextlib.contextmanager
def _open(path: Place, ahead: tuple[int, int] | None = None) -> Iterator[Source]:
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open_source(path, ahead))
        except _READ_ERRORS as error:
            _raise_if_machine_error(error, f"{path}: cannot be opened")
            if isinstance(path, StorePath) and isinstance(error, FileNotFoundError):
                raise MachineError(
                    f"{path}: it was removed since the log was listed; do not change files while they "
                    f"are read"
                ) from error
            if isinstance(path, StorePath):
                raise unreachable(str(path), error) from error
            raise UserError(f"{path}: cannot be opened ({_reason(error)})") from error
        yield source


def _raise_if_machine_error(error: BaseException, what: str) -> None:
    """Raises `MachineError` if the cause is this machine, or a store, and not the file."""
    reason = _reason(error)
    if isinstance(error, StoreError):
        raise unreachable(what, error) from error
    zone = re.search(r"Time zone file (\S*?)([A-Z][\w+-]*(?:/[\w+-]+)*) does not exist", reason)
    if zone is not None:
        raise MachineError(
            f"{what}: this machine has no time zone {zone[2]} (in {zone[1] or 'its database'}), which "
            f"ORC timestamps need; install tzdata (and tzdata-legacy for old names), or set TZDIR"
        ) from error
    if isinstance(error, MemoryError):
        asked = re.search(r"size (\d+)", reason)
        if asked is None or int(asked[1]) < _MOST_MEMORY:
            raise MachineError(
                f"{what}: too little memory ({reason}); give the job more memory, lower io.thread_num, "
                f"or rewrite the log in smaller stripes"
            ) from error
    number = error.errno if isinstance(error, OSError) else None
    code = re.search(r"\[errno (\d+)\]", reason, re.IGNORECASE)
    number = int(code[1]) if number is None and code is not None else number
    if number in _REMEDY_OF_SYSTEM:
        raise MachineError(f"{what} ({reason}); {_REMEDY_OF_SYSTEM[number]}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------ parsing the footer
#
# pyarrow gives neither the rows of each stripe nor the encrypted columns, but it gives the serialized
# FileTail message (orc_proto.proto), from which these fields are read:
#   FileTail: 2 footer
#   Footer: 3 stripes, 4 types, 7 statistics (of each type), 10 encryption
#   ColumnStatistics: 1 numberOfValues
#   StripeInformation: 1 offset, 2 indexLength, 3 dataLength, 4 footerLength, 5 numberOfRows
#   Type: 2 subtypes (those of the first type, the root, are the types of the columns)
#   Encryption: 3 variants
#   EncryptionVariant: 1 root (this type and all types inside it are encrypted)


def _stripe_ranges(footer: bytes) -> Iterator[tuple[int, int]]:
    for number, stripe in _fields(footer):
        if number == 3 and isinstance(stripe, bytes):
            begin, *lengths = (_last_number(stripe, field) for field in (1, 2, 3, 4))
            yield begin, begin + sum(lengths)


def _stripe_rows(footer: bytes) -> Iterator[int]:
    for number, stripe in _fields(footer):
        if number == 3 and isinstance(stripe, bytes):
            yield _last_number(stripe, 5)


def _column_types(footer: bytes) -> list[int]:
    """The type number of each column. Types are numbered depth first, so nested types follow it."""
    types = [value for number, value in _fields(footer) if number == 4 and isinstance(value, bytes)]
    return _numbers(types[0], 2) if types else []


def _positions(footer: bytes, schema: pa.Schema) -> int:
    counts = [
        _last_number(value, 1)
        for number, value in _fields(footer)
        if number == 7 and isinstance(value, bytes)
    ]
    entries = [
        counts[first + 1]
        for first, column_type in zip(_column_types(footer), schema.types, strict=False)
        if pa.types.is_list(column_type) and first + 1 < len(counts)
    ]
    return max(entries, default=0)


def _encrypted_columns(footer: bytes) -> set[int]:
    """Numbers of the columns that are fully or partly encrypted."""
    roots = [
        _last_number(variant, 1)
        for number, encryption in _fields(footer)
        if number == 10 and isinstance(encryption, bytes)
        for number_, variant in _fields(encryption)
        if number_ == 3 and isinstance(variant, bytes)
    ]
    if not roots:
        return set()
    firsts = _column_types(footer)
    if 0 in roots:
        return set(range(len(firsts)))
    return {bisect.bisect_right(firsts, root) - 1 for root in roots}


def _last_bytes(message: bytes, field: int) -> bytes:
    found = [value for number, value in _fields(message) if number == field]
    return found[-1] if found and isinstance(found[-1], bytes) else b""


def _last_number(message: bytes, field: int) -> int:
    """An optional number; 0 if it is missing."""
    return (_numbers(message, field) or [0])[-1]


def _numbers(message: bytes, field: int) -> list[int]:
    """The values of a repeated number, either packed or one by one."""
    numbers = []
    for number, value in _fields(message):
        if number == field and isinstance(value, bytes):
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                numbers.append(one)
        elif number == field:
            numbers.append(value)
    return numbers


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a serialized protocol buffer message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        else:
            sizes = {1: 8, 5: 4}
            if wire_type not in sizes:
                raise ValueError(f"its footer is damaged (wire type {wire_type})")
            size = sizes[wire_type]
        if at + size > len(message):
            raise ValueError("its footer is damaged (a field ends past the end)")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("its footer is damaged (a number ends past the end)")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
