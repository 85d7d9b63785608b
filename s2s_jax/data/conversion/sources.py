"""Event logs on disk: which files, in which layout, with which columns and categories."""

import csv
import dataclasses
import glob
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from s2s_jax.errors import UserError

Layout = Literal["csv", "parquet", "jsonl", "movielens", "orc"]

_SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "orc": (".orc",),
}
_COMPRESSIONS = (".gz", ".zst")
_RATINGS = ("ratings.dat", "ratings.csv")
_NO_GENRES = "(no genres listed)"


@dataclasses.dataclass(frozen=True)
class CsvFormat:
    """How the lines of a text file are cut.

    Attributes:
      delimiter: between columns.
      quote: around texts that hold delimiters; empty: none.
      columns: names, where the first line does not have them.
    """

    delimiter: str
    quote: str
    columns: tuple[str, ...] | None


def find(paths: Sequence[str], layout: Layout | None) -> tuple[Layout, list[Path]]:
    """The files that `paths` name, in the order in which they are read.

    A path is a file, a directory or a glob pattern. A directory gives, sorted, the files below it
    whose names end as the layout's do or, where there are none and the layout is given, all of them;
    names that begin with `.` or `_` are passed over. MovieLens is one directory, and gives its ratings.

    Args:
      paths: what is named.
      layout: of the files; None: what their names tell.

    Raises:
      UserError: nothing is named or found, a file is named twice, or the layout cannot be told.
    """
    if not paths:
        raise UserError("expected files or directories with events, found none; name some")
    named = [path for text in paths for path in _expand(text)]
    ratings = [named[0] / name for name in _RATINGS] if len(named) == 1 else []
    ratings = [path for path in ratings if path.is_file()]
    if layout == "movielens" or (layout is None and ratings):
        if not ratings:
            raise UserError(
                f"--layout: movielens is one directory with {' or '.join(_RATINGS)}, found "
                f"{', '.join(paths)}; name such a directory or another layout"
            )
        return "movielens", ratings[:1]
    files: list[Path] = []
    for path in named:
        files += _below(path, layout) if path.is_dir() else [path]
    _refuse_twice(files)
    return layout or _tell_layout(files), files


def _expand(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.exists():
        return [path]
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(text) else []
    if not found:
        raise UserError(f"{text} does not exist; name files or directories with events")
    return [Path(name) for name in found]


def _below(directory: Path, layout: Layout | None) -> list[Path]:
    inside = sorted(p for p in directory.rglob("*") if p.is_file() and not _hidden(p, directory))
    if layout is None:
        found = [path for path in inside if _layout_of(path) is not None]
    else:
        found = [path for path in inside if _layout_of(path) == layout] or inside
    if not found:
        raise UserError(
            f"{directory} holds no files whose names end in "
            f"{', '.join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)}; name the "
            f"files, or their layout with --layout"
        )
    return found


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


def _tell_layout(files: Sequence[Path]) -> Layout:
    layouts: dict[Layout, Path] = {}
    for path in files:
        layout = _layout_of(path)
        if layout is None:
            raise UserError(f"{path}: its name tells no layout; give one with --layout")
        layouts[layout] = path
    if len(layouts) > 1:
        first, second = list(layouts.values())[:2]
        raise UserError(
            f"expected files of one layout, found {first} and {second}; name fewer, or choose with "
            f"--layout"
        )
    return next(iter(layouts))


def _refuse_twice(files: Sequence[Path]) -> None:
    resolved: set[Path] = set()
    for path in files:
        if path.resolve() in resolved:
            raise UserError(f"{path} is named twice; its events would count double")
        resolved.add(path.resolve())


# ------------------------------------------------------------------------------------ text files


def default_delimiter(path: Path) -> str:
    """A tab in .tsv files, else a comma."""
    return "\t" if ".tsv" in path.suffixes[-2:] else ","


def read_header(path: Path, form: CsvFormat) -> list[str]:
    """The names in the first line.

    Raises:
      UserError: the file cannot be read or has no line.
    """
    for row in _rows(path, form, "utf-8-sig"):
        return row
    raise UserError(f"{path}: expected a line with the names of columns, found an empty file")


def _rows(path: Path, form: CsvFormat, encoding: str) -> Iterator[list[str]]:
    try:
        with (
            pa.input_stream(str(path), compression="detect") as source,
            io.TextIOWrapper(source, encoding, errors="replace", newline="") as lines,
        ):
            if len(form.delimiter) > 1:
                yield from (line.rstrip("\r\n").split(form.delimiter) for line in lines)
            elif form.quote:
                yield from csv.reader(lines, delimiter=form.delimiter, quotechar=form.quote)
            else:
                yield from csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path}: expected text, but {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------- MovieLens


def ratings_format(ratings: Path) -> CsvFormat:
    """How a file of MovieLens's ratings is cut; its columns are userId, movieId, rating, timestamp."""
    if ratings.suffix == ".dat":
        return CsvFormat("::", "", ("userId", "movieId", "rating", "timestamp"))
    return CsvFormat(",", '"', None)


def read_genres(ratings: Path) -> dict[str, list[str]] | None:
    """The genres of each movie, from the file beside `ratings`; None where there is none.

    Raises:
      UserError: a line of the file is not `movieId, …, genres`, or a movie is in it twice.
    """
    path = ratings.with_name(f"movies{ratings.suffix}")
    if not path.is_file():
        return None
    # MovieLens-1M is in Latin-1, 10M and later in UTF-8. Movies and genres are ASCII; titles do not
    # matter.
    encoding = "latin-1" if path.suffix == ".dat" else "utf-8-sig"
    form = ratings_format(ratings)
    genres: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(path, form, encoding), 1):
        if form.columns is None and number == 1:
            continue
        if len(row) < 3 or row[0] in genres:
            found = f"movie {row[0]} twice" if len(row) >= 3 else f"{len(row)} columns"
            raise UserError(
                f"{path}: line {number}: expected a movie, its title and its genres, found {found}; "
                f"mend the line"
            )
        genres[row[0]] = [] if row[-1] == _NO_GENRES else [g for g in row[-1].split("|") if g]
    return genres
