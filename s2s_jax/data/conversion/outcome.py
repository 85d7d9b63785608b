"""What a conversion wrote, and what it left out."""

import dataclasses

from s2s_serve.storage.address import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """The outcome of a conversion.

    Attributes:
      paths: the files, `part-0.orc` first.
      rows: the number of rows written, one per user.
      events: the number of events written.
      skipped: descriptions of what was left out; empty if nothing was.
      bags: the largest bag of each column that has bags of several ids.
      notes: notes about the files that were read, a sentence each.
    """

    paths: list[Place]
    rows: int
    events: int
    skipped: tuple[str, ...]
    bags: dict[str, int]
    notes: tuple[str, ...] = ()


def counted(number: int, noun: str, rest: str = "") -> str:
    """A number of things, as the summary says it: `1 user`, `2,000 events without uid`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'} {rest}".rstrip()
