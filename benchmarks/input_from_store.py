"""How much slower is reading a log from a store than from a disk, if each request waits?

    python benchmarks/input_from_store.py [--positions 4000000] [--delay 0.05] [--steps 0 20 50]

Makes a log, and copies it to an S3 server on this machine (moto), behind a proxy that waits before each
answer. Then reads an epoch of batches, alternately from the disk and from the store, with two threads;
after each batch, the loop waits like a training step of so many milliseconds. Server, proxy and reader
share the cores, so without steps this measures the server.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest
from input import BATCH_ROWS, TEXT, make_config

from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.logs.synthesize import Settings, synthesize

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
import stores


def epoch(paths: str, milliseconds: float) -> tuple[float, float, int]:
    """Seconds of an epoch, of them those until the first batch, and its batches."""
    config = make_config(Path(), TEXT, threads=2)
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, data_paths=paths))
    begin = time.perf_counter()
    with contextlib.closing(Reader(Reading.of(config), BATCH_ROWS)) as reader:
        next(reader)
        first = time.perf_counter() - begin
        for _ in range(reader.steps_per_epoch - 1):
            time.sleep(milliseconds / 1e3)
            next(reader)
        return time.perf_counter() - begin, first, reader.steps_per_epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=4_000_000)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--steps", type=float, nargs="+", default=[0, 20, 50], help="milliseconds")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    patched = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as scratch, stores.s3_server() as endpoint:
        log = Path(scratch) / "log"
        synthesize(Settings(output=log, users=arguments.positions // 400, mean_length=400, files=4))
        stores.upload(endpoint, log, "log")
        proxy = stores.Proxy(endpoint, delay=arguments.delay)
        stores.use(proxy.endpoint, patched)
        for step in arguments.steps:
            taken: dict[str, list[tuple[float, float, int]]] = {}
            for _ in range(arguments.rounds):
                for name, paths in (("disk", str(log)), ("store", f"s3://{stores.BUCKET}/log")):
                    taken.setdefault(name, []).append(epoch(paths, step))
            disk, store = (
                [statistics.median(x) for x in zip(*taken[name], strict=True)] for name in taken
            )
            print(
                f"steps of {step:g} ms: disk {disk[0]:.2f} s (first batch {disk[1]:.2f}), store "
                f"{store[0]:.2f} s (first batch {store[1]:.2f}), {disk[2]:.0f} batches; after the "
                f"first batch, the store has {(disk[0] - disk[1]) / (store[0] - store[1]):.2f} of the "
                f"disk's speed",
                flush=True,
            )
        proxy.close()


if __name__ == "__main__":
    main()
