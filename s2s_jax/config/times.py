"""Points in time, as written in a configuration."""

import datetime
import re
from fractions import Fraction

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
# The beginning of the year 10,000 in seconds: no time of a log is later.
_YEAR_10000 = 253_402_300_800


def seconds_of(text: str) -> Fraction:
    """Parses "2000-12-01", "2000-12-01T12:00" or a number of seconds as seconds since 1970.

    Dates and times are in UTC unless they have an offset. The result is exact; a float would round
    nanoseconds.

    Raises:
      ValueError: the text is not a time.

    Examples:
      >>> seconds_of("1970-01-02") == seconds_of("1970-01-02T01:00+01:00") == seconds_of("86400")
      True
    """
    if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII):
        return Fraction(text)
    time = datetime.datetime.fromisoformat(text)
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    return Fraction((time - _EPOCH) // _MICROSECOND, 10**6)


def meant_instead(text: str) -> str | None:
    """What was most likely meant instead of a number of seconds; None if nothing else is likely.

    Args:
      text: a text that `seconds_of` accepts.
    """
    if re.fullmatch(r"(19|20)\d{6}", text) and _is_date(date := _with_dashes(text)):
        return (
            f"{date} if it is a date (a number is seconds since 1970, so this is on "
            f"{date_text(int(text))}; write {text}.0 if you mean that)"
        )
    if abs(seconds_of(text)) >= _YEAR_10000:
        return (
            "seconds since 1970 before the year 10,000 (divide milliseconds by 1,000; a date has "
            "dashes, as in 2000-12-01)"
        )
    return None


def _with_dashes(digits: str) -> str:
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:]}"


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def date_text(seconds: int) -> str:
    """The date, in UTC, of a time in seconds since 1970; for far away times, only the year."""
    if 0 <= seconds + 62_135_596_800 < _YEAR_10000 + 62_135_596_800:
        return (_EPOCH + datetime.timedelta(seconds=seconds)).date().isoformat()
    # The mean length of a year is exact enough here.
    return f"the year {1970 + seconds // 31_556_952:,}"
