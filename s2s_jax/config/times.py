"""Points in time as a configuration spells them."""

import datetime
import re
from fractions import Fraction

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


def seconds_of(text: str) -> Fraction:
    """Seconds since 1970 of "2000-12-01", "2000-12-01T12:00" or a number of seconds.

    Dates and times are in UTC unless they say otherwise. Exact: a float would move nanoseconds.

    Raises:
      ValueError: it is no time.
    """
    if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII):
        return Fraction(text)
    time = datetime.datetime.fromisoformat(text)
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    return Fraction((time - _EPOCH) // _MICROSECOND, 10**6)
