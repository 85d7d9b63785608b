"""Summaries of made-up logs, and machines."""

from hypothesis import strategies as st

from s2s_jax.planning.column_summary import ColumnSummary
from s2s_jax.planning.log_summary import Lengths, LogSummary
from s2s_jax.planning.machine import Machine

CPU = Machine(kind="cpu", devices=1, cores=2, memory=24 * 10**9)
GPU = Machine(kind="gpu", devices=4, cores=32, memory=4 * 80 * 10**9)


def column(name: str, distinct: int, **changes) -> ColumnSummary:
    """A column of single numbers."""
    settings = {"text": False, "largest_bag": 1, "once": 0.1, "repeats": 20.0, "of_item": False}
    return ColumnSummary(name=name, distinct=distinct, **(settings | changes))


def log(
    mean: float = 165.0, most_have: int = 500, longest: int = 2277, items: int = 3_416, **changes
) -> LogSummary:
    """A log, by default one like MovieLens-1M."""
    lengths = Lengths(
        mean=mean, median=mean, most_have=most_have, longest=longest, usable=1.0, ranked=1.0
    )
    settings = {
        "paths": "/log",
        "rows": 6_040,
        "events": round(6_040 * mean),
        "sampled": False,
        "lengths": lengths,
        "item": column("item_id", items),
        "columns": (
            column("cate_id", 18, of_item=True),
            column("behavior_id", 5, text=True),
        ),
    }
    return LogSummary(**(settings | changes))


NAMES = st.text(min_size=1, max_size=12).filter(
    lambda name: name != "item" and "." not in name and "\x00" not in name
)


@st.composite
def logs(draw) -> LogSummary:
    """Any log that can be summarized."""
    number = st.integers(2, 10**9)
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    columns = tuple(
        column(
            name,
            draw(st.integers(0, 10**9)),
            text=draw(st.booleans()),
            largest_bag=draw(st.integers(0, 60)),
            repeats=draw(st.floats(1, 1e6)),
            of_item=draw(st.booleans()),
        )
        for name in names
    )
    longest = draw(st.integers(4, 100_000))
    most_have = draw(st.integers(1, longest))
    mean = draw(st.floats(0.01, longest))
    rows = draw(st.integers(1, 10**10))
    return log(
        mean,
        most_have,
        longest,
        rows=rows,
        events=round(rows * mean),
        sampled=draw(st.booleans()),
        item=column("item", draw(number), text=draw(st.booleans())),
        columns=columns,
        times=draw(st.sampled_from([(), ("Times run\nfar.",)])),
        unusable=tuple((name, "why") for name in draw(st.lists(NAMES, max_size=2))),
    )


machines = st.builds(
    Machine,
    kind=st.sampled_from(["cpu", "gpu"]),
    devices=st.sampled_from([1, 2, 8]),
    cores=st.integers(1, 128),
    memory=st.integers(10**8, 10**12),
)
