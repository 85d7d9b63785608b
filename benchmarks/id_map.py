"""What does a growing table cost compared with a bucket table?

    python benchmarks/id_map.py [--capacity 131072 1048576 8388608] [--ids 16384 262144]

For each capacity, load and number of unique ids in a batch, times `find` (two buckets of keys per id),
find or insert (1% of the ids are new and get initial rows) and, for comparison, a plain gather of as
many rows of a bucket table. Then times whole training steps, alternating between growing tables and
bucket tables. Prints medians; what matters is how a column changes with the capacity. The largest needs
4 GB.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Config,
    FeatureConfig,
    LossConfig,
    ModelConfig,
    TableConfig,
    TrainConfig,
)
from s2s_jax.embedding import claiming, id_keys, id_map, lookup
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings


def keys_of(ids: np.ndarray) -> np.ndarray:
    low, high = ids.astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)
    keys = np.stack(id_keys.keys_of(low, high), axis=1)
    return keys[np.lexsort((keys[:, 1], keys[:, 0]))]


def make_rows(attached, rows, keys):
    new = id_keys.initial_rows(1, 0.01, keys, attached.shape[1])
    return attached.at[rows].set(new, mode="drop", unique_indices=True)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def claim(of_table, table, keys, step):
    size = keys.shape[0]
    number = jnp.arange(size, dtype=jnp.int32)
    asked = id_keys.UniqueKeys(keys, jnp.ones(size, jnp.int32), number)
    policy = claiming.Policy(1, evict=False)
    claimed = claiming.find_or_claim(of_table, asked, jnp.int32(0), step, policy, table, make_rows)
    return claimed.id_map, claimed.attached, claimed.row_U


@jax.jit
def find(of_table, keys):
    return id_map.find(of_table, keys, jnp.int32(0))


@jax.jit
def gather(table, rows):
    return lookup.read_rows(table, rows)


def clock(function, *arguments):
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return 1e3 * (time.perf_counter() - begin), result


def measure(capacity: int, load: float, sizes: list[int], width: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2**64, round(load * capacity), dtype=np.uint64)
    of_table, table = id_map.empty_map(capacity, 1), jnp.zeros((capacity, width))
    for begin in range(0, len(known), 2**16):
        part = np.full(2**16, 2**64 - 1, np.uint64)
        part[: len(known[begin : begin + 2**16])] = known[begin : begin + 2**16]
        of_table, table, _ = claim(of_table, table, keys_of(part), jnp.int32(1))
    for size in sizes:
        times: dict[str, list[float]] = {"find": [], "find or insert": [], "gather": []}
        for number in range(rounds + 2):
            # Ids that are drawn twice leave fewer unique ids; missing ids fill up.
            old = np.unique(rng.choice(known, size))
            new = rng.integers(0, 2**64, size // 100, dtype=np.uint64)
            ids = np.full(size, 2**64 - 1, np.uint64)
            ids[: len(old)] = old
            keys = jax.device_put(keys_of(ids))
            ids[: len(new)] = new
            keys_with_new = jax.device_put(keys_of(ids))
            rows = jnp.asarray(np.sort(rng.choice(capacity, size, replace=False)).astype(np.int32))
            jax.block_until_ready((keys, keys_with_new, rows))
            found = clock(find, of_table, keys)
            gathered = clock(gather, table, rows)
            claimed = clock(claim, of_table, table, keys_with_new, jnp.int32(number + 2))
            of_table, table, _ = claimed[1]
            for name, (took, _) in zip(times, (found, claimed, gathered), strict=True):
                times[name].append(took)
        of = {name: statistics.median(taken[2:]) for name, taken in times.items()}
        cells = "".join(f"{of[name]:12.2f} ms" for name in times)
        print(f"{capacity:>10,} {load:>5} {size:>8,}{cells}", flush=True)


def train_step(rows: int, rounds: int) -> None:
    """Compares growing with bucket tables in a step: 16 x 256 positions, width 256, 4 layers."""

    def config(grows: bool) -> Config:
        names = {"item_id": rows, "cate_id": 4096, "behavior_id": 4096, "timestamp": rows}
        features = tuple(
            FeatureConfig(name=name, hash_bucket_size=0 if grows else size)
            for name, size in names.items()
        )
        tables = tuple(TableConfig(name=name, capacity=size) for name, size in names.items())
        model = ModelConfig(
            seq_len=256, hidden_size=256, num_layers=4, nhead=4, dim_feedforward=256, dropout=0.0
        )
        return Config(
            features=features,
            tables=tables if grows else (),
            model=model,
            loss=LossConfig(),
            train=TrainConfig(train_steps=1),
        )

    mesh = make_mesh(jax.devices()[:1])
    rng = np.random.default_rng(0)
    state, functions, times = {}, {}, {True: [], False: []}
    for grows in times:
        functions[grows] = make_step_functions(StepSettings.of(config(grows)), mesh)
        state[grows] = functions[grows].init()
    popular = np.arange(1, rows // 2 + 1) ** -1.05
    popular /= popular.sum()
    for _ in range(rounds + 20):
        ids = [
            rng.choice(rows // 2, (16, 256), p=popular),
            rng.integers(0, 1000, (16, 256)),
            rng.integers(0, 4, (16, 256)),
            rng.integers(0, rows // 2, (16, 256)),
        ]
        for grows, taken in times.items():
            stacked = np.stack(ids, axis=-1).astype("<i8")
            words = stacked.view("<i4") if grows else stacked.astype(np.int32)
            arrays = {"length": np.full(16, 256, np.int32), "ids": np.ascontiguousarray(words)}
            batch = put_batch(arrays, 1, mesh)
            took, (state[grows], _) = clock(functions[grows].train_step, state[grows], batch)
            taken.append(took)
    of = {grows: statistics.median(taken[20:]) for grows, taken in times.items()}
    print(
        f"train step, tables of {rows:,} rows: buckets {of[False]:.1f} ms, growing {of[True]:.1f} ms, "
        f"ratio {of[True] / of[False]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, nargs="+", default=[2**17, 2**20, 2**23])
    parser.add_argument("--ids", type=int, nargs="+", default=[16_384, 262_144])
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.85])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--step_rows", type=int, default=2**20)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, rows of {arguments.width} floats")
    print("  capacity  load      ids           find find or insert         gather")
    for capacity in arguments.capacity:
        for load in arguments.load:
            sizes = [size for size in arguments.ids if size <= capacity]
            measure(capacity, load, sizes, arguments.width, arguments.rounds)
    train_step(arguments.step_rows, arguments.rounds)


if __name__ == "__main__":
    main()
