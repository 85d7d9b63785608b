"""Milliseconds of a request to `s2s serve`, and requests per second, beside what its parts take alone.

    python benchmarks/serving.py [--items 10000 1000000] [--seconds 10] [--events 100]

For each number of items, makes an export with the sizes of configs/ml1m.py, untrained weights, and items
whose vectors are like learned ones (see `benchmarks/search.py`). Then measures, one after the other on
the same machine: the tower alone, the search alone, the client (`Model.recommend`), and the server, with
one caller and with 16, joining requests and not. Callers are one other process, with a thread and a
connection each; they share the cores with the server.
"""

import argparse
import dataclasses
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from search import make

from s2s_jax.config import Config, FeatureConfig, LossConfig, ModelConfig
from s2s_jax.config.settings import Items
from s2s_jax.exporting import index_file, version_dir
from s2s_jax.exporting.tower import Tower
from s2s_jax.exporting.tower_files import write_tower
from s2s_jax.training.step.settings import StepSettings

SEQ_LEN, WIDTH, ROW_WIDTH = 200, 128, 64


def config_of(items: int) -> Config:
    return Config(
        features=(FeatureConfig(name="item_id", emb_dim=ROW_WIDTH, hash_bucket_size=items),),
        model=ModelConfig(
            seq_len=SEQ_LEN,
            hidden_size=WIDTH,
            num_layers=4,
            nhead=2,
            dim_feedforward=256,
            input_norm=True,
            position="rope",
        ),
        loss=dataclasses.replace(LossConfig(), target_features=("item_id",)),
    )


def write_export(directory: Path, items: int) -> None:
    """Writes an export with `items` items, without training."""
    import jax
    from flax import nnx

    from s2s_jax.embedding.tables import table_specs
    from s2s_jax.model.seq2seq import Seq2Seq
    from s2s_serve import items as served
    from s2s_serve import manifest as manifests
    from s2s_serve import tensor_file
    from s2s_serve.manifest import Manifest, TableEntry
    from s2s_serve.tensor_file import Layout

    config = config_of(items)
    of_items = Items.of(config)
    model = Seq2Seq(of_items.features, of_items.shown, config.model, nnx.Rngs(0))
    dense = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)
    vectors_IE, users_UE = make("clusters", items, 512, WIDTH)
    with version_dir.new_version(directory) as (number, path):
        write_tower(Tower.with_dense(StepSettings.of(config), jax.device_get(dense)), path)
        (spec,) = table_specs(config.features, config.tables).values()
        (path / "tables").mkdir()
        rows = rng.standard_normal((spec.rows, ROW_WIDTH), np.float32)
        for name, key, array in (
            ("tables/item_id-00000-of-00001.safetensors", "rows", rows),
            (served.VECTORS, "vectors", vectors_IE.astype(np.float32)),
        ):
            tensor_file.write(path / name, {key: Layout(array.dtype, array.shape)}, {key: [array]})
        numbers = np.arange(items)
        columns = {"item": numbers, "code": numbers, "count": numbers[::-1] + 1}
        table = pa.table(columns | {"trained": np.ones(items, bool)})
        pq.write_table(table, path / served.NAME)
        index = None
        if index_file.is_wanted("auto", items):
            begin = time.perf_counter()
            index = index_file.write_index(path, users_UE.astype(np.float32), "auto")
            found = "dropped" if index is None else str(index.recall)
            print(f"index built in {time.perf_counter() - begin:.0f} s: {found}", flush=True)
        manifest = Manifest(
            format=manifests.FORMAT,
            version=number,
            created=version_dir.now(),
            made_by="benchmarks/serving.py",
            step=0,
            evaluation={},
            features=config.features,
            kinds={"item_id": "whole numbers"},
            item_feature="item_id",
            target_features=("item_id",),
            seq_len=SEQ_LEN,
            shown_len=SEQ_LEN,
            width=WIDTH,
            similarity="cosine",
            temperature=0.05,
            items=items,
            filter_seen=True,
            untrained="keep",
            neighbours=0.0,
            tables={
                "item_id": TableEntry(
                    emb_dim=ROW_WIDTH,
                    grows=False,
                    segment_rows=spec.segment_rows,
                    shards=("tables/item_id-00000-of-00001.safetensors",),
                    default_row=None,
                )
            },
            index=index,
            files=version_dir.file_entries(path),
        )
        version_dir.finish(directory, path, manifest)


