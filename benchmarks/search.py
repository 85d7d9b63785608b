"""How much faster than exact search is an index, and how long does it take to build?

    python benchmarks/search.py [--data clusters random lengths] [--items 1000000] [--methods ours ...]
    python benchmarks/search.py --vectors items.npy --user_vectors users.npy

Methods: `ours` is the index of an export; `usearch-f32`, `-f16` and `-i8` are graphs (HNSW) of usearch,
`faiss-f32`, `-f16` and `-i8` those of FAISS. Each index is built in a process of its own and opened as a
memory map. Half of the users choose the lowest effort that reaches the recall. With the other half, the
recall is measured, and the time of one user at a time: for each user, exact search (NumPy, in blocks)
and all methods follow each other. usearch must be installed.

Data: `random` has random directions, the hardest case. `clusters` is like learned vectors of length 1:
categories of very different sizes, rare items close to the center of their category, and users who are
mixtures of three items and noise. `lengths` is `clusters` with lengths that differ as exp(0.4 n), where
n is normal.

Shapes: I items, U users, E width, K items of a list, C categories.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from s2s_serve.search import exact
from s2s_serve.search import index as ours
from s2s_serve.search.recall import recall, tune

# Efforts of graphs that are tried at most.
_HIGHEST = 4096
_BLOCK = 2**18


def make(data: str, items: int, users: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of items and of users."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if data == "random":
        return unit(normal(items, width)), unit(normal(users, width))
    axis_E = np.arange(1, width + 1, dtype=np.float32) ** -0.35
    share_C = np.arange(1, max(8, items // 100) + 1) ** -0.7
    category_I = rng.choice(len(share_C), items, p=share_C / share_C.sum())
    center_CE = normal(len(share_C), width) + 0.5 * normal(width)
    own_I1 = np.exp(normal(items, 1) - 0.6)
    vectors_IE = unit((center_CE[category_I] + own_I1 * normal(items, width)) * axis_E)
    first_UE, second_UE, third_UE = (vectors_IE[rng.integers(0, items, users)] for _ in range(3))
    noise_UE = normal(users, width) * axis_E / np.linalg.norm(axis_E)
    users_UE = unit(first_UE + 0.7 * second_UE + 0.5 * third_UE + 0.6 * noise_UE)
    if data == "lengths":
        vectors_IE *= np.exp(0.4 * normal(items, 1))
    return vectors_IE, users_UE


def unit(vectors_IE: np.ndarray) -> np.ndarray:
    return vectors_IE / np.linalg.norm(vectors_IE, axis=1, keepdims=True)


class UsearchGraph:
    """A graph of usearch."""

    def __init__(self, kind: str, path: str, width: int):
        from usearch.index import Index

        self.groups = _HIGHEST
        self._index = Index(ndim=width, metric="ip", dtype=kind, enable_key_lookups=False)
        self._index.view(path)

    @staticmethod
    def build(vectors_IE: np.ndarray, path: str, kind: str, arguments: argparse.Namespace) -> None:
        """Builds a graph and writes it to a file."""
        from usearch.index import Index

        index = Index(
            ndim=vectors_IE.shape[1],
            metric="ip",
            dtype=kind,
            connectivity=arguments.connectivity,
            expansion_add=arguments.expansion,
            enable_key_lookups=False,
        )
        for begin in range(0, len(vectors_IE), _BLOCK):
            part = np.ascontiguousarray(vectors_IE[begin : begin + _BLOCK])
            index.add(np.arange(begin, begin + len(part)), part)
        index.save(path)

    def search(self, users_UE: np.ndarray, k: int, effort: int) -> np.ndarray:
        """Items of each user; see `Index.search`."""
        self._index.expansion_search = effort
        threads = 1 if len(users_UE) == 1 else 0
        found = self._index.search(users_UE, k, threads=threads).keys
        return found.astype(np.int64).reshape(len(users_UE), -1)


class FaissGraph:
    """A graph of FAISS."""

    def __init__(self, path: str):
        import faiss

        self.groups, self._faiss = _HIGHEST, faiss
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)

    @staticmethod
    def build(vectors_IE: np.ndarray, path: str, kind: str, arguments: argparse.Namespace) -> None:
        """Builds a graph and writes it to a file."""
        import faiss

        width, product = vectors_IE.shape[1], faiss.METRIC_INNER_PRODUCT
        if kind == "f32":
            index = faiss.IndexHNSWFlat(width, arguments.connectivity, product)
        else:
            kinds = faiss.ScalarQuantizer
            stored = {"f16": kinds.QT_fp16, "i8": kinds.QT_8bit}[kind]
            index = faiss.IndexHNSWSQ(width, stored, arguments.connectivity, product)
        index.hnsw.efConstruction = arguments.expansion
        index.train(vectors_IE[:_BLOCK])
        for begin in range(0, len(vectors_IE), _BLOCK):
            index.add(np.ascontiguousarray(vectors_IE[begin : begin + _BLOCK]))
        faiss.write_index(index, path)

    def search(self, users_UE: np.ndarray, k: int, effort: int) -> np.ndarray:
        """Items of each user; see `Index.search`."""
        settings = self._faiss.SearchParametersHNSW(efSearch=effort)
        return self._index.search(users_UE, k, params=settings)[1]


def build(method: str, vectors: str, path: str, arguments: argparse.Namespace, said: Any) -> None:
    """Builds an index, and says how many seconds and how many bytes of memory it took."""
    vectors_IE = np.load(vectors, mmap_mode="r")
    library, _, kind = method.partition("-")
    # Imports are not measured.
    importlib.import_module("usearch.index" if library == "usearch" else "faiss")
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    if library == "ours":
        ours.build(vectors_IE, path)
    elif library == "usearch":
        UsearchGraph.build(vectors_IE, path, kind, arguments)
    else:
        FaissGraph.build(vectors_IE, path, kind, arguments)
    taken = time.perf_counter() - begin
    done.set()
    watcher.join()
    said.put((taken, most[0] - before))


def anonymous() -> int:
    """Bytes of memory of this process, without files that are mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status: expected a line RssAnon, found none")


