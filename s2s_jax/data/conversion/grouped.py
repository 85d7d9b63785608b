"""Splits the rows of files that have one row per user into events."""

import dataclasses

from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database, shorten
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError


def unrolled(scan: sql.Scan, selection: Selection, database: Database) -> sql.Scan:
    """The events of a file whose times are lists; the scan of another file does not change.

    Every list of a row has one entry for each event. Other columns have one value for the whole row.

    Args:
      scan: the scan of the file.
      selection: the columns to take from the file.
      database: the database that reads the file.

    Raises:
      UserError: the lists of a row are not of the same length.
    """
    if selection.time is None:
        return scan
    time = scan.columns[selection.time]
    if time.type == "JSON":
        known = f"FROM {scan.sql} WHERE json_type({time.sql}) <> 'NULL'"
        query = f"SELECT json_type({time.sql}) {known} LIMIT 1"
        if database.run(query, str(scan.path)) != [("ARRAY",)]:
            return scan
    elif not time.type.endswith("[]"):
        return scan
    of_times = _list(time)
    if time.type == "JSON":
        # A row without times has no events, like a row whose list is null.
        of_times = f"CASE WHEN json_type({time.sql}) <> 'NULL' THEN {of_times} ELSE [] END"
    if time.type.endswith("[][]"):
        # As in a log for training, where each event has a list of one time.
        of_times = f"[v[1] FOR v IN {time.sql}]"
    lists = {selection.time: of_times}
    for feature in selection.features:
        column = scan.columns[feature.column]
        if column.type == "JSON" or column.type.endswith("[]"):
            lists[feature.column] = _list(column, f"len({of_times})")
    _check_lengths(scan, selection, lists, database)
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
        scan, sql=f"(SELECT {', '.join(values)} FROM {scan.sql})", columns=columns
    )


def _list(column: sql.Column, length: str = "1") -> str:
    """The list of a row; a JSON value that is not an array is repeated `length` times."""
    if column.type != "JSON":
        return column.sql
    array = f"json_extract({column.sql}, '$[*]')"
    again = f"[{column.sql} FOR x IN range({length})]"
    return f"CASE json_type({column.sql}) WHEN 'ARRAY' THEN {array} ELSE {again} END"


def _check_lengths(
    scan: sql.Scan, selection: Selection, lists: dict[str, str], database: Database
) -> None:
    user = f"CAST({scan.columns[selection.user].sql} AS VARCHAR)"
    of_times = f"coalesce(len({lists[selection.time or '']}), 0)"
    for name, value in lists.items():
        length = f"coalesce(len({value}), 0)"
        # A user without the feature has no list of it, or an empty one.
        wrong = f"{length} NOT IN (0, {of_times})"
        both = f"{length}, {of_times} FROM {scan.sql} WHERE {wrong}"
        query = f"SELECT {user}, {both} LIMIT 1"
        for found, entries, expected in database.run(query, str(scan.path)):
            raise UserError(
                f"{scan.path}: user {shorten(str(found))} has {expected:,} entries in {selection.time} "
                f"but {entries:,} in {name}; lists of a row must have the same length"
            )
