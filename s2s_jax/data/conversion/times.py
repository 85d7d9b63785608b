"""Times of events: how they are stored, parsed from text, and written as whole numbers.

Expressions give NULL for a time that cannot be read.
"""

from collections.abc import Collection, Mapping, Sequence

from s2s_jax.data.conversion.reading.sql import FLOATS, INTEGERS, TIMES, seconds, text
from s2s_jax.errors import UserError

# For `--time_column`: the order of lines is the order of events.
NO_COLUMN = "none"
# For `--time_format`: read numbers as numbers, even if they look like dates.
NUMBER = "number"

# Exact for whole seconds, milliseconds … and for fractions that matter.
_DECIMAL = "DECIMAL(38,9)"
_INTEGER_TEXT = "'-?[0-9]+'"
_NUMBER_TEXT = r"'-?[0-9]+(\.[0-9]*)?'"
# DuckDB takes 01-02-14 for a day of the year 1.
_DATE_TEXT = r"'\s*[0-9]{4}[-/][0-9].*'"
_FIRST_YEAR = 1000
# Dates written as one number, by their lengths.
_DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_YEARS = ("%Y", "%y", "%G", "%c", "%x")


def check_formats(formats: Sequence[str]) -> None:
    """Refuses impossible time formats.

    Raises:
      UserError: a format has no year, or `number` is combined with other formats.
    """
    for form in formats:
        if form == NUMBER and len(formats) > 1:
            raise UserError(f"--time_format: expected {NUMBER} alone, found {' '.join(formats)}")
        if form != NUMBER and not any(year in form for year in _YEARS):
            raise UserError(
                f"--time_format: expected {NUMBER} or a format with a year, such as '%d/%m/%Y %H:%M', "
                f"found {form}"
            )


def stored(types: Collection[str], formats: Sequence[str]) -> str:
    """The type to store times in, given their types in the files."""
    found = {"DECIMAL" if kind.startswith("DECIMAL") else kind for kind in types}
    if formats and formats != (NUMBER,):
        return "VARCHAR"
    if found <= INTEGERS:
        return "BIGINT"
    if found <= TIMES:
        return "TIMESTAMP"
    return _DECIMAL if found <= {*INTEGERS, *FLOATS, "DECIMAL", "UBIGINT"} else "VARCHAR"


def of_text(value: str, kind: str) -> str:
    """Parses a text as a time of type `kind`: BIGINT, DECIMAL or TIMESTAMP."""
    if kind == "TIMESTAMP":
        # Times without a zone are in UTC, the time zone of the database.
        time = f"CAST(TRY_CAST({value} AS TIMESTAMPTZ) AS TIMESTAMP)"
        return f"CASE WHEN regexp_full_match({value}, {_DATE_TEXT}) THEN {time} END"
    form = _INTEGER_TEXT if kind == "BIGINT" else _NUMBER_TEXT
    return f"CASE WHEN regexp_full_match({value}, {form}) THEN TRY_CAST({value} AS {kind}) END"


def of_format(value: str, formats: Sequence[str]) -> str:
    """Parses a text as a TIMESTAMP, in the first format that fits."""
    parsed = [f"CAST(try_strptime({value}, {text(form)}) AS TIMESTAMP)" for form in formats]
    return f"coalesce({', '.join(parsed)})"


def whole(value: str, kind: str) -> str:
    """The int64 that is written for a time of type `kind`."""
    if kind == "TIMESTAMP":
        is_time = f"isfinite({value}) AND year({value}) >= {_FIRST_YEAR}"
        return f"CASE WHEN {is_time} THEN {seconds(value)} END"
    return value if kind == "BIGINT" else f"TRY_CAST(floor({value}) AS BIGINT)"


def text_counts(column: str) -> dict[str, str]:
    """Aggregates: the number of texts of a column that are times of each type, the simplest type first.

    A whole number also counts as a decimal.
    """
    kinds = ("BIGINT", _DECIMAL, "TIMESTAMP")
    return {kind: f"count({of_text(column, kind)})" for kind in kinds}


def digit_dates(column: str) -> dict[str, str]:
    """Aggregates: the number of values of a column that are dates in each all-digit format."""
    queries = {}
    for length, form in _DIGITS.items():
        value = f"CAST({column} AS VARCHAR)"
        has_year = f"regexp_full_match({value}, '(19|20)[0-9]{{{length - 2}}}')"
        queries[form] = (
            f"count(*) FILTER ({has_year} AND try_strptime({value}, '{form}') IS NOT NULL)"
        )
    return queries


def refuse_digit_dates(where: str, found: Mapping[str, int | str | None]) -> None:
    """Refuses numbers that all look like dates.

    Args:
      where: the file and its column.
      found: the results of `digit_dates`, and the number of `times`.

    Raises:
      UserError: all of them are dates.
    """
    for form in _DIGITS.values():
        if found["times"] and found["times"] == found[form]:
            raise UserError(
                f"{where}: all times look like dates of the format {form}; give --time_format '{form}' "
                f"if they are dates, or --time_format {NUMBER} if they are numbers"
            )
