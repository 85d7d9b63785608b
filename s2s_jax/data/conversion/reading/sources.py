"""Finds the files of event logs, and their layout."""

import glob
import gzip
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from s2s_jax.data.conversion.reading import movielens
from s2s_jax.data.logs.files import walk
from s2s_jax.errors import UserError
from s2s_serve.storage.address import Place

Layout = Literal["csv", "parquet", "jsonl", "movielens", "orc", "table"]

_SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "orc": (".orc",),
}
_COMPRESSIONS = (".gz", ".zst")
# Names in the directories of tables whose files may contain rows that were deleted or replaced.
TABLE_SIGNS = {
    "_delta_log": "a Delta",
    ".hoodie": "a Hudi",
    "metadata/*.metadata.json": "an Iceberg",
}
_HIVE_CHANGES = re.compile(r"(delta|delete_delta)_\d+(_\d+)+")
# Hive's name for the directory of rows without a value.
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class Sources(NamedTuple):
    """The files to convert.

    Attributes:
      layout: the layout of all files.
      files: the files, in the order in which they are read.
      notes: notes about the files, a sentence each.
      tables: the names of tables, if the layout is `table`.
    """

    layout: Layout
    files: list[Path]
    notes: list[str]
    tables: tuple[str, ...] = ()


def find(paths: Sequence[str], layout: Layout | None, out: Path | None) -> Sources:
    """The files at `paths`.

    In a directory, these are the files whose names end as the layout requires, sorted, at any depth. If
    there are none and the layout is given, these are all files. Links are followed. Names that begin
    with `.` or `_` are skipped, and so is `out`. MovieLens is one directory, of which only the file of
    ratings is taken. Files of 0 bytes have no events.

    Args:
      paths: files, directories and glob patterns.
      layout: the layout of the files; None: found from their names.
      out: the directory to which the log is written; None: it is in a store.

    Raises:
      UserError: no path is given, nothing is found, a file is given twice, the format is unclear, or a
        directory belongs to a table that keeps deleted rows.
    """
    if not paths:
        raise UserError("expected files or directories with events, found none; give some")
    named = [path for text in paths for path in _expand(text)]
    ratings = movielens.find(named[0]) if len(named) == 1 else None
    if layout == "movielens":
        if ratings is None:
            raise UserError(
                f"--format: movielens is one directory with {' or '.join(movielens.RATINGS)}, found "
                f"{', '.join(paths)}; give such a directory or another format"
            )
        return Sources("movielens", [ratings], movielens.notes(ratings))
    if layout is None and ratings is not None and movielens.is_movielens(ratings):
        return Sources("movielens", [ratings], movielens.notes(ratings))
    files: list[Path] = []
    notes: list[str] = []
    for path in named:
        try:
            files += _below(path, layout, out, notes) if path.is_dir() else [path]
        except OSError as error:
            raise UserError(f"{path} cannot be accessed ({error})") from error
    _refuse_duplicates(files)
    layout = layout or _common_layout(files)
    empty = [path for path in files if _is_empty(path)]
    if empty and layout != "orc" and len(empty) < len(files):
        notes.append(f"{count(empty, 'empty file')} treated as having no events")
        files = [path for path in files if path not in empty]
    return Sources(layout, files, notes)


def tables(names: Sequence[str]) -> Sources:
    """The tables with these names, as Spark knows them.

    Raises:
      UserError: no name is given, or a name is given twice.
    """
    if not names:
        raise UserError("expected names of tables, found none; give some")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is given twice, so its events would count twice; give it once")
    return Sources("table", [], [], tuple(names))


def partition_values(path: Path) -> dict[str, str | None]:
    """Values of Hive-style directories in a file's path, such as `day=2015-01-01`."""
    values: dict[str, str | None] = {}
    for part in path.absolute().parent.parts:
        name, equals, value = part.partition("=")
        if name and equals:
            known = None if value == _NO_VALUE else urllib.parse.unquote(value)
            values[urllib.parse.unquote(name)] = known
    return values


def count(paths: Sequence[Place], noun: str) -> str:
    """The number of paths and the first of them, as the subject of a sentence."""
    if len(paths) == 1:
        return f"1 {noun} ({paths[0]}) is"
    return f"{len(paths):,} {noun}s ({paths[0]} and others) are"


