"""Builds SQL for DuckDB: scans of event files, and expressions for their ids and times.

Expressions give NULL for a value that cannot be read.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from s2s_jax.data.conversion.reading.text_files import CsvFormat
from s2s_jax.errors import UserError

INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
# The whole numbers below that each type of fractions holds exactly.
FLOATS = {"FLOAT": 2**24, "DOUBLE": 2**53}
TIMES = {
    *("DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"),
    "TIMESTAMP WITH TIME ZONE",
}
# How DuckDB writes line endings.
_NEW_LINES = {"\n": "\\n", "\r\n": "\\r\\n", "\r": "\\r"}
_NESTED = ("STRUCT", "MAP", "UNION", "VARIANT")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a file.

    Attributes:
      sql: the expression of the column in `Scan.sql`.
      type: the type in DuckDB.
    """

    sql: str
    type: str


@dataclasses.dataclass(frozen=True)
class Scan:
    """A source, as DuckDB reads it.

    Attributes:
      source: the file or the table, as messages name it.
      sql: the table function that reads the file.
      columns: the columns, by their names in the source.
      twice: the names that several columns have.
      lists: what has to be checked if a row has lists of events.
    """

    source: str
    sql: str
    columns: dict[str, Column]
    twice: frozenset[str] = frozenset()
    lists: "Lists | None" = None


@dataclasses.dataclass(frozen=True)
class Lists:
    """The lists of a row, which must have the same length.

    Attributes:
      table: where the rows are, as in SQL's FROM.
      user: the expression of the user.
      first: the column whose list is as long as the row has events.
      columns: the expression of each list, by column.
    """

    table: str
    user: str
    first: str
    columns: dict[str, str]


def text(value: str) -> str:
    """A string literal."""
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    """A quoted identifier."""
    return '"' + value.replace('"', '""') + '"'


def file(path: Path) -> str:
    """A string literal that names one file, although DuckDB takes paths for glob patterns.

    Raises:
      UserError: the name cannot be written as such a literal.
    """
    full = str(path.absolute())
    if "\\" in full and re.search(r"[*?[]", full):
        raise UserError(f"{path}: a name with \\ beside *, ? or [ cannot be read; rename it")
    # Inside brackets a character stands for itself.
    return text(re.sub(r"[*?[]", r"[\g<0>]", full))


def scan_csv(path: Path, content: Path, form: CsvFormat, names: Sequence[str]) -> Scan:
    """The scan of a CSV file. All values are texts; bad lines go to the table reject_errors.

    Args:
      path: the file.
      content: the same content in UTF-8: the file itself, or a copy.
      form: the delimiter, quotes and line endings.
      names: the names of all columns.
    """
    # DuckDB must not guess types or skip leading lines.
    types = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(names)))
    sql = (
        f"read_csv({file(content)}, columns={{{types}}}, header={form.columns is None}, "
        f"auto_detect=false, hive_partitioning=false, delim={text(form.delimiter)}, "
        f"quote={text(form.quote)}, escape={text(form.escape or form.quote)}, "
        f"new_line={text(_NEW_LINES[form.new_line])}, store_rejects=true)"
    )
    columns = {known: Column(f"c{i}", "VARCHAR") for i, known in enumerate(names)}
    return Scan(str(path), sql, columns, repeated(names))


def repeated(names: Sequence[str]) -> frozenset[str]:
    """The names that are in the list more than once."""
    return frozenset(known for known, times in Counter(names).items() if times > 1)


def with_partitions(scan: Scan, values: Mapping[str, str | None]) -> Scan:
    """Adds columns for the values in the file's directory names, unless the file has them."""
    columns = dict(scan.columns)
    for known, value in values.items():
        constant = "CAST(NULL AS VARCHAR)" if value is None else text(value)
        if known not in columns:
            columns[known] = Column(constant, "VARCHAR")
        elif scan.sql.startswith("read_json"):
            either = f"coalesce({columns[known].sql}, to_json({constant}))"
            columns[known] = Column(either, "JSON")
    return dataclasses.replace(scan, columns=columns)


def scan_parquet(path: Path) -> str:
    """The table function of a Parquet file."""
    return f"read_parquet({file(path)}, binary_as_string=true, hive_partitioning=false)"


def scan_json(path: Path, names: Iterable[str], is_array: bool) -> Scan:
    """The scan of a JSON file, which has one object per line or one array of objects.

    A key that an object lacks is NULL, and so is every key of a line that is not an object. Dots name
    keys of inner objects: `user.id`.

    Args:
      path: the file.
      names: the keys to read.
      is_array: whether the file is one array.
    """
    layout = "array" if is_array else "newline_delimited"
    # The objects as they are: as columns, keys that differ only in case would be one.
    sql = f"read_json_objects({file(path)}, format='{layout}', ignore_errors=true)"
    return Scan(str(path), sql, {key: Column(_key(key), "JSON") for key in names})