def timed(work: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call."""
    work()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 20:
        begin = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begin))
    return found


def told(name: str, found: list[float], seconds: float | None = None) -> float:
    p50, p99 = np.percentile(found, [50, 99])
    rate = "" if seconds is None else f", {len(found) / seconds:7.1f} requests/s"
    print(f"  {name:<44} p50 {p50:7.2f} ms, p99 {p99:7.2f} ms{rate}", flush=True)
    return float(p50)


def measure_parts(directory: Path, items: int, events: int, seconds: float) -> float:
    """Measures what a request consists of, in a process without JAX; returns tower + search."""
    import s2s_serve
    from s2s_serve.search.searcher import Asked

    model = s2s_serve.load(directory, check="sizes")
    rng = np.random.default_rng(1)
    events_BLD = rng.standard_normal((1, events, ROW_WIDTH), np.float32)
    length_B = np.array([events], np.int32)
    tower, searcher = model._encoder._tower, model._searcher
    of_tower = timed(lambda: tower.users(events_BLD, length_B), seconds)
    users_UE = tower.users(events_BLD, length_B)
    asked = Asked(users_UE, (np.zeros(0, np.int64), np.zeros(0, np.int64)), None, None)
    of_search = timed(lambda: searcher.top_k(asked, 10), seconds)
    sums = told("the tower alone", of_tower)
    sums += told(f"the search alone ({searcher.name})", of_search)
    if searcher.name == "index":
        vectors_IE = np.array(model._items.vectors_IE)
        told("comparing all items instead", timed(lambda: users_UE @ vectors_IE.T, seconds))
    history = {"item_id": rng.integers(0, items, events).tolist()}
    told("the client: Model.recommend", timed(lambda: model.recommend([history]), seconds))
    return sums


def call(port: int, items: int, events: int, callers: int, seconds: float) -> list[float]:
    """Milliseconds of each request of some callers."""
    found: list[list[float]] = [[] for _ in range(callers)]
    end = time.perf_counter() + seconds

    def caller(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        rng = np.random.default_rng(number)
        while time.perf_counter() < end:
            history = {"item_id": rng.integers(0, items, events).tolist()}
            body = json.dumps({"histories": [history], "k": 10})
            begin = time.perf_counter()
            connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            found[number].append(1e3 * (time.perf_counter() - begin))
            assert answer.status == 200, text

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for of_caller in found for each in of_caller]


def serve(directory: Path, max_batch: int) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "s2s_serve", str(directory), "--port", "0", "--check", "sizes"]
    command += ["--max_batch", str(max_batch)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    port = line.rpartition(":")[2].strip()
    if not port.isdecimal():
        raise SystemExit(f"the server did not start: {line}{server.stdout.read()}")
    return server, int(port)


def measure_server(directory: Path, items: int, events: int, seconds: float) -> None:
    rates = {}
    for max_batch in (64, 1):
        server, port = serve(directory, max_batch)
        how = "joined" if max_batch > 1 else "one by one"
        try:
            call(port, items, events, 4, 1.0)
            if max_batch > 1:
                alone = call(port, items, events, 1, seconds)
                told("the server, 1 caller", alone, seconds)
                parts = subprocess.run(
                    [sys.executable, __file__, "--parts", str(directory), str(items), str(events)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
                print(parts, end="")
                sums = float(parts.splitlines()[-1].split()[-2])
                p50, p99 = np.percentile(alone, [50, 99])
                print(
                    f"  p50 of the server is {p50 / sums:.2f} x tower + search, "
                    f"p99 is {p99 / p50:.2f} x p50"
                )
            found = call(port, items, events, 16, seconds)
            told(f"the server, 16 callers, {how}", found, seconds)
            rates[max_batch] = len(found) / seconds
        finally:
            server.terminate()
            server.wait()
    print(f"  joining requests gives {rates[64] / rates[1]:.2f} x the requests per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--events", type=int, default=100, help="events of a history")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--parts", nargs=3, metavar=("DIR", "ITEMS", "EVENTS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.parts:
        directory, items, events = arguments.parts
        sums = measure_parts(Path(directory), int(items), int(events), 4)
        print(f"  tower + search: {sums:.2f} ms")
        return
    print(
        f"{os.cpu_count()} cores, histories of {arguments.events} events, load {os.getloadavg()[0]:.1f}"
    )
    for items in arguments.items:
        with tempfile.TemporaryDirectory() as directory:
            print(f"{items:,} items", flush=True)
            write_export(Path(directory), items)
            measure_server(Path(directory), items, arguments.events, arguments.seconds)


if __name__ == "__main__":
    main()
