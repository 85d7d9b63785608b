"""The shape of a log, as shown by `s2s inspect`: lengths of rows and sizes of stripes.

Shapes: N rows of a stripe.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table

from s2s_jax.config import Config
from s2s_jax.config.settings import ReadingOrder
from s2s_jax.data.batching import stripes
from s2s_jax.data.inspection import columns
from s2s_serve.encoding import arrow
from s2s_serve.storage.address import Place

_BAR = "▇"
_BAR_WIDTH = 40
_PERCENTILES = (10, 50, 90, 99)


class LogShape:
    """Lengths of rows and sizes of stripes.

    A row is as long as its longest column that can be a feature: training pads and truncates all columns
    of a row together, and refuses a row whose columns differ in length.
    """

    def __init__(self):
        self._lengths: Counter[int] = Counter()
        self._stripe_rows: list[int] = []
        self._stripe_positions: Counter[int] = Counter()
        self._disagreeing = 0
        self._disagreement: str | None = None

    def add_stripe_rows(self, rows: int) -> None:
        """Counts a stripe, readable or not."""
        # A stripe without rows is never read.
        if rows:
            self._stripe_rows.append(rows)

    def add(self, path: Place, first_row: int, arrays: Mapping[str, pa.Array]) -> None:
        """Counts the rows of a stripe.

        Args:
          path: the file of the stripe.
          first_row: number of the stripe's first row in the file.
          arrays: the columns of the stripe, by name.
        """
        lengths = {
            name: arrow.list_lengths(array)
            for name, array in arrays.items()
            if columns.can_be_feature(array.type)
        }
        if not lengths:
            return
        longest_N = np.maximum.reduce(list(lengths.values()))
        found, counts = np.unique(longest_N, return_counts=True)
        self._lengths.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        self._stripe_positions[int(longest_N.sum())] += 1
        wrong_N = np.zeros(len(longest_N), bool)
        for lengths_N in lengths.values():
            wrong_N |= (lengths_N != longest_N) & (lengths_N != 0)
        if wrong_N.any() and self._disagreement is None:
            row = int(np.argmax(wrong_N))
            lengths_text = ", ".join(
                f"{name} has {found[row]:,}" for name, found in lengths.items()
            )
            self._disagreement = f"{path}, row {first_row + row:,}: {lengths_text}"
        self._disagreeing += int(wrong_N.sum())

    def histogram(self) -> Table | None:
        """Rows by length, in bins between powers of two; None if no rows have a length."""
        if not self._lengths:
            return None
        bins: Counter[int] = Counter()
        for length, count in self._lengths.items():
            bins[length.bit_length()] += count
        rows, fullest = bins.total(), max(bins.values())
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("positions", "rows", ""):
            table.add_column(header, justify="right" if header else "left")
        for bits in range(min(bins), max(bins) + 1):
            low, high = (1 << bits) >> 1, max((1 << bits) - 1, 0)
            name = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            # Rounded up, so that every bin with rows has a bar.
            bar = _BAR * -(-bins[bits] * _BAR_WIDTH // fullest)
            table.add_row(name, columns.share(bins[bits], rows), bar)
        return table

    def sentences(self, seq_len: int) -> list[str]:
        """More facts about lengths, given sequences of `seq_len` positions."""
        if not self._lengths:
            return ["No column that was read is a list<T> or list<list<T>> that training can use"]
        rows = self._lengths.total()
        positions = sum(length * count for length, count in self._lengths.items())
        longer = sum(count for length, count in self._lengths.items() if length > seq_len)
        cut = sum(max(n - seq_len, 0) * count for n, count in self._lengths.items())
        upto = [f"{p}% up to {columns.percentile(self._lengths, p):,}" for p in _PERCENTILES]
        sentences = [
            f"Rows: {rows:,}, with {positions:,} positions; {', '.join(upto)}, the longest "
            f"{max(self._lengths):,}",
            f"At a seq_len of {seq_len:,}, {columns.share(longer, rows)} of the rows are truncated and "
            f"{columns.share(cut, positions)} of the positions dropped",
        ]
        if max(self._lengths) == 1:
            sentences.append("No row has more than one event, so there is nothing to learn from")
        if self._disagreement is not None:
            sentences.append(
                f"In {columns.share(self._disagreeing, rows)} of the rows, columns disagree in length, "
                f"so not all of them can be features together; the first is {self._disagreement}"
            )
        if self._stripe_rows:
            sentences.append(
                f"Stripes: {len(self._stripe_rows):,}, of {_spread(Counter(self._stripe_rows))} rows "
                f"and {_spread(self._stripe_positions)} positions (min/median/max)"
            )
        return sentences

    def warnings(self, paths: Sequence[str]) -> list[str]:
        """Warnings about the stripes of the log at `paths`, with a command that fixes them."""
        if not self._lengths or not self._stripe_rows:
            return []
        remedy = stripes.remedy(shlex.join(paths))
        sizes = list(self._stripe_positions.elements())
        wrong = stripes.advice(self._stripe_rows, sizes, ReadingOrder.of(Config()))
        return [f"warning: {text}; {remedy}" for text in wrong]


def _spread(counts: Counter[int]) -> str:
    return f"{min(counts):,} / {columns.halves(columns.median(counts))} / {max(counts):,}"
