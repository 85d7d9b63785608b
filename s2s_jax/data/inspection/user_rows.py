"""Finds users with several rows, since every row is treated as a user.

A log that gets new files each day, with one row for each user of that day, has the same user in many
files. Training, evaluation and recommendation then treat each of these rows as a separate user.
"""

import contextlib

import pyarrow as pa

from s2s_jax.data.inspection.columns import share
from s2s_jax.data.inspection.distinct import hashes
from s2s_jax.data.inspection.hash_tally import HashTally
from s2s_jax.data.logs import orc, stripe_sample
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_serve.encoding import ids

# Names of columns with user ids, ignoring case and underscores.
_NAMES = ("userid", "user", "uid", "memberid", "customerid", "visitorid", "accountid")
# Stripes whose user column is read before training.
_STRIPES = 256


class UserRows:
    """Counts the rows of users."""

    def __init__(self, column: str):
        """Starts without rows; `column` is the name of the column with user ids."""
        self._column = column
        self._rows = 0
        self._tally = HashTally()

    def add(self, users: pa.Array) -> None:
        """Counts one row for each of `users`; rows without a user are ignored."""
        users = users.drop_null()
        self._rows += len(users)
        hash_N = hashes(users)
        self._tally.add(hash_N, hash_N)

    def sentences(self) -> list[str]:
        """The number of users and rows, for `s2s inspect`."""
        if not self._rows:
            return []
        _, _, rows_U = self._tally.counts()
        about = "" if self._tally.exact else "about "
        users = self._tally.of_all(len(rows_U))
        return [f"Users: {about}{users:,} in {self._rows:,} rows (column {self._column})"]

    def warnings(self) -> list[str]:
        """A warning if users have several rows."""
        _, _, rows_U = self._tally.counts()
        several = int((rows_U > 1).sum())
        if not several:
            return []
        about = "" if self._tally.exact else "about "
        users = self._tally.of_all(len(rows_U))
        return [
            f"warning: {about}{share(self._tally.of_all(several), users)} of the {users:,} users "
            f"looked at have more than one row (column {self._column}): each row is treated as a "
            f"separate user in training, evaluation and recommendation; give each user one row with "
            f"s2s convert LOG --format orc --merge --output DIR"
        ]


def user_column(schema: pa.Schema) -> str | None:
    """The column with user ids, found by its name; None if there is none."""
    names = {name.lower().replace("_", ""): name for name in reversed(schema.names)}
    for known in _NAMES:
        if known in names and is_user_column(schema, names[known]):
            return names[known]
    return None


def is_user_column(schema: pa.Schema, name: str) -> bool:
    """Whether a column has one number or text per row."""
    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    return pa.types.is_integer(kind) or ids.is_text(kind)


def warnings_of_log(
    index: FileIndex, column: str | None = None, most: int | None = _STRIPES
) -> list[str]:
    """`UserRows.warnings` of a log; empty if the log has no column with user ids.

    Args:
      index: the index of the log's files.
      column: the column with user ids; None: found by name.
      most: maximum number of stripes to read; None: all.
    """
    column = user_column(index.files[0].schema) if column is None else column
    if column is None:
        return []
    rows = UserRows(column)
    for stripe in stripe_sample.spread(index, len(index.stripes) if most is None else most):
        file, number, _ = index.stripes[stripe]
        if is_user_column(file.schema, column):
            # Nothing else needs this column.
            with contextlib.suppress(UserError):
                rows.add(orc.read_stripe(file, number, [column]).column(0))
    return rows.warnings()