def _expand(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if os.path.lexists(path):
        if not path.exists():
            raise UserError(f"{text} is a broken link; give files or directories with events")
        return [path]
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(text) else []
    if not found:
        raise UserError(f"{text} does not exist; give files or directories with events")
    for name in found:
        _refuse_table(Path(name) if Path(name).is_dir() else Path(name).parent)
    return [Path(name) for name in found]


def _below(
    directory: Path, layout: Layout | None, out: Path | None, notes: list[str]
) -> list[Path]:
    _refuse_table(directory)
    circles: list[Path] = []
    everything = sorted(walk(directory, circles))
    inside = [path for path in everything if not _hidden(path, directory)]
    if out is not None:
        inside = _without_output(inside, directory, out, notes)
    inside = _each_once(inside, notes)
    _refuse_inner_tables(directory, everything)
    if layout is None:
        found = [path for path in inside if _layout_of(path) is not None]
    else:
        found = [path for path in inside if _layout_of(path) == layout] or inside
    if not found:
        raise UserError(
            f"{directory} contains no files whose names end in "
            f"{', '.join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)}; give the "
            f"files, or their format with --format"
        )
    left_out = [path for path in inside if path not in set(found)]
    left_out += [p for p in everything if _hidden(p, directory) and _layout_of(p) is not None]
    if left_out:
        notes.append(
            f"warning: {count(left_out, 'file')} left out because of the name; to read such files, give "
            f"them one by one, or give --format"
        )
    if circles:
        notes.append(
            f"{count(circles, 'linked folder')} not followed, because such a link leads back to a "
            f"folder above it"
        )
    return found


def _without_output(files: list[Path], directory: Path, out: Path, notes: list[str]) -> list[Path]:
    """The files without those of an earlier output log inside the source directory."""
    real, top = os.path.realpath(out), os.path.realpath(directory)
    if real == top:
        return files
    own = {path for path in files if os.path.realpath(path).startswith(real + os.sep)}
    if own:
        notes.append(f"{count(sorted(own), 'file')} left out, being in --output")
    return [path for path in files if path not in own]


def _each_once(files: list[Path], notes: list[str]) -> list[Path]:
    """The files without duplicates; of a link and the file it points to, the file is kept."""
    by_real: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: os.path.realpath(path) != os.path.abspath(path)):
        by_real.setdefault(os.path.realpath(path), path)
    chosen = set(by_real.values())
    again = [path for path in files if path not in chosen]
    if again:
        notes.append(f"{count(again, 'linked file')} read only once, under another name")
    return [path for path in files if path in chosen]


def _refuse_table(directory: Path) -> None:
    """Refuses a directory that is, or is in, a table whose files may hold deleted rows."""
    for place in (directory.absolute(), *directory.absolute().parents):
        for sign, kind in TABLE_SIGNS.items():
            if next(place.glob(sign), None) is not None:
                _refuse_kind(place, kind)


def _refuse_inner_tables(directory: Path, files: Sequence[Path]) -> None:
    for path in files:
        for place in path.parents[: len(path.relative_to(directory).parts) - 1]:
            if place.name in TABLE_SIGNS:
                _refuse_kind(place.parent, TABLE_SIGNS[place.name])
            if _HIVE_CHANGES.fullmatch(place.name):
                _refuse_kind(place.parent, "a Hive transaction")
        if path.name.endswith(".metadata.json") and path.parent.name == "metadata":
            _refuse_kind(path.parent.parent, "an Iceberg")


def _refuse_kind(place: Path, kind: str) -> None:
    raise UserError(
        f"{place} is {kind} table, whose files may contain deleted or replaced rows; write its "
        f"current rows to plain Parquet files with a tool that reads such tables, and give these files"
    )


def _hidden(path: Path, below: Path) -> bool:
    return any(part[0] in "._" for part in path.relative_to(below).parts)


def _layout_of(path: Path) -> Layout | None:
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for layout, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes):
            return layout
    return None


def _common_layout(files: Sequence[Path]) -> Layout:
    layouts: dict[Layout, Path] = {}
    for path in files:
        layout = _layout_of(path)
        if layout is None:
            raise UserError(
                f"{path}: the format cannot be found from its name; give it with --format"
            )
        layouts[layout] = path
    if len(layouts) > 1:
        first, second = list(layouts.values())[:2]
        raise UserError(
            f"expected files of one format, found {first} and {second}; give files of one format, or "
            f"choose it with --format"
        )
    return next(iter(layouts))


def _refuse_duplicates(files: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in files:
        first = seen.setdefault(os.path.realpath(path), path)
        if first is not path:
            also = "" if first == path else f" (also as {first})"
            raise UserError(
                f"{path} is given twice{also}, so its events would count twice; give it once"
            )


def _is_empty(path: Path) -> bool:
    """Whether a file is empty, after decompression."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return not file.read(1)
        return path.stat().st_size == 0
    except (OSError, EOFError):
        # Reading the file will report the error.
        return False
