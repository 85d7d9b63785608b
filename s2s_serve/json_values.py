"""Ids and values of columns as JSON has them, and back.

Times are text as in ISO 8601. Bytes are their text in UTF-8; bytes that are not UTF-8, or that begin
with a backslash and x, are written as a backslash, x and hexadecimal digits.
"""

import datetime
import re
from typing import Any

import pyarrow as pa

_HEX = re.compile(r"\\x((?:[0-9a-f]{2})+)")


def to_json(value: Any) -> Any:
    r"""A value of Arrow in Python as JSON can hold it; other values than bytes and times as they are.

    Examples:
      >>> to_json(b"item 11"), to_json(b"\xff\x00"), to_json(datetime.datetime(2026, 1, 31, 12))
      ('item 11', '\\xff00', '2026-01-31T12:00:00')
    """
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return f"\\x{value.hex()}"
        return f"\\x{value.hex()}" if text.startswith("\\x") else text
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value


def is_plain(data_type: pa.DataType) -> bool:
    """Whether all values of a type are in JSON as they are in Python."""
    return not (
        pa.types.is_binary(data_type)
        or pa.types.is_large_binary(data_type)
        or pa.types.is_temporal(data_type)
    )


def from_json(value: Any, data_type: pa.DataType) -> Any:
    r"""The value of an Arrow type that `to_json` wrote; other values than text as they are.

    Times may be any text of ISO 8601. A time without an offset is in UTC.

    Args:
      value: what was in JSON.
      data_type: the type of the id or of the column.

    Raises:
      ValueError: a time is not as in ISO 8601.

    Examples:
      >>> from_json("\\xff00", pa.binary()), from_json("2026-01-31", pa.date32())
      (b'\xff\x00', datetime.date(2026, 1, 31))
    """
    if not isinstance(value, str):
        return value
    if pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type):
        written = _HEX.fullmatch(value)
        return bytes.fromhex(written[1]) if written else value.encode()
    if pa.types.is_time(data_type):
        return datetime.time.fromisoformat(value)
    if pa.types.is_date(data_type):
        return datetime.datetime.fromisoformat(value).date()
    if pa.types.is_timestamp(data_type):
        return _in_utc(datetime.datetime.fromisoformat(value), data_type.tz is not None)
    return value


def _in_utc(time: datetime.datetime, aware: bool) -> datetime.datetime:
    """A time in UTC, with its zone or without."""
    if time.tzinfo is None:
        return time.replace(tzinfo=datetime.UTC) if aware else time
    try:
        time = time.astimezone(datetime.UTC)
    except OverflowError as error:
        raise ValueError(f"{time} is not in the years 1 to 9999 in UTC") from error
    return time if aware else time.replace(tzinfo=None)
