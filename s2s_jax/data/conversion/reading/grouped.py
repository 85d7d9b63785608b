"""Splits the rows of sources that have one row per user, or several, into events."""

import dataclasses

from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database, shorten
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError


def unrolled(scan: sql.Scan, selection: Selection, grouped: bool, database: Database) -> sql.Scan:
    """The events of a source whose rows have lists; the scan of another source does not change.

    Every list of a row has one entry for each event, which `check_lengths` checks. Other columns have
    one value for the whole row.

    Args:
      scan: the scan of the source.
      selection: the columns to take from the source.
      grouped: whether rows have lists even if the times are no list; otherwise such lists are bags.
      database: the database that reads the source.

    Raises:
      UserError: `grouped` is set, but no column has lists.
    """
    first = selection.time
    if first is None or not _has_lists(scan, first, database):
        if not grouped:
            return scan
        names = (feature.column for feature in selection.features)
        first = next((name for name in names if _has_lists(scan, name, database)), None)
        if first is None:
            raise UserError(
                f"{scan.source}: expected lists in columns of --features or in --time_column "
                f"(--grouped), found none; leave out --grouped if each row is an event"
            )
    lists = _lists(scan, selection, first)
    table, user = scan.sql, f"CAST({scan.columns[selection.user].sql} AS VARCHAR)"
    values, columns = [], {}
    for i, name in enumerate(selection.columns):
        column = scan.columns[name]
        values.append(
            f"unnest({lists[name]}) AS e{i}" if name in lists else f"{column.sql} AS e{i}"
        )
        columns[name] = sql.Column(f"e{i}", column.type)
        if name in lists:
            element = column.type.removesuffix("[]")
            is_time = name == selection.time
            columns[name] = sql.Column(f"e{i}", element.removesuffix("[]") if is_time else element)
    return dataclasses.replace(
        scan,
        sql=f"(SELECT {', '.join(values)} FROM {table})",
        columns=columns,
        lists=sql.Lists(table, user, first, lists),
    )


def check_lengths(scan: sql.Scan, database: Database) -> None:
    """Refuses a row whose lists differ in length.

    Raises:
      UserError: there is such a row.
    """
    lists = scan.lists
    if lists is None:
        return
    lengths = {name: f"coalesce(len({value}), 0)" for name, value in lists.columns.items()}
    expected = lengths[lists.first]
    # A user without the feature has no list of it, or an empty one.
    wrong = " OR ".join(f"{length} NOT IN (0, {expected})" for length in lengths.values())
    values = ", ".join((lists.user, *lengths.values()))
    query = f"SELECT {values} FROM {lists.table} WHERE {wrong} LIMIT 1"
    for user, *row in database.run(query, scan.source):
        found = dict(zip(lengths, row, strict=True))
        events = found[lists.first]
        name = next(name for name, length in found.items() if length not in (0, events))
        raise UserError(
            f"{scan.source}: user {shorten(str(user))} has {events:,} entries in {lists.first} "
            f"but {found[name]:,} in {name}; lists of a row must have the same length"
        )


def _has_lists(scan: sql.Scan, name: str, database: Database) -> bool:
    """Whether a column has lists; of JSON, the first value decides."""
    column = scan.columns[name]
    if column.type != "JSON":
        return column.type.endswith("[]")
    kind = f"json_type({column.sql})"
    query = f"SELECT {kind} FROM {scan.sql} WHERE {kind} <> 'NULL' LIMIT 1"
    return database.run(query, scan.source) == [("ARRAY",)]


def _lists(scan: sql.Scan, selection: Selection, first: str) -> dict[str, str]:
    """The expressions of the lists of a row; that of `first` has the length of the row."""
    column = scan.columns[first]
    entries = _list(column)
    if column.type == "JSON":
        # A row without the list has no events, like a row whose list is null.
        entries = f"CASE WHEN json_type({column.sql}) <> 'NULL' THEN {entries} ELSE [] END"
    if first == selection.time and column.type.endswith("[][]"):
        # As in a log for training, where each event has a list of one time.
        entries = f"[v[1] FOR v IN {column.sql}]"
    lists = {first: entries}
    for feature in selection.features:
        column = scan.columns[feature.column]
        if feature.column != first and (column.type == "JSON" or column.type.endswith("[]")):
            lists[feature.column] = _list(column, f"len({entries})")
    return lists


def _list(column: sql.Column, length: str = "1") -> str:
    """The list of a row; a JSON value that is not an array is repeated `length` times."""
    if column.type != "JSON":
        return column.sql
    array = f"json_extract({column.sql}, '$[*]')"
    again = f"[{column.sql} FOR x IN range({length})]"
    return f"CASE json_type({column.sql}) WHEN 'ARRAY' THEN {array} ELSE {again} END"
