"""Turns event logs into logs for training: `s2s convert FILE_OR_DIR… --output DIR`.

Sources have one row an event, or lists of events: CSV, Parquet, JSON, or MovieLens. The log is ORC with
one row a user: `user_id` and, for each feature and `timestamp`, a list over the user's events, oldest
first. Logs that are already ORC are rewritten unchanged, in stripes of a good size for training.
"""

import codecs
import contextlib
import dataclasses
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from s2s_jax.config import refuse_addresses_in
from s2s_jax.data.conversion import merging, times
from s2s_jax.data.conversion.grouping import Grouping
from s2s_jax.data.conversion.reading import movielens, sources, sql, text_files
from s2s_jax.data.conversion.reading.sources import Layout
from s2s_jax.data.conversion.reading.text_files import CsvFormat, default_delimiter, read_header
from s2s_jax.data.conversion.selection import Selection, parse
from s2s_jax.data.logs import orc, orc_writer
from s2s_jax.errors import MachineError, UserError

_CSV, _EVENTS = ("csv",), ("csv", "parquet", "jsonl")
# Flags that only some layouts use, and those layouts.
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
    "warning: every user has one event, with several ids; if these are the user's events in order, the "
    "times have to be a list, too"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to convert, and where to."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """Files, directories and glob patterns; events of one time keep their order in and over files"""
    output: Path
    """Directory for part-0.orc, part-1.orc …; made where it does not exist"""
    format: Literal["auto", "csv", "parquet", "jsonl", "movielens", "orc"] = "auto"
    """Of the sources; auto: as their names tell. movielens: a directory with ratings.dat or ratings.csv
    and, for genres as cate_id, movies. orc: a log to be written anew, with all its columns and rows"""
    user_column: str = "user_id"
    """Column of users, written as user_id"""
    time_column: str = "timestamp"
    """Column of times, written as timestamp: numbers (without their fractions), or dates and times (as
    seconds since 1970; in UTC unless they name a zone). none: the order of lines is the order of
    events, and their places are the times"""
    time_format: tuple[str, ...] = ()
    """Formats in which times are written, as of strptime, such as '%d/%m/%Y %H:%M' or '%Y%m%d'; the
    first that fits counts. number: numbers that look like dates are numbers"""
    features: tuple[str, ...] = ("item_id", "cate_id", "behavior_id")
    """Columns of features; NAME=COLUMN writes COLUMN as NAME"""
    columns: tuple[str, ...] = ()
    """Names of all columns of CSV files, in order, if their first line does not hold them"""
    delimiter: str | None = None
    """Of CSV files, up to 4 characters; by default a comma, or a tab (\\t) in .tsv files"""
    quote: str = '"'
    """Around texts of CSV files that hold delimiters; '' if nothing is quoted"""
    escape: str = ""
    """Before quotation marks inside quotes, such as \\; by default such marks are doubled"""
    encoding: str | None = None
    """Of CSV files, such as latin-1 or cp1252; by default UTF-8, or UTF-16 with its mark"""
    bags: tuple[str, ...] = ()
    """Features (their NAMEs) whose texts hold several ids"""
    bag_separator: str = "|"
    """Between the ids in such texts"""
    missing: tuple[str, ...] = ()
    """Texts that mean that there is no value, besides the empty one, such as NULL or \\N"""
    merge: bool = False
    """Make one row of all rows of a user of ORC logs, with events in the order of time. Columns that
    --user_column, --time_column and --features do not name are found by names and types"""
    min_events: int = 1
    """Users with fewer events are left out, and counted"""
    on_error: Literal["stop", "skip"] = "stop"
    """What is done on lines (of ORC: stripes) that cannot be read, and on events without a user or a
    time: stop at the first, or leave them out and count them"""
    events_per_file: int = 10_000_000
    """A file ends after the user with whom it has so many events"""
    overwrite: bool = False
    """Replace the part-N.orc files that are in the directory, when all is converted"""
    memory_limit: str | None = None
    """Memory for sorting, such as 4GB; by default 80% of all"""
    temp_dir: Path | None = None
    """Directory on a disk that holds the events once or twice while they are sorted; None: --output"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """The outcome of a conversion.

    Attributes:
      paths: the files, `part-0.orc` first.
      rows: rows written; one for each user.
      events: events written.
      skipped: what was left out, in words; empty if nothing was.
      bags: the largest bag of each column that has bags of several ids.
      notes: surprises in the files that were read, a sentence each.
    """

    paths: list[Path]
    rows: int
    events: int
    skipped: tuple[str, ...]
    bags: dict[str, int]
    notes: tuple[str, ...] = ()


def convert(settings: Settings) -> Converted:
    """Writes the log.

    Columns of integers, and of texts that all spell an int64, are written as int64; others as
    strings. Rows are sorted by user id.

    Raises:
      UserError: a setting is impossible, a source cannot be read, or the directory cannot be written
        or holds other ORC files. Then no new file is there, and none is replaced.
    """
    refuse_addresses_in(settings, "--", positional=("paths",))
    _check_numbers(settings)
    chosen = None if settings.format == "auto" else settings.format
    found = sources.find(settings.paths, chosen, settings.output)
    _check_encoding(settings.encoding)
    times.check_formats(settings.time_format)
    layout, files = found.layout, found.files
    if settings.merge and layout != "orc":
        raise UserError(f"--merge: means nothing for sources of format {layout}; leave it out")
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
    """The settings with the columns of an ORC log, and what is left out of it, in a sentence."""
    found = merging.columns_of(path, settings.user_column, settings.time_column)
    settings = dataclasses.replace(settings, user_column=found.user, time_column=found.time)
    if settings.features != Settings.features:
        return settings, []
    settings = dataclasses.replace(settings, features=found.features)
    names = ", ".join(found.left_out)
    return settings, [f"left out columns without an entry an event: {names}"] if names else []


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
            f"--encoding: expected one that Python knows, such as latin-1, found {encoding}"
        ) from error


def _check_flags(settings: Settings, layout: Layout) -> None:
    for field in dataclasses.fields(settings):
        if field.name not in _APPLIES or layout in _APPLIES[field.name]:
            continue
        if getattr(settings, field.name) != field.default:
            raise UserError(
                f"--{field.name}: means nothing for sources of format {layout}; leave it out, or choose "
                f"another --format"
            )


# ------------------------------------------------------------------------------ events into rows


def _sort(
    settings: Settings, layout: Layout, files: Sequence[Path], selection: Selection
) -> Converted:
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
        scans = [sql.with_partitions(s, sources.partition_values(s.path)) for s in scans]
        scans = store.prepare(scans)
        sizes = [path.stat().st_size for path in files]
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
            raise UserError(
                f"--min_events: no user has {settings.min_events} events; lower the number"
            )
    bags = {name: most for name, most in grouping.largest_bags.items() if most > 1}
    may_be_lists = bool(bags) and layout in ("parquet", "jsonl")
    left_out = (
        _count(skipped.lines, "unreadable line"),
        _count(skipped.users, "event", f"without {selection.user}"),
        _count(skipped.times, "event", f"without {selection.time}"),
        _count(grouping.short_users, "user", f"of fewer than {settings.min_events} events"),
        _count(grouping.short_events, "event", "of these"),
    )
    return Converted(
        paths=log.paths,
        rows=log.rows,
        events=log.positions,
        skipped=tuple(words for words in left_out if words[0] != "0"),
        bags=bags,
        notes=(_ONE_EVENT,) if may_be_lists and log.rows == log.positions else (),
    )


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


# ------------------------------------------------------------------------------- ORC written anew


def _rewrite(settings: Settings, paths: Sequence[Path]) -> Converted:
    files = [orc.read_footer(path) for path in paths]
    rows, read = sum(file.rows for file in files), 0
    if rows == 0:
        raise UserError(f"{paths[0]}: expected rows, found none; name other files")
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
            raise UserError(f"{paths[0]}: none of its stripes can be read; name other files")
    return Converted(
        paths=log.paths, rows=log.rows, events=log.positions, skipped=tuple(skipped), bags={}
    )


# -------------------------------------------------------------------------------------- progress


@contextlib.contextmanager
def _bar(task: str, share: Callable[[], float]) -> Iterator[None]:
    """Shows on a terminal, while the `with` block runs, what `share` says is done of it."""
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
