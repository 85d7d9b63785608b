"""Whether users have several rows: what is taken for a user is a row.

A log that is written anew each day, with a row a user and day, has the same user in many files. Each of
the rows is then trained on, held out from and recommended for as if it were a user of its own.
"""

import contextlib

import pyarrow as pa

from s2s_jax.data.encoding import ids
from s2s_jax.data.inspection.columns import share
from s2s_jax.data.inspection.distinct import hashes
from s2s_jax.data.inspection.hash_tally import HashTally
from s2s_jax.data.logs import orc, stripe_sample
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError

# Columns that name users, whatever their case and whether they have underscores.
_NAMES = ("userid", "user", "uid", "memberid", "customerid", "visitorid", "accountid")
# Stripes of which the column is read before training.
_STRIPES = 256


class UserRows:
    """Counts the rows of users."""

    def __init__(self, column: str):
        """Args: column names the users."""
        self._column = column
        self._rows = 0
        self._tally = HashTally()

    def add(self, users: pa.Array) -> None:
        """Counts a row for each of `users`; rows without a user are passed over."""
        users = users.drop_null()
        self._rows += len(users)
        hash_N = hashes(users)
        self._tally.add(hash_N, hash_N)

    def sentences(self) -> list[str]:
        """How many users have how many rows, for `inspect`."""
        if not self._rows:
            return []
        _, _, rows_U = self._tally.counts()
        about = "" if self._tally.exact else "about "
        users = self._tally.of_all(len(rows_U))
        return [f"Users: {about}{users:,} in {self._rows:,} rows (column {self._column})"]

    def warnings(self) -> list[str]:
        """What several rows of a user mean, if any has them."""
        _, _, rows_U = self._tally.counts()
        several = int((rows_U > 1).sum())
        if not several:
            return []
        about = "" if self._tally.exact else "about "
        users = self._tally.of_all(len(rows_U))
        return [
            f"warning: {about}{share(self._tally.of_all(several), users)} of the {users:,} users "
            f"looked at have more than one row (column {self._column}): each row is trained on, held "
            f"out from and recommended for as a user of its own; give each user one row with "
            f"s2s convert LOG --layout orc --merge True --out DIR"
        ]


def user_column(schema: pa.Schema) -> str | None:
    """The column that names users, as its name tells; None if there is none."""
    names = {name.lower().replace("_", ""): name for name in reversed(schema.names)}
    for known in _NAMES:
        if known in names and is_user_column(schema, names[known]):
            return names[known]
    return None


def is_user_column(schema: pa.Schema, name: str) -> bool:
    """Whether a column has one number or text a row."""
    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    return pa.types.is_integer(kind) or ids.is_text(kind)


def warnings_of_log(
    index: FileIndex, column: str | None = None, most: int | None = _STRIPES
) -> list[str]:
    """`UserRows.warnings` of a log; none where no column names users.

    Args:
      index: of the files.
      column: that names users; None: as names tell.
      most: stripes of which the column is read; None: all.
    """
    column = user_column(index.files[0].schema) if column is None else column
    if column is None:
        return []
    rows = UserRows(column)
    for stripe in stripe_sample.spread(index, len(index.stripes) if most is None else most):
        file, number, _ = index.stripes[stripe]
        if is_user_column(file.schema, column):
            # The column matters for nothing else.
            with contextlib.suppress(UserError):
                rows.add(orc.read_stripe(file, number, [column]).column(0))
    return rows.warnings()
