"""Shows what ORC files contain: `s2s inspect FILE_OR_DIR… [--config FILE] [--rows 3]`.

Prints the files, statistics of every column, lengths of rows, sizes of stripes, facts about times, users
and ids, the first rows, and warnings with remedies. Takes any ORC file, even one that training cannot
use. Holds one stripe in memory at a time.
"""

import dataclasses
import sys
from typing import Annotated

import pyarrow as pa
import pyarrow.orc
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2s_jax.config import Config, ModelConfig
from s2s_jax.config.checks.configuration import validate_reading
from s2s_jax.data.encoding import held_out
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.columns import ColumnCounts, share
from s2s_jax.data.inspection.learnable import Learnable
from s2s_jax.data.inspection.log_facts import LogFacts
from s2s_jax.data.inspection.log_shape import LogShape
from s2s_jax.data.logs import files, orc
from s2s_jax.errors import UserError
from s2s_serve.encoding import features
from s2s_serve.encoding.arrow import is_list
from s2s_serve.storage.address import Place

_POSITIONS_SHOWN = 4
_CHARACTERS_SHOWN = 100
_TYPE_SHOWN = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The log to inspect, and what to show of it."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """ORC files and directories; directories are searched in the same way as in training"""
    rows: int = 3
    """Number of first rows to show"""
    seq_len: int | None = None
    """Length of sequences, to count truncated rows; by default the model.seq_len of --config"""
    user_column: str | None = None
    """Column with user ids, to find users with several rows; by default user_id or a similar name"""


def inspect(settings: Settings, config: Config | None, console: Console) -> bool:
    """Prints the contents of ORC files; returns whether all of them could be read.

    Args:
      settings: the files, and what to show.
      config: the configuration to check the files against; None: there is none.
      console: the console to print to.

    Raises:
      UserError: no file is given, or one does not exist; or a setting is impossible.
    """
    if settings.rows < 0:
        raise UserError(f"--rows: expected at least 0, found {settings.rows}")
    if settings.seq_len is not None and settings.seq_len < 1:
        raise UserError(f"--seq_len: expected at least 1, found {settings.seq_len}")
    try:
        found = files.find(settings.paths)
    except UserError as error:
        raise UserError(str(error).removeprefix("io.data_paths: ")) from error
    if config is not None:
        # The configuration's own log, and the end of training, do not matter here.
        validate_reading(config)
    report = _Report(settings, config)
    for path in found.files:
        report.add_file(path)
    report.print_tables(console)
    if settings.user_column is not None and not report.has_users:
        raise UserError(
            f"--user_column: expected a column with one number or text a row, found no such column "
            f"{settings.user_column}"
        )
    for note in found.notes():
        console.print(Text(note), soft_wrap=True)
    return not report.failed


class _Report:
    """Collects statistics of files, stripe by stripe."""

    def __init__(self, settings: Settings, config: Config | None):
        self._settings = settings
        model = ModelConfig() if config is None else config.model
        self._seq_len = model.seq_len if settings.seq_len is None else settings.seq_len
        assumptions = None
        if config is not None:
            # Messages should name the inspected log, not the one of the configuration.
            assumptions = dataclasses.replace(
                Assumptions.of(config), paths=",".join(settings.paths)
            )
        self._facts = LogFacts(assumptions, settings.user_column)
        self._features = () if assumptions is None else assumptions.decoding.features
        self._split = None if assumptions is None else assumptions.decoding.split
        self._learnable = None if assumptions is None else Learnable(assumptions)
        self._files = _table(
            *("file", "rows", "stripes", "unreadable", "bytes", "compression"), numbers=(1, 2, 3, 4)
        )
        self._file_count = self._unreadable_files = self._unreadable_stripes = 0
        # A column can have different types in different files.
        self._columns: dict[tuple[str, pa.DataType], ColumnCounts] = {}
        self._encrypted: set[tuple[str, pa.DataType]] = set()
        self._shape = LogShape()
        self._first_rows: list[tuple[int, list[tuple[str, str]]]] = []
        self._first_file: Place | None = None

    @property
    def failed(self) -> bool:
        return self._unreadable_files + self._unreadable_stripes > 0

    @property
    def has_users(self) -> bool:
        return self._facts.has_users

    def add_file(self, path: Place) -> None:
        self._file_count += 1
        try:
            file = orc.read_footer(path)
        except UserError as error:
            _print_error(str(error))
            self._unreadable_files += 1
            if self._learnable is not None:
                self._learnable.add_unreadable(str(error))
            self._files.add_row(Text(str(path)), "-", "-", "-", "-", "unreadable")
            return
        for field in file.schema:
            if (field.name, field.type) not in self._columns:
                self._columns[field.name, field.type] = ColumnCounts(field.type)
            if field.name in file.encrypted:
                self._encrypted.add((field.name, field.type))
        unreadable = self._add_stripes(file)
        self._unreadable_stripes += unreadable
        self._files.add_row(
            Text(str(path)),
            f"{file.rows:,}",
            f"{len(file.stripe_rows):,}",
            share(unreadable, len(file.stripe_rows)),
            f"{file.size:,}",
            file.compression,
        )

    def _add_stripes(self, file: orc.OrcFile) -> int:
        """Counts all stripes; returns the number that cannot be read completely."""
        expected = {(field.name, field.type) for field in file.schema}
        unreadable = 0
        first_row = 0
        for stripe, rows in enumerate(file.stripe_rows):
            arrays = self._read(file, stripe)
            unreadable += arrays.keys() != expected
            for (name, data_type), array in arrays.items():
                self._columns[name, data_type].add(array)
            self._shape.add_stripe_rows(rows)
            by_name = {name: array for (name, _), array in arrays.items()}
            self._shape.add(file.path, first_row, by_name)
            self._facts.add(by_name)
            self._look_for_pairs(file, first_row, by_name)
            self._keep_first_rows(file.path, first_row, rows, arrays)
            first_row += rows
        return unreadable

    def _look_for_pairs(
        self, file: orc.OrcFile, first_row: int, arrays: dict[str, pa.Array]
    ) -> None:
        """Looks for pairs of events that training could learn from."""
        if self._learnable is None:
            return
        try:
            features.check_schema(file, self._features)
            held_out.check_times(file, self._split)
            batch = pa.RecordBatch.from_pydict(arrays)
            missing = [name for name in self._learnable.column_names if name not in arrays]
            if missing:
                raise UserError(f"{file.path}: column {missing[0]} cannot be read")
            self._learnable.add(batch, file, first_row)
        except UserError as error:
            self._learnable.add_unreadable(str(error))

    def _warnings(self) -> list[str]:
        warnings = self._facts.warnings()
        if self._learnable is not None:
            nothing = self._learnable.why_nothing()
            warnings += self._learnable.notes() if nothing is None else [f"warning: {nothing}"]
        return warnings + self._shape.warnings(self._settings.paths)

    def _read(self, file: orc.OrcFile, stripe: int) -> dict[tuple[str, pa.DataType], pa.Array]:
        """The columns of a stripe by name and type, without those that cannot be read."""
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
                _print_error(error)
        return {
            (field.name, field.type): batch.column(i)
            for batch in batches
            for i, field in enumerate(batch.schema)
            if (field.name, field.type) in self._columns
        }

    def _keep_first_rows(
        self,
        path: Place,
        first_row: int,
        rows: int,
        arrays: dict[tuple[str, pa.DataType], pa.Array],
    ) -> None:
        if self._first_file is None and arrays:
            self._first_file = path
        if path != self._first_file:
            return
        for row in range(min(rows, self._settings.rows - len(self._first_rows))):
            shown = [(name, _show(array, row)) for (name, _), array in arrays.items()]
            self._first_rows.append((first_row + row, shown))

    def print_tables(self, console: Console) -> None:
        console.print(self._files)
        if self.failed:
            console.print(
                f"Unreadable: {self._unreadable_files:,} of {self._file_count:,} files, and "
                f"{self._unreadable_stripes:,} stripes of the others, wholly or in part\n"
            )
        columns = _table("column", "type", *ColumnCounts.HEADERS, numbers=tuple(range(2, 10)))
        for (name, data_type), column in self._columns.items():
            type_text = _type_name(data_type)
            type_text += " (encrypted)" if (name, data_type) in self._encrypted else ""
            columns.add_row(Text(name), Text(type_text), *column.cells())
        if self._columns:
            console.print(columns)
            self._print_shape(console)
        if self._first_rows:
            values = _table("row", "column", "value", numbers=(0,))
            for row, shown in self._first_rows:
                for i, (name, value) in enumerate(shown):
                    values.add_row("" if i else f"{row:,}", Text(name), Text(value))
            console.print(Text(f"First rows of {self._first_file}"))
            console.print(values)
        for warning in self._warnings():
            console.print(Text(warning), soft_wrap=True)

    def _print_shape(self, console: Console) -> None:
        histogram = self._shape.histogram()
        if histogram is not None:
            console.print("Rows by their number of positions")
            console.print(histogram)
        for sentence in (*self._shape.sentences(self._seq_len), *self._facts.sentences()):
            console.print(Text(sentence), soft_wrap=True)
        console.print()


# ------------------------------------------------------------------------------------- printing


def _print_error(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)


def _table(*headers: str, numbers: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i in numbers else "left", overflow="fold")
    return table


def _show(array: pa.Array, row: int) -> str:
    """The value of a row, shortened."""
    if is_list(array.type) and array[row].is_valid:
        positions = array.slice(row, 1).flatten()
        shown = [_value(positions, i) for i in range(min(len(positions), _POSITIONS_SHOWN))]
        more = len(positions) - len(shown)
        shown += [f"… {more:,} more"] if more else []
        return _shorten(f"[{', '.join(shown)}]", _CHARACTERS_SHOWN)
    return _shorten(_value(array, row), _CHARACTERS_SHOWN)


def _value(array: pa.Array, index: int) -> str:
    try:
        value = array[index].as_py()
        # Where pandas is installed, Arrow makes one of its types of a time with nanoseconds.
        return str(value) if type(value).__module__.startswith("pandas") else repr(value)
    except (ValueError, OverflowError, pa.ArrowException):
        # Times too fine or too far for Python's types, unknown time zones, or text that is not UTF-8.
        return array.slice(index, 1).to_string(skip_new_lines=True)[1:-1]


def _type_name(data_type: pa.DataType) -> str:
    return _shorten(str(data_type).replace("list<item: ", "list<"), _TYPE_SHOWN)


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