def _key(key: str) -> str:
    """The value of a key, which may be in an inner object."""
    whole = _json_path([key])
    steps = key.split(".")
    if len(steps) == 1:
        return f"json_extract(json, {whole})"
    return f"coalesce(json_extract(json, {whole}), json_extract(json, {_json_path(steps)}))"


def _json_path(steps: Sequence[str]) -> str:
    escaped = [step.replace("\\", "\\\\").replace('"', '\\"') for step in steps]
    return text("$" + "".join(f'."{step}"' for step in escaped))


# ---------------------------------------------------------------------------- stored in the database


def supported(data_type: str, lists: bool) -> bool:
    """Whether a column of the type can be a feature or, if not `lists`, a user or time."""
    element = data_type.removesuffix("[]") if lists else data_type
    return not element.endswith("]") and not element.startswith(_NESTED)


def stored_feature(types: Collection[str], is_bag: bool) -> str:
    """The type to store a feature in, given its types in the files."""
    elements = {found.removesuffix("[]") for found in types}
    kept = "BIGINT" if elements <= INTEGERS | TIMES and not is_bag else "VARCHAR"
    # An array of JSON is seen only when it is read.
    is_list = is_bag or "JSON" in types or any(found.endswith("[]") for found in types)
    return kept + "[]" * is_list


def stored_user(types: Collection[str]) -> str:
    """The type to store user ids in."""
    return "BIGINT" if INTEGERS.issuperset(types) else "VARCHAR"


def rounded(column: Column) -> str | None:
    """An aggregate: a number of a column that may be rounded from another whole number.

    None where the column's type holds all whole numbers exactly.
    """
    element = column.type.removesuffix("[]")
    if element not in FLOATS:
        return None

    # NaN is recognized by its text, as in `_text`; it is larger than all numbers.
    def large(value: str) -> str:
        is_nan = f"CAST({value} AS VARCHAR) IN ('nan', '-nan')"
        return f"abs({value}) >= {FLOATS[element]} AND NOT {is_nan}"

    if column.type.endswith("[]"):
        return f"min(list_min([v FOR v IN {column.sql} IF {large('v')}]))"
    return f"min({column.sql}) FILTER ({large(column.sql)})"


def user_or_time(column: Column, kept: str, missing: Sequence[str]) -> str:
    """The value of a column in the type chosen by `stored_user` or `times.stored`."""
    if kept == "VARCHAR":
        return _text(column, missing)
    return f"TRY_CAST({column.sql} AS {kept})"


def feature(column: Column, kept: str, missing: Sequence[str], separator: str | None) -> str:
    """The value of a column in the type chosen by `stored_feature`, without missing ids.

    Args:
      column: the column of the file.
      kept: the type in which the feature is stored.
      missing: texts that mean that there is no id, besides the empty one.
      separator: splits a text into ids; None: a text is one id.
    """
    if not kept.endswith("[]"):
        return _id(column, kept, missing)
    ids, element = f"[{column.sql}]", column.type
    if column.type.endswith("[]"):
        ids, element = column.sql, column.type.removesuffix("[]")
    elif column.type == "JSON" or separator is not None:
        value, element = _text(column, ()), "VARCHAR"
        ids = f"[{value}]" if separator is None else f"string_split({value}, {text(separator)})"
    if column.type == "JSON":
        array = f"json_extract_string({column.sql}, '$[*]')"
        ids = f"CASE json_type({column.sql}) WHEN 'ARRAY' THEN {array} ELSE {ids} END"
    each = _id(Column("v", element), kept.removesuffix("[]"), missing)
    return f"[w FOR w IN [{each} FOR v IN {ids}] IF w IS NOT NULL]"


def seconds(timestamp: str) -> str:
    """Whole seconds since 1970, rounded down, of a TIMESTAMP."""
    return f"epoch_us(date_trunc('second', {timestamp})) // 1000000"


def _id(column: Column, kept: str, missing: Sequence[str]) -> str:
    if column.type in TIMES:
        return f"CAST({seconds(f'CAST({column.sql} AS TIMESTAMP)')} AS {kept})"
    return f"CAST({column.sql} AS {kept})" if kept == "BIGINT" else _text(column, missing)


def _text(column: Column, missing: Sequence[str]) -> str:
    value, none = f"CAST({column.sql} AS VARCHAR)", ("", *missing)
    if column.type == "JSON":
        value = f"json_extract_string({column.sql}, '$')"
    if column.type.startswith("DECIMAL") and not column.type.endswith(",0)"):
        # Exact, but with as many zeros as the type has digits.
        value = f"rtrim(rtrim({value}, '0'), '.')"
    if column.type in FLOATS:
        # NaN is recognized by its text. DuckDB 2.0 trusts Parquet's statistics, which ignore NaN, so
        # isnan would always be false.
        none = (*none, "nan", "-nan")
    return f"CASE WHEN {value} NOT IN ({', '.join(map(text, none))}) THEN {value} END"
