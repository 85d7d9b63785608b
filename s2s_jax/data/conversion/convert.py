"""Converts event logs to logs for training: `s2s convert FILE_OR_DIR… --output DIR`.

Sources are CSV, Parquet, JSON or MovieLens files, with one event per row or lists of events. The
resulting ORC log has one row per user: `user_id` and, for `timestamp` and each feature, a list over the
user's events, oldest first. Logs that are already ORC are rewritten with the same columns and rows, in
stripes of a good size for training.
"""

import codecs
import contextlib
import dataclasses
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from s2s_jax.config import refuse_addresses, refuse_addresses_in
from s2s_jax.data.conversion import merging, times
from s2s_jax.data.conversion.grouping import Grouping
from s2s_jax.data.conversion.reading import movielens, sources, sql, text_files
from s2s_jax.data.conversion.reading.sources import Layout
from s2s_jax.data.conversion.reading.text_files import CsvFormat, default_delimiter, read_header
from s2s_jax.data.conversion.selection import Selection, parse
from s2s_jax.data.logs import orc, orc_writer
from s2s_jax.errors import MachineError, UserError

if TYPE_CHECKING:
    from s2s_jax.data.conversion.events import EventStore

_CSV, _EVENTS = ("csv",), ("csv", "parquet", "jsonl")
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
    **dict.fromkeys(("min_events", "memory_limit", "temp_dir"), (*_EVENTS, "movielens")),
}
_ONE_EVENT = (
    "warning: every user has one event, with several ids; if these ids are the user's events in order, "
    "the times must be a list, too"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Reads CSV, Parquet, JSON and MovieLens files, with one event per row or lists of events. Writes
    ORC files with one row per user, whose events are sorted by time. ORC files are rewritten in stripes
    of a good size for training.
    """

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """Files, directories and glob patterns. Events with equal times keep the order of the files"""
    output: Path
    """Directory for part-0.orc, part-1.orc …; created if it does not exist"""
    format: Literal["auto", "csv", "parquet", "jsonl", "movielens", "orc"] = "auto"
    """Format of the sources. auto: found from the file names; movielens: a directory with ratings.dat or
    ratings.csv, and movies.dat or movies.csv for genres (written as cate_id); orc: a log to rewrite with
    all its columns and rows"""
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
    merge: bool = False
    """For ORC logs: merge all rows of a user into one row, with events sorted by time. The columns of
    users, times and features are found by their names and types, unless they are given"""
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
    """Memory for sorting, such as 4GB; None: 80% of the machine's memory"""
    temp_dir: Path | None = None
    """Directory for temporary files, which take as much space as one or two copies of all events; None:
    --output"""


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

    paths: list[Path]
    rows: int
    events: int
    skipped: tuple[str, ...]
    bags: dict[str, int]
    notes: tuple[str, ...] = ()


def convert(settings: Settings) -> Converted:
    """Converts event logs, and writes the resulting log.

    Columns of integers, and of texts that are all int64 numbers, are written as int64; others as
    strings. Rows are sorted by user id.

    Raises:
      UserError: a setting is impossible, a source cannot be read, or the directory cannot be written
        or contains other ORC files. No file is then created or replaced.
    """
    refuse_addresses("FILE_OR_DIR …", settings.paths)
    refuse_addresses_in(settings, "--", positional=("paths",))
    _check_numbers(settings)
    chosen = None if settings.format == "auto" else settings.format
    found = sources.find(settings.paths, chosen, settings.output)
    _check_encoding(settings.encoding)
    times.check_formats(settings.time_format)
    layout, files = found.layout, found.files
    if settings.merge and layout != "orc":
        raise UserError(f"--merge: has no effect for sources of format {layout}; leave it out")
    # Merged logs are read the same way as events.
    _check_flags(settings, "parquet" if settings.merge else layout)
    notes = found.notes
    if settings.merge:
        settings, left_out = _columns_found(settings, files[0])
        notes = [*notes, *left_out]
    if layout == "orc" and not settings.merge:
        return dataclasses.replace(_rewrite(settings, files), notes=tuple(found.notes))
    if layout == "movielens":
        selection = movielens.selection(files[0])
    else:
        features = parse(settings.features, settings.bags, settings.bag_separator)
        selection = Selection(
            user=settings.user_column,
            time=None if settings.time_column == times.NO_COLUMN else settings.time_column,
            features=features,
            missing=settings.missing,
            time_formats=settings.time_format,
        )
    done = _sort(settings, layout, files, selection)
    return dataclasses.replace(done, notes=(*notes, *done.notes))


def _columns_found(settings: Settings, path: Path) -> tuple[Settings, list[str]]:
    """The settings with the columns of an ORC log, and a sentence about columns that are left out."""
    found = merging.columns_of(path, settings.user_column, settings.time_column)
    settings = dataclasses.replace(settings, user_column=found.user, time_column=found.time)
    if settings.features != Settings.features:
        return settings, []
    settings = dataclasses.replace(settings, features=found.features)
    names = ", ".join(found.left_out)
    return settings, [
        f"left out columns that do not have one entry per event: {names}"
    ] if names else []


def _count(number: int, noun: str, rest: str = "") -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'} {rest}".rstrip()


def _check_numbers(settings: Settings) -> None:
    for name in ("min_events", "events_per_file"):
        found = getattr(settings, name)
        if found < 1:
            raise UserError(f"--{name}: expected at least 1, found {found}")


def _check_encoding(encoding: str | None) -> None:
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(
            f"--encoding: expected an encoding that Python knows, such as latin-1, found {encoding}"
        ) from error


def _check_flags(settings: Settings, layout: Layout) -> None:
    for field in dataclasses.fields(settings):
        if field.name not in _APPLIES or layout in _APPLIES[field.name]:
            continue
        if getattr(settings, field.name) != field.default:
            raise UserError(
                f"--{field.name}: has no effect for sources of format {layout}; leave it out, or choose "
                f"another --format"
            )


# ------------------------------------------------------------------------------ events into rows


def _sort(
    settings: Settings, layout: Layout, files: Sequence[Path], selection: Selection
) -> Converted:
    """Sorts the events of the sources by user and time, and writes them as rows."""
    try:
        from s2s_jax.data.conversion.events import EventStore
    except ModuleNotFoundError as error:
        if error.name != "duckdb":
            raise
        raise UserError(
            "DuckDB, which sorts events, is not installed; pip install 's2s-jax[convert]'"
        ) from error
    skip = settings.on_error == "skip"
    grouping = Grouping(settings.min_events)
    with (
        orc_writer.open_log(settings.output, settings.overwrite, settings.events_per_file) as log,
        _temp_dir(settings) as directory,
        EventStore(selection, directory, settings.memory_limit) as store,
    ):
        scans = store.prepare(_scans(store, settings, layout, files, selection, directory))
        sizes = [scan.path.stat().st_size for scan in scans]
        read = size = 0
        with _bar("reading", lambda: (read + store.progress() / 100 * size) / max(sum(sizes), 1)):
            for scan, size in zip(scans, sizes, strict=True):
                store.load(scan, skip)
                read += size
        skipped = store.check(skip)
        log.positions_per_stripe = orc_writer.stripe_positions(store.events)
        with _bar("sorting and writing", lambda: store.progress() / 100):
            for table in grouping.rows(store.read()):
                log.write(table)
        if log.rows == 0:
            raise UserError(f"--min_events: no user has {settings.min_events} events; lower it")
    bags = {name: most for name, most in grouping.largest_bags.items() if most > 1}
    may_be_lists = bool(bags) and layout in ("parquet", "jsonl")
    left_out = (
        _count(skipped.lines, "unreadable line"),
        _count(skipped.users, "event", f"without {selection.user}"),
        _count(skipped.times, "event", f"without {selection.time}"),
        _count(grouping.short_users, "user", f"with fewer than {settings.min_events} events"),
        _count(grouping.short_events, "event", "of these users"),
    )
    return Converted(
        paths=log.paths,
        rows=log.rows,
        events=log.positions,
        skipped=tuple(words for words in left_out if words[0] != "0"),
        bags=bags,
        notes=(_ONE_EVENT,) if may_be_lists and log.rows == log.positions else (),
    )


def _scans(
    store: "EventStore",
    settings: Settings,
    layout: Layout,
    files: Sequence[Path],
    selection: Selection,
    directory: Path,
) -> list[sql.Scan]:
    """The scans of the sources, with columns for the values in the names of their directories."""
    if layout == "parquet":
        scans = [store.parquet(path) for path in files]
    elif layout == "orc":
        files = merging.with_rows(files)
        copies = [merging.as_parquet(path, selection.columns, directory) for path in files]
        scans = [
            dataclasses.replace(store.parquet(copy), path=path)
            for path, copy in zip(files, copies, strict=True)
        ]
    elif layout == "jsonl":
        scans = [sql.scan_json(p, selection.columns, text_files.is_array(p)) for p in files]
    else:
        scans = [_scan_csv(path, settings, layout, directory) for path in files]
    return [sql.with_partitions(s, sources.partition_values(s.path)) for s in scans]


def _scan_csv(path: Path, settings: Settings, layout: Layout, directory: Path) -> sql.Scan:
    if layout == "movielens":
        form = movielens.ratings_format(path)
    else:
        delimiter = default_delimiter(path)
        if settings.delimiter is not None:
            delimiter = settings.delimiter.replace("\\t", "\t")
        form = CsvFormat(delimiter, settings.quote, settings.columns or None, settings.escape)
    content, new_line = text_files.as_utf8(path, settings.encoding, directory)
    form = dataclasses.replace(form, new_line=new_line)
    return sql.scan_csv(path, content, form, form.columns or read_header(content, form))


@contextlib.contextmanager
def _temp_dir(settings: Settings) -> Iterator[Path]:
    parent = settings.temp_dir or settings.output
    with contextlib.suppress(OSError):
        for left in parent.glob(f"{orc_writer.SORTING}*"):
            print(
                f"warning: {left} belongs to a conversion that is running or was killed; if it was "
                f"killed, remove it",
                file=sys.stderr,
            )
    try:
        made = tempfile.TemporaryDirectory(prefix=orc_writer.SORTING, dir=parent)
    except OSError as error:
        raise UserError(f"--temp_dir: {parent} cannot be written ({error})") from error
    with made as name:
        yield Path(name)


# ----------------------------------------------------------------------------- ORC files into rows


def _rewrite(settings: Settings, paths: Sequence[Path]) -> Converted:
    """Writes the rows of ORC files again, in stripes of a good size for training."""
    files = [orc.read_footer(path) for path in paths]
    rows, read = sum(file.rows for file in files), 0
    if rows == 0:
        raise UserError(f"{paths[0]}: expected rows, found none; give other files")
    skipped: list[str] = []
    with (
        orc_writer.open_log(settings.output, settings.overwrite, settings.events_per_file) as log,
        _bar("rewriting", lambda: read / rows),
    ):
        for file, stripe in ((f, i) for f in files for i in range(len(f.stripe_rows))):
            try:
                batch = orc.read_stripe(file, stripe, file.schema.names)
            except UserError as error:
                if isinstance(error, MachineError):
                    raise
                if settings.on_error == "stop":
                    remedy = "leave such stripes out with --on_error skip"
                    sentence = str(error).replace("take it out of io.data_paths", remedy)
                    raise UserError(sentence) from error
                where = f"of stripe {stripe} of {file.path}"
                skipped.append(_count(file.stripe_rows[stripe], "row", where))
                continue
            if log.rows == 0:
                # Assumes that all rows are as long as these.
                log.positions_per_stripe = orc_writer.stripe_positions(
                    orc_writer.positions(batch) * rows // max(batch.num_rows, 1)
                )
            log.write(pa.Table.from_batches([batch]))
            read += batch.num_rows
        if log.rows == 0:
            raise UserError(f"{paths[0]}: no stripe of the files can be read; give other files")
    return Converted(
        paths=log.paths, rows=log.rows, events=log.positions, skipped=tuple(skipped), bags={}
    )


# -------------------------------------------------------------------------------------- progress


@contextlib.contextmanager
def _bar(task: str, share: Callable[[], float]) -> Iterator[None]:
    """While the `with` block runs, shows its progress on a terminal; `share` returns it, from 0 to 1."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(task, total=1.0)

        def watch() -> None:
            while not ended.wait(0.25):
                progress.update(bar, completed=share())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
