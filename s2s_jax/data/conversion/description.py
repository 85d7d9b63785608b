"""What a conversion does with its sources. Every engine carries out the same description."""

import dataclasses

from s2s_jax.data.conversion.reading.sources import Layout
from s2s_jax.data.conversion.selection import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsvFlags:
    """The flags for CSV files; see `Settings` for their meaning."""

    columns: tuple[str, ...]
    delimiter: str | None
    quote: str
    escape: str
    encoding: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is read from the sources, and what is left out.

    Attributes:
      layout: the layout of all sources.
      selection: the columns of an event.
      csv: how the lines of CSV files are split.
      grouped: whether every row has lists of events, even if its times are no list.
      skip: whether lines that cannot be read, and events without a user or a time, are left out and
        counted; otherwise they are errors.
      min_events: users with fewer events are left out.
    """

    layout: Layout
    selection: Selection
    csv: CsvFlags
    grouped: bool
    skip: bool
    min_events: int
