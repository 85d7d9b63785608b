"""What the server needs of a model: the interface of the client, `s2s_serve.load`."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

# As in the log, and not as in JSON, which has neither times nor bytes.
Id = int | str | bytes | datetime.date
# An event has, in each column, an id, a bag of ids, or nothing.
Entry = Id | float | None | Sequence[Id | float | None]
History = Mapping[str, Sequence[Entry] | None]
Histories = Sequence[History] | pa.Table


class Recommended(Protocol):
    """The answer for one history."""

    @property
    def items(self) -> Sequence[Id]:
        """Ids, best first."""
        ...

    @property
    def scores(self) -> Sequence[float]:
        """One for each item."""
        ...

    @property
    def unknown(self) -> int:
        """The number of events that the model has never seen."""
        ...

    @property
    def by(self) -> Literal["model", "popularity"]:
        """What ranked the items."""
        ...


class Nearest(Protocol):
    """The items nearest to one."""

    @property
    def items(self) -> Sequence[Id]:
        """Ids, nearest first."""
        ...

    @property
    def scores(self) -> Sequence[float]:
        """One for each item."""
        ...


class Model(Protocol):
    """One version of an export, see `s2s_serve.load`."""

    @property
    def version(self) -> int:
        """Its number."""
        ...

    @property
    def features(self) -> Sequence[str]:
        """The columns of a history."""
        ...

    @property
    def card(self) -> Mapping[str, Any]:
        """What is known about it."""
        ...

    def recommend(
        self,
        histories: Histories,
        k: int = 10,
        exclude: Sequence[Id] | None = None,
        allow: Sequence[Id] | None = None,
        where: Mapping[str, Sequence[object]] | None = None,
        keep_seen: bool | None = None,
    ) -> Sequence[Recommended]:
        """The best items for each history."""
        ...

    def similar(self, item: Id, k: int = 10) -> Nearest:
        """The items nearest to an item."""
        ...

    def encode(self, histories: Histories) -> np.ndarray:
        """The vector of each history, f32 [n, E]."""
        ...
