"""Loads a version of an export for the server."""

import dataclasses
import functools
from typing import Literal

import pyarrow as pa

import s2s_serve
from s2s_serve.server.catalogue import Catalogue
from s2s_serve.server.protocol import Model
from s2s_serve.storage.address import Place

# What reads times, and the beginnings of the names of Arrow's types of times.
_OPS = ("time_gap", "hour_of_day", "day_of_week")
_TYPES = ("timestamp", "date")


@dataclasses.dataclass(frozen=True)
class Served:
    """A version in memory.

    Attributes:
      model: answers.
      items: describes items.
    """

    model: Model
    items: Catalogue

    @functools.cached_property
    def time_columns(self) -> frozenset[str]:
        """The columns of a history that hold times, and no text that means something else."""
        features = self.model.card["features"]
        times = {
            each["column"]
            for each in features
            if each["op"] in _OPS or (each["kind"] or "").startswith(_TYPES)
        }
        return frozenset(times - {each["column"] for each in features if each["kind"] == "text"})

    @functools.cached_property
    def bytes_column(self) -> str | None:
        """The column of a history that holds the ids of items, if these are bytes."""
        kind = self.items.item_type
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        return self.model.card["item_feature"] if is_bytes else None


def load(
    directory: Place,
    search: Literal["auto", "exact", "index"] = "auto",
    check: Literal["all", "sizes"] = "all",
    threads: int | None = None,
) -> Served:
    """Loads the newest version of an export and asks it once, so that it is known to answer.

    Args:
      directory: the export.
      search: see `s2s_serve.load`.
      check: see `s2s_serve.load`.
      threads: see `s2s_serve.load`.

    Raises:
      UserError: there is no complete version.
    """
    model = s2s_serve.load(directory, search=search, check=check, threads=threads)
    model.recommend([{name: [None] for name in model.features}], k=1)
    return Served(model, Catalogue(model.items))
