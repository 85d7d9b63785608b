"""Shows what ORC files hold: `python -m s2s_jax.data.inspect FILE_OR_DIR… [--rows 3]`.

Prints the files, every column with its counts, and the first rows. Takes any ORC file, readable by
training or not, and holds one stripe at a time (and the distinct values of every column).

Shapes: N rows of a stripe, P positions, T ids.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2s_jax.data import orc
from s2s_jax.errors import EXIT_DONE, EXIT_USER_ERROR, UserError, run_door

# Where the output is no terminal, lines may be long; a terminal's are folded at its width.
_PIPE_WIDTH = 240
_POSITIONS_SHOWN = 4
_CHARACTERS_SHOWN = 100
_TYPE_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to show."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """ORC files, and directories that are searched as training does"""
    rows: int = 3
    """First rows to show"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code: 2 if anything could not be read.

    Raises:
      UserError: no file is named, or one does not exist.
    """
    settings = tyro.cli(
        Settings,
        args=argv,
        prog="python -m s2s_jax.data.inspect",
        description="Shows what ORC files hold.",
        use_underscores=True,
    )
    if settings.rows < 0:
        raise UserError(f"--rows: expected at least 0, found {settings.rows}")
    try:
        paths = orc.find_files(",".join(settings.paths))
    except UserError as error:
        raise UserError(str(error).removeprefix("io.data_paths: ")) from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    report = _Report(settings.rows)
    for path in paths:
        report.add_file(path)
    report.print_tables(console)
    return EXIT_USER_ERROR if report.failed else EXIT_DONE


class _Report:
    """Collects files stripe by stripe."""

    def __init__(self, rows: int):
        self.failed = False
        self._rows_wanted = rows
        self._files = _table("file", "rows", "stripes", "bytes", "compression", numbers=(1, 2, 3))
        # Files may disagree on a column's type.
        self._columns: dict[tuple[str, pa.DataType], _Column] = {}
        self._first_rows: list[tuple[int, list[tuple[str, str]]]] = []
        self._first_file: Path | None = None

    def add_file(self, path: Path) -> None:
        try:
            file = orc.read_footer(path)
        except UserError as error:
            self._complain(str(error))
            self._files.add_row(Text(str(path)), "-", "-", "-", "unreadable")
            return
        self._files.add_row(
            Text(str(path)),
            f"{file.rows:,}",
            f"{len(file.stripe_rows):,}",
            f"{file.size:,}",
            _compression(path),
        )
        for field in file.schema:
            if (field.name, field.type) not in self._columns:
                self._columns[field.name, field.type] = _Column(field.type)
        first_row = 0
        for stripe, rows in enumerate(file.stripe_rows):
            arrays = self._read(file, stripe)
            for (name, data_type), array in arrays.items():
                self._columns[name, data_type].add(array)
            self._keep_first_rows(path, first_row, rows, arrays)
            first_row += rows

    def _read(self, file: orc.OrcFile, stripe: int) -> dict[tuple[str, pa.DataType], pa.Array]:
        """The columns of a stripe by name and type; those that cannot be read are missing."""
        names = file.schema.names
        try:
            batches = [orc.read_stripe(file, stripe, names)]
        except UserError as whole:
            batches = []
            errors = []
            for name in names:
                try:
                    batches.append(orc.read_stripe(file, stripe, [name]))
                except UserError as error:
                    errors.append(f"column {name}: {error}")
            for error in errors if batches else [str(whole)]:
                self._complain(error)
        return {
            (field.name, field.type): batch.column(i)
            for batch in batches
            for i, field in enumerate(batch.schema)
            if (field.name, field.type) in self._columns
        }

    def _keep_first_rows(
        self,
        path: Path,
        first_row: int,
        rows: int,
        arrays: dict[tuple[str, pa.DataType], pa.Array],
    ) -> None:
        if self._first_file is None and arrays:
            self._first_file = path
        if path != self._first_file:
            return
        for row in range(min(rows, self._rows_wanted - len(self._first_rows))):
            shown = [(name, _show(array, row)) for (name, _), array in arrays.items()]
            self._first_rows.append((first_row + row, shown))

    def _complain(self, sentence: str) -> None:
        self.failed = True
        print(f"error: {sentence}", file=sys.stderr)

    def print_tables(self, console: Console) -> None:
        console.print(self._files)
        columns = _table(
            "column",
            "type",
            "rows",
            "missing rows",
            "positions a row\n(min/median/mean/max)",
            "missing\npositions",
            "largest\nbag",
            "distinct",
            "smallest",
            "largest",
            numbers=tuple(range(2, 10)),
        )
        for (name, data_type), column in self._columns.items():
            columns.add_row(Text(name), Text(_type_name(data_type)), *column.cells())
        if self._columns:
            console.print(columns)
        if self._first_rows:
            values = _table("row", "column", "value", numbers=(0,))
            for row, shown in self._first_rows:
                for i, (name, value) in enumerate(shown):
                    values.add_row("" if i else f"{row:,}", Text(name), Text(value))
            console.print(Text(f"First rows of {self._first_file}"))
            console.print(values)


# ----------------------------------------------------------------------------------- one column


class _Column:
    """Counts over one column; `-` where its type gives a count no meaning.

    A row of a list column is missing if it is null or empty. A position of it is missing if it is
    null or a bag without an id that is not null, as training sees it. Lengths are those of the rows
    that are not missing.
    """

    def __init__(self, data_type: pa.DataType):
        self._is_list = _is_list(data_type)
        self._rows = self._missing_rows = self._missing_positions = self._largest_bag = 0
        self._lengths: Counter[int] = Counter()
        leaf = data_type
        for _ in range(2):
            leaf = leaf.value_type if _is_list(leaf) else leaf
        self._is_integer = pa.types.is_integer(leaf)
        self._distinct = _Distinct(leaf) if _has_unique(leaf) else None
        self._smallest: int | None = None
        self._largest: int | None = None

    def add(self, array: pa.Array) -> None:
        """Counts the rows of `array` too."""
        self._rows += len(array)
        values = array
        if self._is_list:
            lengths_N = _lengths(array)
            self._missing_rows += int((lengths_N == 0).sum())
            found, counts = np.unique(lengths_N[lengths_N > 0], return_counts=True)
            self._lengths.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
            positions = array.flatten()
            values, bags_P = _open_bags(positions)
            self._missing_positions += int((bags_P == 0).sum())
            self._largest_bag = max(self._largest_bag, int(bags_P.max(initial=0)))
        else:
            self._missing_rows += array.null_count
        values = values.drop_null() if values.null_count else values
        if self._distinct is not None:
            self._distinct.add(values)
        if self._is_integer and len(values):
            ends = pc.min_max(values).as_py()
            known = [n for n in (self._smallest, self._largest) if n is not None]
            self._smallest = min([ends["min"], *known])
            self._largest = max([ends["max"], *known])

    def cells(self) -> list[str]:
        """The counts in the order of the table."""
        lengths = missing_positions = largest_bag = "-"
        if self._is_list:
            missing_positions, largest_bag = (
                f"{self._missing_positions:,}",
                f"{self._largest_bag:,}",
            )
        if self._lengths:
            rows = self._lengths.total()
            mean = sum(length * count for length, count in self._lengths.items()) / rows
            low, high = min(self._lengths), max(self._lengths)
            lengths = f"{low:,} / {_median(self._lengths):,g} / {mean:,.1f} / {high:,}"
        return [
            f"{self._rows:,}",
            f"{self._missing_rows:,}",
            lengths,
            missing_positions,
            largest_bag,
            "-" if self._distinct is None else f"{self._distinct.count():,}",
            "-" if self._smallest is None else str(self._smallest),
            "-" if self._largest is None else str(self._largest),
        ]


class _Distinct:
    """The distinct values of many arrays, exact."""

    def __init__(self, data_type: pa.DataType):
        # Small offsets could not hold 2 GiB of text. Bytes, since text may be no UTF-8.
        self._type = pa.large_binary() if _is_text(data_type) else data_type
        self._known = pa.array([], self._type)
        self._waiting: list[pa.Array] = []

    def add(self, values: pa.Array) -> None:
        self._waiting.append(values.cast(self._type).unique())
        # Merged only when as many wait as are known, so a value is hashed few times.
        if sum(map(len, self._waiting)) > len(self._known):
            self._merge()

    def count(self) -> int:
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        self._known = pa.chunked_array([self._known, *self._waiting]).unique()
        if isinstance(self._known, pa.ChunkedArray):
            self._known = self._known.combine_chunks()
        self._waiting = []


def _has_unique(data_type: pa.DataType) -> bool:
    try:
        pa.nulls(0, data_type).unique()
    except (pa.ArrowException, NotImplementedError):
        return False
    return True


def _is_list(data_type: pa.DataType) -> bool:
    return pa.types.is_list(data_type) or pa.types.is_large_list(data_type)


def _is_text(data_type: pa.DataType) -> bool:
    return pa.types.is_string(data_type) or pa.types.is_binary(data_type)


def _lengths(lists: pa.Array) -> np.ndarray:
    """int64 length of each list, 0 for null."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _open_bags(positions: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """All ids, nulls included, and how many that are not null each position has."""
    if not _is_list(positions.type):
        return positions, positions.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    bags_P = _lengths(positions)
    values = positions.flatten()
    valid_T = values.is_valid().to_numpy(zero_copy_only=False)
    owner_T = np.repeat(np.arange(len(bags_P)), bags_P)
    return values, np.bincount(owner_T[valid_T], minlength=len(bags_P))


def _median(counts: Counter[int]) -> float:
    numbers = np.array(sorted(counts))
    until = np.cumsum([counts[n] for n in numbers.tolist()])
    middle = [(until[-1] - 1) // 2, until[-1] // 2]
    return statistics.mean(numbers[np.searchsorted(until, middle, side="right")].tolist())


# ------------------------------------------------------------------------------------- printing


def _table(*headers: str, numbers: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i in numbers else "left", overflow="fold")
    return table


def _compression(path: Path) -> str:
    try:
        with pa.OSFile(str(path)) as source:
            return str(pyarrow.orc.ORCFile(source).compression).lower()
    except (pa.ArrowException, OSError, ValueError):
        return "-"


def _show(array: pa.Array, row: int) -> str:
    """The value of a row, shortened."""
    if _is_list(array.type) and array[row].is_valid:
        positions = array.slice(row, 1).flatten()
        shown = [_value(positions, i) for i in range(min(len(positions), _POSITIONS_SHOWN))]
        more = len(positions) - len(shown)
        shown += [f"… {more:,} more"] if more else []
        return _shorten(f"[{', '.join(shown)}]", _CHARACTERS_SHOWN)
    return _shorten(_value(array, row), _CHARACTERS_SHOWN)


def _value(array: pa.Array, index: int) -> str:
    try:
        return repr(array[index].as_py())
    except (ValueError, OverflowError, pa.ArrowException):
        # Times finer or farther than Python's, unknown time zones, text that is no UTF-8.
        return array.slice(index, 1).to_string(skip_new_lines=True)[1:-1]


def _type_name(data_type: pa.DataType) -> str:
    return _shorten(str(data_type).replace("list<item: ", "list<"), _TYPE_SHOWN)


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


if __name__ == "__main__":
    run_door(main)
