"""The options of `s2s convert`, and which of them fit together."""

import codecs
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from s2s_jax.data.conversion.reading.sources import Layout
from s2s_jax.errors import UserError
from s2s_jax.storage.place_option import PlaceOption

_CSV, _EVENTS = ("csv",), ("csv", "parquet", "jsonl", "table")
# The layouts for which each flag has a meaning; other flags apply to all layouts.
_APPLIES = {
    **dict.fromkeys(("columns", "delimiter", "quote", "escape", "encoding"), _CSV),
    **dict.fromkeys(
        (
            "user_column",
            "time_column",
            "time_format",
            "features",
            "bags",
            "bag_separator",
            "missing",
        ),
        _EVENTS,
    ),
    "grouped": ("parquet", "jsonl", "table"),
    **dict.fromkeys(("min_events", "memory_limit", "temp_dir"), (*_EVENTS, "movielens")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Reads CSV, Parquet, JSON and MovieLens files, with one event per row or lists of events. Writes
    ORC files with one row per user, whose events are sorted by time. ORC files are rewritten in stripes
    of a good size for training.
    """

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """Files, directories and glob patterns, on this machine or in stores. Events with equal times keep
    the order of the files"""
    output: PlaceOption
    """Directory for part-0.orc, part-1.orc …, on this machine or in a store; created if it does not
    exist"""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """What reads and sorts the events. duckdb: this machine; spark: the cluster that Spark is configured
    for, or a local Spark. Both write the same log"""
    format: Literal["auto", "csv", "parquet", "jsonl", "movielens", "orc", "table"] = "auto"
    """Format of the sources. auto: found from the file names; movielens: a directory with ratings.dat or
    ratings.csv, and movies.dat or movies.csv for genres (written as cate_id); orc: a log to rewrite with
    all its columns and rows; table: with --engine spark, names of tables instead of files"""
    user_column: str = "user_id"
    """Column of user ids, which is written as user_id"""
    time_column: str = "timestamp"
    """Column of times, which is written as timestamp. Numbers lose their fractions. Dates and times
    become seconds since 1970; they are in UTC unless they name a time zone. none: events are in the
    order of the lines, and their positions are the times"""
    time_format: tuple[str, ...] = ()
    """Formats of the times, as for strptime, such as '%d/%m/%Y %H:%M' or '%Y%m%d'; the first that fits
    is used. number: read numbers as numbers, even if they look like dates"""
    features: tuple[str, ...] = ("item_id", "cate_id", "behavior_id")
    """Columns of features. NAME=COLUMN: write the column COLUMN under the name NAME"""
    columns: tuple[str, ...] = ()
    """Names of all columns of CSV files, in order, if the first line does not have the names"""
    delimiter: str | None = None
    """Delimiter of CSV files, up to 4 characters; None: a tab (\\t) in .tsv files, otherwise a comma"""
    quote: str = '"'
    """Quotation mark around texts of CSV files that contain delimiters; '': nothing is quoted"""
    escape: str = ""
    """Character before a quotation mark inside quotes, such as \\; '': such marks are doubled"""
    encoding: str | None = None
    """Encoding of CSV files, such as latin-1 or cp1252; None: UTF-8, or UTF-16 with its mark"""
    bags: tuple[str, ...] = ()
    """Names of features whose texts contain several ids"""
    bag_separator: str = "|"
    """Separator of the ids in the texts of --bags"""
    missing: tuple[str, ...] = ()
    """Texts that mean a missing value, such as NULL or \\N; the empty text always does"""
    grouped: bool = False
    """Each row has a user and lists with one entry per event, in order. Not needed if the times are
    lists; without it, other lists are several ids of one event"""
    merge: bool = False
    """For ORC files: read events, or lists of events, and merge all rows of a user into one row, with
    events sorted by time. The columns of users, times and features are found by their names and types,
    unless they are given"""
    min_events: int = 1
    """Minimum number of events of a user. Users with fewer are left out and counted"""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about lines (or ORC stripes) that cannot be read, and events without a user or a time.
    stop: stop at the first; skip: leave them out and count them"""
    events_per_file: int = 10_000_000
    """Number of events after which a new file begins, with the next user"""
    overwrite: bool = False
    """Replace existing part-N.orc files in the directory, once everything is converted"""
    memory_limit: str | None = None
    """Memory for sorting, such as 4GB; None: 80% of the machine's memory, or what Spark is configured to
    take"""
    temp_dir: Path | None = None
    """Directory for temporary files, which take as much space as one or two copies of all events, and
    one more if these are in a store. None: TMPDIR for what is in stores, else --output"""


def check_numbers(settings: Settings) -> None:
    """Refuses numbers that are too small.

    Raises:
      UserError: names the flag.
    """
    for name in ("min_events", "events_per_file"):
        found = getattr(settings, name)
        if found < 1:
            raise UserError(f"--{name}: expected at least 1, found {found}")


def check_encoding(encoding: str | None) -> None:
    """Refuses encodings that Python does not know.

    Raises:
      UserError: the encoding is unknown.
    """
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(
            f"--encoding: expected an encoding that Python knows, such as latin-1, found {encoding}"
        ) from error


def check_flags(settings: Settings, layout: Layout) -> None:
    """Refuses flags that have no effect for sources of a layout.

    Raises:
      UserError: names the flag.
    """
    for field in dataclasses.fields(settings):
        if field.name not in _APPLIES or layout in _APPLIES[field.name]:
            continue
        if getattr(settings, field.name) != field.default:
            raise UserError(
                f"--{field.name}: has no effect for sources of format {layout}; leave it out, or choose "
                f"another --format"
            )
