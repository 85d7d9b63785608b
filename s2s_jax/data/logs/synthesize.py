"""Makes a synthetic log to try things out: `s2s synthesize --output DIR [--users N …]`.

The log resembles that of a shop (skewed popularity, sessions, a few favourite categories per user,
purchases that depend on the item) and can be learned: every item has one fixed successor, which is the
next event with probability `successor_share`. A model that learns only this is far above chance.

Shapes: U users of a file, E events of a file, I items, C categories.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_jax.config import refuse_addresses_in
from s2s_jax.data.logs import orc_writer
from s2s_jax.errors import UserError
from s2s_jax.storage.place_option import PlaceOption
from s2s_jax.writing import replacing
from s2s_serve.storage.address import Place

_BEHAVIORS = ("pv", "cart", "fav", "buy")
_CART_SHARE, _FAV_SHARE = 0.06, 0.03
# Beta distribution of the share of purchases among an item's events: 2.4% on average.
_BUY_SHAPE = (0.6, 24.0)

_FIRST_SECOND = 1_700_000_000
_DAYS = 30
_FAVORITES = 3
_LENGTH_SIGMA = 0.8

# The names of categories. If there are more categories than names, the second "lamp" is "lamp (2)".
# fmt: off
_GOODS = (
    "lamp", "chair", "table", "sofa", "bed", "desk", "shelf", "rug", "mirror", "clock", "vase",
    "kettle", "mug", "plate", "bowl", "pan", "knife", "fork", "spoon", "jug", "towel", "pillow",
    "blanket", "curtain", "candle", "basket", "broom", "bucket", "hammer", "saw", "drill",
    "ladder", "shovel", "rake", "hose", "tent", "rope", "bag", "boot", "hat",
)
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The log resembles that of a shop and can be learned: every item has one fixed successor. The same
    settings give the same files.
    """

    output: PlaceOption
    """Directory for part-0.orc, part-1.orc … and titles.csv, on this machine or in a store; created if
    it does not exist"""
    users: int = 2000
    """Number of users; each is one row of the log"""
    items: int = 2000
    """Number of distinct items; at least two per category"""
    categories: int = 40
    """Number of distinct categories"""
    files: int = 4
    """Number of files"""
    mean_length: float = 40.0
    """Mean number of events per user; lengths are 2 plus a lognormal number"""
    session_length: float = 8.0
    """Mean number of events per session; the next session begins at least half an hour later"""
    successor_share: float = 0.6
    """Probability that an event's item is the fixed successor of the item before it"""
    zipf: float = 1.0
    """Skew of popularity: the r-th most popular item of a category weighs r to the power of -zipf"""
    seed: int = 0
    """Random seed"""
    overwrite: bool = False
    """Replace existing part-N.orc files and titles.csv in the directory"""


def synthesize(settings: Settings) -> list[Place]:
    """Writes the log.

    Columns: `user_id` int64; `item_id` and `cate_id` list<list<int64>>; `behavior_id` (pv, cart, fav,
    buy) and `timestamp` (seconds since 1970, increasing) list<list<string>>. Every position has exactly
    one id; the oldest event comes first. Beside the files, `titles.csv` names the items for people: the
    successor of "lamp 7" is "lamp 8".

    Returns:
      The ORC files, `part-0.orc` first.

    Raises:
      UserError: a setting is impossible, or the directory cannot be written or holds other ORC files.
    """
    return [path for path, _ in write_files(settings)]


def _check(settings: Settings) -> None:
    least = {"users": 1, "categories": 1, "files": 1, "seed": 0, "zipf": 0}
    least |= {"mean_length": 2, "session_length": 1}
    for name, bound in least.items():
        found = getattr(settings, name)
        if not (found >= bound and math.isfinite(found)):
            raise UserError(f"--{name}: expected at least {bound}, found {found}")
    if settings.items < 2 * settings.categories:
        raise UserError(
            f"--items: expected at least {2 * settings.categories}, two for each of the "
            f"{settings.categories} categories (--categories), found {settings.items}"
        )
    if settings.files > settings.users:
        raise UserError(
            f"--files: expected at most one per user (--users {settings.users}), "
            f"found {settings.files}"
        )
    if not 0 <= settings.successor_share <= 1:
        raise UserError(f"--successor_share: expected 0 to 1, found {settings.successor_share}")


