"""Which columns of event logs become which columns of the log."""

import dataclasses
from collections.abc import Mapping, Sequence

from s2s_jax.errors import UserError

# Columns that every log has, and the flags that name their source.
_ALWAYS = {"user_id": "--user_column", "timestamp": "--time_column"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A list column of the log.

    Attributes:
      name: its name in the log.
      column: its name in the source.
      separator: splits a text into several ids; None: a text is one id.
      prefix: put before every id.
      ids: for each source id, the ids to write; None: the id itself. Source ids that are not listed are
      left out.
    """

    name: str
    column: str
    separator: str | None = None
    prefix: str = ""
    ids: Mapping[str, Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What is taken from the sources.

    Attributes:
      user: column of the users.
      time: column of the times; None: events are in the order of the lines.
      time_formats: formats of the times, as for `strptime`; empty: those that DuckDB recognises.
      features: the features.
      missing: texts that mean that there is no value, besides the empty one.
    """

    user: str
    time: str | None
    features: tuple[Feature, ...]
    missing: tuple[str, ...] = ()
    time_formats: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """The flag that asks for each column of the source."""
        flags = dict.fromkeys((feature.column for feature in self.features), "--features")
        first = {self.user: "--user_column"}
        if self.time is not None:
            first[self.time] = "--time_column"
        return first | flags | first


def parse(features: Sequence[str], bags: Sequence[str], bag_separator: str) -> tuple[Feature, ...]:
    """Features as the command line gives them.

    Args:
      features: `NAME=COLUMN`, or `NAME` for the column of that name.
      bags: names of those whose texts hold several ids.
      bag_separator: between these.

    Raises:
      UserError: a name is used twice or reserved, or a bag names no feature.
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