def opened(method: str, path: str, items: int, width: int) -> Any:
    library, _, kind = method.partition("-")
    if library == "ours":
        return ours.Index.open(path, items, width)
    return UsearchGraph(kind, path, width) if library == "usearch" else FaissGraph(path)


def build_apart(method: str, directory: Path, arguments: argparse.Namespace) -> str:
    """Builds an index in a process of its own, unless it is there; says what that took."""
    path, spawn = directory / method, multiprocessing.get_context("spawn")
    size = "file {:6.0f} MiB"
    if path.exists():
        return f"build (done before), {size.format(path.stat().st_size / 2**20)}"
    said = spawn.SimpleQueue()
    unfinished = f"{path}.unfinished"
    work = (method, f"{directory}/vectors.npy", unfinished, arguments, said)
    process = spawn.Process(target=build, args=work)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{method}: it could not be built (exit code {process.exitcode})")
    seconds, memory = said.get()
    os.replace(unfinished, path)
    size = size.format(path.stat().st_size / 2**20)
    return f"build {seconds:7.1f} s, memory {memory / 2**20:6.0f} MiB, {size}"


def measure(
    name: str, vectors_IE: np.ndarray, users_UE: np.ndarray, arguments: argparse.Namespace
) -> None:
    items, width = vectors_IE.shape
    tuning_UE, users_UE = users_UE[::2], users_UE[1::2]
    k, indexes, efforts = arguments.top_k, {}, {}
    with contextlib.ExitStack() as stack:
        kept = arguments.directory or stack.enter_context(tempfile.TemporaryDirectory())
        directory = Path(kept, f"{name}_{items}")
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "vectors.npy", vectors_IE)
        print(f"{name}: {items:,} items of width {width}, {len(users_UE)} users", flush=True)
        for method in arguments.methods:
            took = build_apart(method, directory, arguments)
            indexes[method] = opened(method, str(directory / method), items, width)
            tuned = tune(indexes[method], vectors_IE, tuning_UE, k, arguments.recall)
            efforts[method] = tuned.effort
            found = recall(indexes[method], vectors_IE, users_UE, k, tuned.effort)
            of = f"effort {tuned.effort:4} of {indexes[method].groups}"
            print(f"  {method:12} {took}, {of}, recall@{k} {found:.3f}", flush=True)
        times: dict[str, list[float]] = {key: [] for key in ("exact", *indexes)}
        # The first user reads the maps.
        for user in range(min(arguments.timed + 1, len(users_UE))):
            user_1E = users_UE[user : user + 1]
            for method, taken in times.items():
                begin = time.perf_counter()
                if method == "exact":
                    exact.top_k(user_1E, vectors_IE, k)
                else:
                    indexes[method].search(user_1E, k, efforts[method])
                taken.append(1e3 * (time.perf_counter() - begin))
        middle = {method: statistics.median(taken[1:]) for method, taken in times.items()}
        for method, taken in times.items():
            worst = float(np.quantile(taken[1:], 0.99))
            ratio = middle["exact"] / middle[method]
            line = f"{middle[method]:8.3f} ms (p99 {worst:8.3f}), exact takes {ratio:5.1f} times it"
            print(f"  {method:12} {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["clusters", "random", "lengths"]
    parser.add_argument("--data", nargs="+", default=["clusters"], choices=kinds)
    parser.add_argument("--items", type=int, default=10**6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--users", type=int, default=1000, help="for tuning and for measuring")
    parser.add_argument("--timed", type=int, default=200, help="users whose searches are timed")
    parser.add_argument("--vectors", help="a .npy file with vectors of items, instead of --data")
    parser.add_argument("--user_vectors", help="a .npy file with vectors of users")
    methods = ["ours", *(f"{a}-{b}" for a in ("usearch", "faiss") for b in ("f32", "f16", "i8"))]
    parser.add_argument("--methods", nargs="+", choices=methods, default=["ours", "usearch-f16"])
    parser.add_argument("--connectivity", type=int, default=16, help="of graphs")
    parser.add_argument("--expansion", type=int, default=128, help="of graphs, when they are built")
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--directory", help="keeps files here, and uses those that are here")
    arguments = parser.parse_args()
    if arguments.vectors is not None:
        users_UE = np.load(arguments.user_vectors)
        users_UE = users_UE[np.abs(users_UE).any(axis=1)][: arguments.users]
        measure(Path(arguments.vectors).name, np.load(arguments.vectors), users_UE, arguments)
        return
    for data in arguments.data:
        made = make(data, arguments.items, arguments.users, arguments.width)
        measure(data, *made, arguments)


if __name__ == "__main__":
    main()
