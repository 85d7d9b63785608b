"""How fast do logs become batches, compared with only reading them?

    python benchmarks/input.py [--positions 20000000] [--rounds 3] [--log DIR]

Makes a log of four features (zstd; ids and texts, as list<list<T>>), unless DIR has one, and a second
log with the same events as list<int64>. Then alternates, in one process, with one and with two threads,
each on as many cores, between raw reading (only `read_stripe` of the four columns) and the batches of
an epoch in either layout, from ORC files and from the cache. Prints medians: million positions per
second of CPU time and of wall time, and their ratios to raw reading.
"""

import argparse
import contextlib
import dataclasses
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.memory import keep_freed_memory
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.files import find_files
from s2s_jax.data.logs.orc_writer import open_log
from s2s_jax.data.logs.synthesize import Settings, synthesize

COLUMNS = ("item_id", "cate_id", "behavior_id", "timestamp")
TEXT = ("behavior_id", "timestamp")
BATCH_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=20_000_000)
    parser.add_argument("--mean_length", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    # The reader does this too, so raw reading should have the same advantage.
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="s2s_jax_input_") as scratch:
        log = arguments.log or Path(scratch) / "log"
        if not log.exists():
            users = arguments.positions // arguments.mean_length
            synthesize(
                Settings(output=log, users=users, mean_length=arguments.mean_length, files=4)
            )
        integers = Path(scratch) / "integers"
        positions = write_integers(log, integers)
        for name, directory, texts in (("two texts", log, TEXT), ("integers", integers, ())):
            compare(name, directory, texts, positions, Path(scratch), arguments.rounds)


def write_integers(log: Path, directory: Path) -> int:
    """Writes the events of `log` as list<int64>; returns their number."""
    positions = 0
    with open_log(directory, overwrite=False) as writer:
        for path in find_files(str(log)):
            file = orc.read_footer(path)
            for stripe in range(len(file.stripe_rows)):
                batch = orc.read_stripe(file, stripe, COLUMNS)
                table = pa.table({name: flat_integers(batch.column(name)) for name in COLUMNS})
                positions += pc.sum(pc.list_value_length(table["item_id"])).as_py()
                writer.write(table)
    return positions


def flat_integers(lists: pa.ListArray) -> pa.ListArray:
    values = lists.flatten().flatten()
    if pa.types.is_string(values.type):
        digits = pc.all(pc.utf8_is_digit(values)).as_py()
        values = values.cast(pa.int64()) if digits else pc.binary_length(values).cast(pa.int64())
    return pa.ListArray.from_arrays(lists.offsets, values)


def make_config(directory: Path, texts: tuple[str, ...], threads: int, **io) -> Config:
    features = []
    for name in COLUMNS:
        hash_type = "murmur" if name in texts else None
        features.append(
            FeatureConfig(name=name, hash_type=hash_type, hash_bucket_size=2_048_000, emb_dim=8)
        )
    return Config(
        io=IOConfig(
            data_paths=str(directory), batch_size=BATCH_ROWS, thread_num=threads, prefetch=2, **io
        ),
        features=tuple(features),
        model=ModelConfig(seq_len=1024),
    )


def read_raw(directory: Path, threads: int) -> None:
    files = [orc.read_footer(path) for path in find_files(str(directory))]
    stripes = [(file, number) for file in files for number in range(len(file.stripe_rows))]

    def read(stripe: tuple[orc.OrcFile, int]) -> int:
        return orc.read_stripe(*stripe, COLUMNS).num_rows

    with ThreadPoolExecutor(threads) as pool:
        # Two stripes per thread at a time: all results together would hold the whole log in memory.
        for start in range(0, len(stripes), 2 * threads):
            list(pool.map(read, stripes[start : start + 2 * threads]))


def read_batches(config: Config) -> None:
    reader = Reader(Reading.of(config), BATCH_ROWS)
    with contextlib.closing(reader):
        for _ in range(reader.steps_per_epoch):
            next(reader)


def compare(
    name: str, directory: Path, texts: tuple[str, ...], positions: int, scratch: Path, rounds: int
) -> None:
    print(f"== {name}: {positions:,} positions of {len(COLUMNS)} features")
    cores = sorted(os.sched_getaffinity(0))
    for threads in (1, 2):
        if len(cores) < threads:
            print(f"{threads} threads need {threads} cores, found {len(cores)}; skipped")
            continue
        os.sched_setaffinity(0, cores[:threads])
        jobs: dict[str, Callable[[], None]] = {"raw": lambda t=threads: read_raw(directory, t)}
        plain = make_config(directory, texts, threads)
        cached = make_config(directory, texts, threads, cache=str(scratch / "cache"))
        read_batches(cached)
        for layout in ("dense", "flat"):
            for source, config in (("ORC", plain), ("cache", cached)):
                io = dataclasses.replace(config.io, layout=layout)
                chosen = dataclasses.replace(config, io=io)
                jobs[f"{source}, {layout}"] = lambda c=chosen: read_batches(c)
        taken: dict[str, list[tuple[float, float]]] = {job: [] for job in jobs}
        for _ in range(rounds):
            for job, work in jobs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                work()
                taken[job].append((time.process_time() - cpu, time.perf_counter() - wall))
        report(threads, positions, taken)
        os.sched_setaffinity(0, cores)
    shutil.rmtree(scratch / "cache")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of the process so far: {peak:.2f} GB")


def report(threads: int, positions: int, taken: dict[str, list[tuple[float, float]]]) -> None:
    medians = {
        job: [statistics.median(times) for times in zip(*rounds, strict=True)]
        for job, rounds in taken.items()
    }
    raw_cpu, raw_wall = medians["raw"]
    print(f"{threads} thread(s)   M positions/s of CPU, of wall time; of raw: CPU, wall")
    for job, (cpu, wall) in medians.items():
        speeds = f"{positions / cpu / 1e6:6.2f} {positions / wall / 1e6:6.2f}"
        print(f"  {job:14} {speeds}    {raw_cpu / cpu:5.2f} {raw_wall / wall:5.2f}")


if __name__ == "__main__":
    main()
