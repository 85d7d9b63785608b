"""How long does a batch take from ids to embeddings, with bucket tables and with growing tables?

    python benchmarks/look_up.py [--ids 1048576] [--width 128] [--rows 1048576] [--skew 1.05]

Ids follow a power law over half as many distinct ids as a table has rows. Alternates between both kinds
of table and times the look-up as in serving (unique rows, gather, embeddings at all places; growing
tables first find the rows of unique ids in their map); the look-up as in training, where new ids get
rows, once all ids have them; and the way back, which sums the gradients of all places by unique row.
Prints medians and million ids per second. The default needs about 6 GB.

Shapes: M places, D table width.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.cluster.mesh import make_mesh, replicated
from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding.sharded import ShardedTables, Stored
from s2s_jax.embedding.tables import init_table

BATCHES = 4


class Table:
    """A table and its operations, for ids `[1, 1, M, 1]`."""

    def __init__(self, grows: bool, rows: int, width: int):
        feature = FeatureConfig(name="t", emb_dim=width, hash_bucket_size=0 if grows else rows)
        settings = (TableConfig(name="t", capacity=rows),)
        mesh = make_mesh(jax.devices()[:1])
        tables, self.grows, self.step = ShardedTables((feature,), settings, mesh), grows, 0
        jit: Any = functools.partial(jax.jit, out_shardings=replicated(mesh))

        def make(key):
            table_RD = init_table(tables.specs["t"], key)
            moments = jnp.zeros((len(table_RD), 2 * width))
            return Stored({"t": table_RD}, {"t": moments}, tables.empty_maps())

        def embed(rows, found, ids):
            places, ids = found.places["t"][0], ids["t"][0]
            return tables.embed(rows, {"t": places}, {"t": ids})["t"]

        def look_up(stored, ids):
            found = tables.look_up(stored.values, stored.maps, ids)
            return embed(found.rows, found, ids)

        def admit(stored, ids, step):
            stored, found = tables.admit(stored, ids, step)
            return stored, (embed(found.rows, found, ids), found)

        def pull(found, ids, d_MD):
            return jax.vjp(lambda rows: embed(rows, found, ids), found.rows)[1](d_MD)

        self.stored = jit(make)(jax.random.key(0))
        self.look_up, self.pull = jit(look_up), jit(pull)
        self.admit = jit(admit, donate_argnums=0)

    def put(self, ids: np.ndarray) -> dict[str, jax.Array]:
        """Ids on the device, in the form that the table takes."""
        ids = ids.reshape(1, 1, -1, 1).astype("<i8")
        words = ids[..., None].view("<i4") if self.grows else ids.astype(np.int32)
        return jax.block_until_ready({"t": jax.device_put(words)})

    def run(self, ids: dict[str, jax.Array]) -> dict[str, float]:
        """Milliseconds of each operation."""
        self.step += 1
        step = jax.block_until_ready(jnp.int32(self.step))
        training, (self.stored, (d_MD, found)) = clock(self.admit, self.stored, ids, step)
        serving, _ = clock(self.look_up, self.stored, ids)
        back, _ = clock(self.pull, found, ids, d_MD)
        return {"serving": serving, "training": training, "way back": back}


def clock(function: Any, *arguments: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return 1e3 * (time.perf_counter() - begin), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=2**20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2**20)
    parser.add_argument("--skew", type=float, default=1.05)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    popular = np.arange(1, arguments.rows // 2 + 1) ** -arguments.skew
    popular /= popular.sum()
    drawn = [rng.choice(len(popular), arguments.ids, p=popular) for _ in range(BATCHES)]

    tables = {
        name: Table(name == "growing", arguments.rows, arguments.width)
        for name in ("buckets", "growing")
    }
    batches = {name: [table.put(ids) for ids in drawn] for name, table in tables.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in tables}
    for number in range(BATCHES + arguments.rounds):
        for name, table in tables.items():
            taken[name].append(table.run(batches[name][number % BATCHES]))

    device, unique = jax.devices()[0], len(np.unique(drawn[0]))
    print(
        f"{arguments.ids:,} ids, {unique:,} of them different, x {arguments.width} floats of "
        f"{arguments.rows:,} rows, {device.platform} {device.device_kind}"
    )
    for name, rounds in taken.items():
        for kind in rounds[0]:
            # Ids get their rows in the first rounds, which are not counted.
            median = statistics.median(each[kind] for each in rounds[BATCHES:])
            rate = arguments.ids / median / 1e3
            print(f"  {name}, {kind:10} {median:9.3f} ms   {rate:9.1f} million ids/s")


if __name__ == "__main__":
    main()
