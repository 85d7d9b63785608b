"""Prints in words what `s2s recommend --user_column user_id` wrote for the first users of a log.

python scripts/show_recommendations.py RECOMMENDATIONS.parquet LOG_DIRECTORY TITLES.csv
"""

import sys
from pathlib import Path

import pyarrow.orc
import pyarrow.parquet
from rich import print
from rich.table import Table

from s2s_jax.data.items.titles import read_titles

USERS, EVENTS, ITEMS = 4, 3, 3


def last_items(log: Path, users: list[int]) -> dict[int, list[int]]:
    """The items of the last events of some users, oldest first."""
    found = {}
    for path in sorted(log.glob("*.orc")):
        table = pyarrow.orc.read_table(str(path), columns=["user_id", "item_id"])
        for user, events in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if user in users:
                # Each event is a list of ids, here of one.
                found[user] = [item for event in events[-EVENTS:] for item in event]
        if len(found) == len(users):
            break
    return found


def main(recommendations: Path, log: Path, titles_file: Path) -> None:
    """Prints a table: users, their last events, and the items with the best scores."""
    titles = read_titles(titles_file)
    rows = pyarrow.parquet.read_table(recommendations).slice(0, USERS).to_pylist()
    last = last_items(log, [row["user_id"] for row in rows])
    table = Table("user", "last events", "recommended", "score", show_lines=True)
    for row in rows:
        best = list(zip(row["items"], row["scores"], strict=True))[:ITEMS]
        table.add_row(
            str(row["user_id"]),
            "\n".join(titles[str(item)] for item in last[row["user_id"]]),
            "\n".join(titles[str(item)] for item, _ in best),
            "\n".join(f"{score:.2f}" for _, score in best),
        )
    print(table)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
