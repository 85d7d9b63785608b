"""Advice on the stripes of a log.

Only whole stripes can be read. So large stripes take much memory, and few stripes limit shuffling.
"""

import statistics
from collections.abc import Sequence

from s2s_jax.config.settings import ReadingOrder
from s2s_jax.data.batching.order import STRIPES_PER_SHARD, Order

# Reading is fastest between these numbers of positions per stripe, and erratic above the third one.
BEST_POSITIONS = (200_000, 800_000)
_ERRATIC_POSITIONS = 1_600_000


def advice(
    stripe_rows: Sequence[int], stripe_positions: Sequence[float], order: ReadingOrder
) -> list[str]:
    """Problems with the stripes of a log, a sentence each, without remedies.

    Args:
      stripe_rows: rows of each stripe that has rows.
      stripe_positions: positions of each stripe for which they are known; at least one.
      order: says how the log is shuffled.
    """
    wrong = (
        _too_few(stripe_rows, stripe_positions, order),
        _badly_sized(stripe_positions, order),
    )
    return [text for text in wrong if text is not None]


def remedy(paths: str) -> str:
    """The command that fixes the stripes; `paths` must be quoted for a shell."""
    return f"rewrite the log: s2s convert {paths} --format orc --output DIR"


def _too_few(
    stripe_rows: Sequence[int], stripe_positions: Sequence[float], order: ReadingOrder
) -> str | None:
    if not order.shuffle:
        return None
    needed = order.shards * STRIPES_PER_SHARD
    shards = Order(stripe_rows, order.shards, order.shuffle_rows, shuffle=True, seed=0).shards
    # For a small log, few good stripes are better than many small ones.
    if shards == order.shards or sum(stripe_positions) < BEST_POSITIONS[0] * needed:
        return None
    return (
        f"few stripes ({len(stripe_rows):,}): a shuffle never uses more than one shard for "
        f"{STRIPES_PER_SHARD} stripes, so it draws from {shards} instead of {order.shards} "
        f"(io.shards), for which there should be {needed}"
    )


def _badly_sized(stripe_positions: Sequence[float], order: ReadingOrder) -> str | None:
    low, high = BEST_POSITIONS
    best = f"{low / 1e6:g} to {high / 1e6:g} million positions per stripe are read fastest"
    erratic = sum(size > _ERRATIC_POSITIONS for size in stripe_positions)
    if erratic:
        return (
            f"huge stripes: {erratic:,} of {len(stripe_positions):,} hold more than "
            f"{_ERRATIC_POSITIONS / 1e6:g} million positions, up to {max(stripe_positions):,.0f}; only "
            f"whole stripes can be read, so memory and speed of reading are erratic, and {best}"
        )
    middle = statistics.median(stripe_positions)
    # Small stripes are right if there would be too few larger ones.
    enough = sum(stripe_positions) >= low * STRIPES_PER_SHARD * order.shards
    if middle > high or (middle < low and enough):
        size, than = ("large", "more") if middle > high else ("small", "fewer")
        return f"{size} stripes: half of them hold {middle:,.0f} positions or {than}, and {best}"
    return None
