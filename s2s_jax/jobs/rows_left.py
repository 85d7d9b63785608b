"""Tells the user how far `recommend` is."""

import sys
import time

# Seconds between two messages.
_EVERY = 10.0


class RowsLeft:
    """Counts the rows that are done, and sometimes prints them with the time that is left."""

    def __init__(self, rows: int, name: str):
        """Starts the clock.

        Args:
          rows: the number of rows to do.
          name: the name of this process in messages; "" if it is the only one.
        """
        self._rows, self._done = rows, 0
        self._name = f"{name}: " if name else ""
        self._begun = self._said = time.monotonic()

    def add(self, rows: int) -> None:
        """Counts rows that are done."""
        self._done += rows
        now = time.monotonic()
        if now - self._said < _EVERY or self._done >= self._rows:
            return
        self._said = now
        per_second = self._done / (now - self._begun)
        minutes, seconds = divmod(round((self._rows - self._done) / per_second), 60)
        print(
            f"{self._name}{self._done:,} of {self._rows:,} rows, {per_second:,.0f} a second, "
            f"{minutes}:{seconds:02} left",
            file=sys.stderr,
            flush=True,
        )
