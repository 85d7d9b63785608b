"""Selects the columns of event logs, and names the columns of the resulting log."""

import dataclasses
from collections.abc import Mapping, Sequence

from s2s_jax.errors import UserError

# Columns that every log has, and the flags that name their source.
_ALWAYS = {"user_id": "--user_column", "timestamp": "--time_column"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A list column of the log.

    Attributes:
      name: the name in the log.
      column: the name in the source.
      separator: the separator of several ids in a text; None: a text is one id.
      prefix: a prefix for every id.
      ids: the ids to write for each source id; None: the source id itself. Source ids that are not
        listed are left out.
    """

    name: str
    column: str
    separator: str | None = None
    prefix: str = ""
    ids: Mapping[str, Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The columns to take from the sources.

    Attributes:
      user: the column of user ids.
      time: the column of times; None: events are in the order of the lines.
      time_formats: the formats of times, as for `strptime`; empty: those that DuckDB recognizes.
      features: the features.
      missing: the texts that mean a missing value, besides the empty text.
    """

    user: str
    time: str | None
    features: tuple[Feature, ...]
    missing: tuple[str, ...] = ()
    time_formats: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """The flag that names each column of the source."""
        flags = dict.fromkeys((feature.column for feature in self.features), "--features")
        first = {self.user: "--user_column"}
        if self.time is not None:
            first[self.time] = "--time_column"
        return first | flags | first


def parse(features: Sequence[str], bags: Sequence[str], bag_separator: str) -> tuple[Feature, ...]:
    """Parses the features of the command line.

    Args:
      features: `NAME=COLUMN`, or `NAME` for the column of that name.
      bags: the names of features whose texts contain several ids.
      bag_separator: the separator of these ids.

    Raises:
      UserError: a name is used twice or reserved, or a bag is not the name of a feature.
    """
    parsed: dict[str, Feature] = {}
    for text in features:
        name, equals, column = text.partition("=")
        if not name or (equals and not column):
            raise UserError(f"--features: expected NAME=COLUMN or NAME, found {text}")
        if name in _ALWAYS:
            raise UserError(
                f"--features: {name} is always written, from the column that {_ALWAYS[name]} names; "
                f"leave it out here"
            )
        if name in parsed:
            raise UserError(f"--features: {name} is given twice; give each feature another name")
        separator = bag_separator if name in bags else None
        parsed[name] = Feature(name=name, column=column or name, separator=separator)
    for name in bags:
        if name not in parsed:
            raise UserError(
                f"--bags: expected names of --features ({', '.join(parsed) or 'none'}), found {name}"
            )
    if bags and not bag_separator:
        raise UserError("--bag_separator: expected at least one character, found none")
    return tuple(parsed.values())
