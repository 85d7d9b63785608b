"""A model with the interface of the client that is quick, exact and predictable."""

import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_serve.errors import UnknownItemError, UserError
from s2s_serve.server.catalogue import Catalogue
from s2s_serve.server.loading import Served

ITEMS = list(range(100, 200))


class Recommended(NamedTuple):
    items: list
    scores: list
    unknown: int
    by: str


class Nearest(NamedTuple):
    items: list
    scores: list


class FakeModel:
    """Recommends the items after the last one of a history; the score tells the version.

    `calls` has the number of histories of each call. While `gate` is not set, calls wait.
    """

    features = ("item_id", "cate")

    def __init__(self, version=1, seconds=0.0):
        self.version = version
        self.seconds = seconds
        features = [{"column": name, "kind": "whole numbers", "op": "id"} for name in self.features]
        self.card = {"items": len(ITEMS), "item_feature": "item_id", "features": features}
        self.card["evaluation"] = {"eval/ndcg@10": 0.123456789}
        self.calls = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def recommend(self, histories, k=10, exclude=None, allow=None, where=None, keep_seen=None):
        self._called(histories)
        if isinstance(histories, pa.Table):
            histories = histories.to_pylist()
        if where and set(where) - {"genre"}:
            raise UserError(f"where: expected genre, found {', '.join(where)}")
        return [
            self._one(row, each, k, exclude, allow, keep_seen) for row, each in enumerate(histories)
        ]

    def _one(self, row, history, k, exclude, allow, keep_seen):
        if "item_id" not in history:
            raise UserError(f"histories: row {row} has no item_id")
        events = history["item_id"] or []
        for event in events:
            if isinstance(event, float | str):
                raise UserError(
                    f"histories: row {row}: item_id holds {event}, expected whole numbers"
                )
        flat = [i for e in events for i in (e if isinstance(e, list) else [e]) if i is not None]
        last = flat[-1] if flat else 99
        order = ITEMS[(last - 99) % 100 :] + ITEMS[: (last - 99) % 100]
        banned = set(exclude or ()) | (set() if keep_seen else set(flat))
        items = [i for i in order if i not in banned and (allow is None or i in allow)][:k]
        unknown = sum(i not in range(100, 200) for i in flat)
        scores = [self.version + 1 / (2 + n) for n in range(len(items))]
        return Recommended(items, scores, unknown, "model" if flat else "popularity")

    def similar(self, item, k=10):
        self._called([item])
        if isinstance(item, str):
            raise UserError(f"item holds text, expected whole numbers, found {item!r}"[:200])
        if item not in ITEMS:
            raise UnknownItemError(f"item: expected an item of the catalogue, found {item!r}"[:200])
        near = sorted((i for i in ITEMS if i != item), key=lambda i: (abs(i - item), i))[:k]
        return Nearest(near, [self.version - abs(i - item) / 100 for i in near])

    def encode(self, histories):
        self._called(histories)
        if isinstance(histories, pa.Table):
            histories = histories.to_pylist()
        lengths = [len(h["item_id"] or ()) if "item_id" in h else 0 for h in histories]
        return np.stack([np.array([n, self.version], np.float32) for n in lengths])

    def _called(self, histories):
        self.threads.add(threading.current_thread().name)
        self.calls.append(len(histories))
        self.gate.wait(20)
        time.sleep(self.seconds)


def items_table():
    titles = [f"Movie {i}" for i in ITEMS]
    titles[0] = "<img src=x onerror=\"document.title='owned'\">"
    titles[1] = "Amélie"
    columns = {
        "item": pa.array(ITEMS, pa.int64()),
        "count": pa.array([1000 - n for n in range(100)], pa.int64()),
        "trained": pa.array([True] * 100),
        "title": pa.array(titles),
        "cate": pa.array([i % 7 for i in ITEMS], pa.int64()),
    }
    return pa.table(columns)


def served(version=1, seconds=0.0):
    return Served(FakeModel(version, seconds), Catalogue(items_table()))


def publish(directory: Path, version):
    """Points current.json at a version, as an export does."""
    beside = directory / f"current.{version}.tmp"
    beside.write_text(json.dumps({"version": version}))
    beside.replace(directory / "current.json")


def load_fake(directory: Path):
    """Loads what `publish` wrote; a version above 900 is broken."""
    version = json.loads((directory / "current.json").read_text())["version"]
    if version > 900:
        raise UserError(
            f"{directory}/versions/{version}/manifest.json: expected 1 file, found none"
        )
    return served(version)