# -------------------------------------------------------------------------------------- the shop


@dataclasses.dataclass(frozen=True)
class _Shop:
    """Items, categories and popularities, which all users share.

    The items of category c are `first_C[c] … first_C[c + 1] - 1`. The successor of an item is the next
    item of its category; that of the last item is the first.

    Attributes:
      first_C: int64 `[C + 1]`, the first item of each category, then the number of items.
      item_id_I: int64 ids, all distinct.
      until_I: float64 `[I + 1]`, cumulative popularities: item i has `until_I[i + 1] - until_I[i]`.
      buy_I: float64, the share of purchases among an item's events.
      until_C: float64, cumulative popularities of the categories, divided by their sum.
    """

    first_C: np.ndarray
    item_id_I: np.ndarray
    until_I: np.ndarray
    buy_I: np.ndarray
    until_C: np.ndarray


def _make_shop(settings: Settings) -> _Shop:
    rng = _draws(settings.seed, 0)
    items, categories = settings.items, settings.categories
    spare = items - 2 * categories
    sizes = 2 + rng.multinomial(spare, rng.dirichlet(np.full(categories, 2.0)))
    first_C = _starts(sizes)
    rank_I = np.concatenate([rng.permutation(size) for size in sizes]) + 1.0
    weight_C = rng.permutation(1 / np.arange(1, categories + 1) ** 0.7)
    # Ids like those of a shop: sparse, up to about 2^41, and unrelated to the category.
    gaps = rng.randint(1, max(2, 2**42 // items), size=items, dtype=np.int64)
    item_id_I = rng.permutation(10_000_000_000 + np.cumsum(gaps))
    return _Shop(
        first_C=first_C,
        item_id_I=item_id_I,
        until_I=np.concatenate([[0.0], np.cumsum(rank_I**-settings.zipf)]),
        buy_I=np.minimum(rng.beta(*_BUY_SHAPE, size=items), 0.5),
        until_C=np.cumsum(weight_C) / weight_C.sum(),
    )


# --------------------------------------------------------------------------------------- the users


def _make_users(
    settings: Settings, shop: _Shop, file: int, first_user: int, users: int
) -> pa.Table:
    """The rows of one file."""
    rng = _draws(settings.seed, 1 + file)
    extra = rng.lognormal(-(_LENGTH_SIGMA**2) / 2, _LENGTH_SIGMA, size=users)
    lengths_U = 2 + np.rint((settings.mean_length - 2) * extra).astype(np.int64)
    starts_U = _starts(lengths_U)
    events = int(starts_U[-1])
    owner_E = np.repeat(np.arange(users), lengths_U)
    is_first_E = np.zeros(events, bool)
    is_first_E[starts_U[:-1]] = True
    new_session_E = is_first_E | (rng.random_sample(events) < 1 / settings.session_length)
    follows_E = ~is_first_E & (rng.random_sample(events) < settings.successor_share)

    # When a session begins, a user switches to another favourite category, unless the session continues
    # where the last one ended.
    favorites = _draw(shop.until_C, rng.random_sample((users, _FAVORITES)))
    liking = np.cumsum(1 / np.arange(1, _FAVORITES + 1))
    favorite_E = favorites[owner_E, _draw(liking / liking[-1], rng.random_sample(events))]
    category_E = favorite_E[_latest(new_session_E & ~follows_E)]

    # Items that are not successors are drawn by popularity; the k-th one after is k successors further.
    begin_E, end_E = shop.first_C[category_E], shop.first_C[category_E + 1]
    low_E, high_E = shop.until_I[begin_E], shop.until_I[end_E]
    drawn_E = np.searchsorted(
        shop.until_I, low_E + rng.random_sample(events) * (high_E - low_E), "right"
    )
    drawn_E = np.clip(drawn_E - 1, begin_E, end_E - 1)
    anchor_E = _latest(~follows_E)
    steps_E = np.arange(events) - anchor_E
    item_E = begin_E + (drawn_E[anchor_E] - begin_E + steps_E) % (end_E - begin_E)

    buy_E = shop.buy_I[item_E]
    chance_E = rng.random_sample(events)
    behavior_E = np.zeros(events, np.int64)
    behavior_E[chance_E < buy_E + _CART_SHARE + _FAV_SHARE] = _BEHAVIORS.index("fav")
    behavior_E[chance_E < buy_E + _CART_SHARE] = _BEHAVIORS.index("cart")
    behavior_E[chance_E < buy_E] = _BEHAVIORS.index("buy")

    within_E = 1 + rng.exponential(60, size=events).astype(np.int64)
    between_E = 1800 + rng.exponential(86_400, size=events).astype(np.int64)
    passed_E = np.cumsum(np.where(new_session_E, between_E, within_E))
    begin_U = _FIRST_SECOND + rng.randint(0, _DAYS * 86_400, size=users, dtype=np.int64)
    second_E = passed_E + np.repeat(begin_U - passed_E[starts_U[:-1]], lengths_U)

    user_id_U = 100_000 + 7 * (first_user + np.arange(users))
    values = {
        "item_id": pa.array(shop.item_id_I[item_E]),
        "cate_id": pa.array(1 + category_E),
        "behavior_id": pa.array(_BEHAVIORS, pa.string()).take(pa.array(behavior_E)),
        "timestamp": pc.cast(pa.array(second_E), pa.string()),
    }
    columns = {name: _nest(value, starts_U) for name, value in values.items()}
    return pa.table({"user_id": pa.array(user_id_U)} | columns)


def _draws(seed: int, part: int) -> np.random.RandomState:
    """A generator with the same numbers in all NumPy versions, unlike `default_rng` (NEP 19)."""
    words = [seed >> shift & 0xFFFFFFFF for shift in range(0, max(seed.bit_length(), 1), 32)]
    return np.random.RandomState([part, *words])


def _draw(until: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Indices drawn with the cumulative probabilities `until`, given uniform numbers of any shape."""
    return np.minimum(np.searchsorted(until, chance, side="right"), len(until) - 1)


def _latest(marked_E: np.ndarray) -> np.ndarray:
    """Index of the last marked event at or before each event; the first event must be marked."""
    return np.maximum.accumulate(np.where(marked_E, np.arange(len(marked_E)), 0))


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Cumulative sums that start with 0: `[0, l0, l0 + l1, …]`, int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _nest(values: pa.Array, starts_U: np.ndarray) -> pa.ListArray:
    """Rows of positions, each with one id."""
    ends = pa.array(np.arange(len(values) + 1), pa.int32())
    positions = pa.ListArray.from_arrays(ends, values)
    return pa.ListArray.from_arrays(pa.array(starts_U, pa.int32()), positions)


# ------------------------------------------------------------------------------------- the files


def _write_titles(path: Place, shop: _Shop) -> None:
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["item_id", "title"])
        for category, (first, end) in enumerate(itertools.pairwise(shop.first_C)):
            turn, good = divmod(category, len(_GOODS))
            name = _GOODS[good] if turn == 0 else f"{_GOODS[good]} ({turn + 1})"
            ids = shop.item_id_I[first:end].tolist()
            rows.writerows((item, f"{name} {number}") for number, item in enumerate(ids, 1))


def write_files(settings: Settings) -> Iterator[tuple[Place, int]]:
    """Writes the files and yields each with its number of events; files appear once all are written.

    Raises:
      UserError: see `synthesize`.
    """
    refuse_addresses_in(settings, "--")
    _check(settings)
    titles = settings.output / "titles.csv"
    with orc_writer.open_log(settings.output, settings.overwrite) as log:
        if titles.exists() and not settings.overwrite:
            raise UserError(
                f"--output: {settings.output} already holds {titles.name}; give another directory or "
                f"--overwrite True"
            )
        shop = _make_shop(settings)
        for file in range(settings.files):
            first = settings.users * file // settings.files
            last = settings.users * (file + 1) // settings.files
            before = log.positions
            log.write(_make_users(settings, shop, file, first, last - first))
            log.end_file()
            yield log.paths[-1], log.positions - before
    _write_titles(titles, shop)
