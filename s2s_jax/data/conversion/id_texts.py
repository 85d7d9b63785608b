"""Finds one form for each id that is written as text.

pandas turns a column of ids with a missing value into floats: one file has 12 and another 12.0 for the
same id. A column whose texts are all whole numbers becomes int64.
"""

from collections.abc import Callable, Mapping

# Whole numbers below this are exact as float64.
_EXACT = 2**53
_WHOLE = r"'-?(0|[1-9][0-9]*)\.0+'"
_FRACTION = r"'-?(0|[1-9][0-9]*)\.[0-9]+'"
# How programs write rounded numbers; no hash or product code has a plus sign.
_EXPONENT = r"'-?[0-9](\.[0-9]+)?[eE]\+[0-9]+'"


def integers(column: str, kept: str) -> dict[str, str]:
    """Aggregates: how many texts a column has, and how many of them are integers."""
    return {
        f"{column} texts": _count(column, kept, lambda v: f"{v} IS NOT NULL"),
        f"{column} integers": _count(column, kept, _is_integer),
    }


def numbers(column: str, kept: str) -> dict[str, str]:
    """Further aggregates, for a column whose texts are not all integers."""
    if kept.endswith("[]"):
        example = f"min(list_min([v FOR v IN {column} IF {_is_rounded('v')}]))"
    else:
        example = f"min({column}) FILTER ({_is_rounded(column)})"
    return {
        f"{column} whole": _count(column, kept, _is_whole),
        f"{column} fractions": _count(column, kept, lambda v: _matches(v, _FRACTION)),
        f"{column} exponents": _count(column, kept, lambda v: _matches(v, _EXPONENT)),
        f"{column} rounded": example,
    }


def only_integers(column: str, found: Mapping[str, object]) -> bool:
    """Whether all texts of a column are integers, so that `numbers` is not needed."""
    texts, plain = _counts(column, found, "texts", "integers")
    return plain == texts


def rounded(column: str, found: Mapping[str, object]) -> object:
    """A number that may have lost digits, in a column that has only numbers; None if there is none."""
    (texts,) = _counts(column, found, "texts")
    if sum(_counts(column, found, "integers", "fractions", "exponents")) != texts:
        return None
    return found[f"{column} rounded"]


def typed(column: str, kept: str, found: Mapping[str, object]) -> str:
    """The SQL expression of a column in the form in which the log has it.

    Args:
      column: the name of the column.
      kept: the type of the column, VARCHAR or VARCHAR[].
      found: the results of `integers` and, unless all texts are integers, of `numbers`.
    """
    texts, plain = _counts(column, found, "texts", "integers")
    if texts == 0:
        return column
    if plain == texts:
        return f"CAST({column} AS {kept.replace('VARCHAR', 'BIGINT')})"
    whole, fractions = _counts(column, found, "whole", "fractions")
    if plain + whole == texts:
        return _each(column, kept, lambda v: f"CAST(split_part({v}, '.', 1) AS BIGINT)")
    if plain + fractions == texts and plain and whole:
        # 4 of one file and 4.0 of another, besides 3.5.
        return _each(
            column, kept, lambda v: f"CASE WHEN contains({v}, '.') THEN {v} ELSE {v} || '.0' END"
        )
    return column


def _is_integer(value: str) -> str:
    """Whether a text is the canonical form of an int64, so that conversion loses nothing."""
    return f"coalesce(CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR) = {value}, false)"


def _is_whole(value: str) -> str:
    """Whether a text is a whole number, written with a decimal point, that float64 holds exactly."""
    number = f"TRY_CAST(split_part({value}, '.', 1) AS BIGINT)"
    is_exact = f"coalesce({number} > -{_EXACT} AND {number} < {_EXACT}, false)"
    return f"({_matches(value, _WHOLE)} AND {is_exact})"


def _is_rounded(value: str) -> str:
    """Whether a text is a whole number that may have lost digits."""
    too_large = f"({_matches(value, _WHOLE)} AND NOT {_is_whole(value)})"
    return f"({_matches(value, _EXPONENT)} OR {too_large})"


def _matches(value: str, pattern: str) -> str:
    return f"regexp_full_match({value}, {pattern})"


def _count(column: str, kept: str, condition: Callable[[str], str]) -> str:
    """An aggregate: how many values of a column meet a condition."""
    if kept.endswith("[]"):
        return f"CAST(sum(len([v FOR v IN {column} IF {condition('v')}])) AS BIGINT)"
    return f"count(*) FILTER ({condition(column)})"


def _each(column: str, kept: str, value: Callable[[str], str]) -> str:
    """Applies an expression to the values of a column."""
    return f"[{value('v')} FOR v IN {column}]" if kept.endswith("[]") else value(column)


def _counts(column: str, found: Mapping[str, object], *forms: str) -> list[int]:
    """How many texts of a column have each form; a sum over no rows is NULL."""
    counts = []
    for form in forms:
        count = found[f"{column} {form}"] or 0
        assert isinstance(count, int)
        counts.append(count)
    return counts
