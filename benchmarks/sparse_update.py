"""Does the time of a table update depend on the size of the table? It should not: few rows change.

    python benchmarks/sparse_update.py [--rows 100000 1000000 10000000] [--ids 16384] [--width 64]

Alternates between tables of each size and times the table's part of a step with the same number of
random ids: unique rows, gather, sparse-row AdamW, scatter, with donated buffers. Ids are uniform, or
follow a power law with exponent --skew, for example 1.05. Prints medians and ratios to the smallest
table. The largest default needs about 8 GB.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.config import LRConfig
from s2s_jax.embedding import exchange, lookup
from s2s_jax.embedding.tables import TableSpec, init_table
from s2s_jax.training.step.optimizer import apply_updates, make_optimizer


def make_step(spec: TableSpec, optimizer):
    def step(params, opt_state, buckets_M1, gradient_UD):
        rows_U = lookup.deduplicate(spec, {"f": buckets_M1}).rows_U
        used_UD = lookup.read_rows(params["tables"]["t"], rows_U)
        # The gradient of 0.5·|row|² plus noise, which depends on the rows, as in a model.
        gradients = {"dense": {}, "tables": {"t": used_UD + gradient_UD}}

        def reduce(gradients, visit, carry):
            return visit(carry, {"t": exchange.RowGradients(rows_U, gradients["t"])})

        updates, opt_state = optimizer.update(gradients, opt_state, params, reduce=reduce)
        return apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--ids", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument(
        "--skew", type=float, default=0.0, help="exponent of the power law of ids; 0: uniform"
    )
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    optimizer = make_optimizer(LRConfig())
    tables = {}
    for rows in arguments.rows:
        spec = TableSpec(
            name="t", buckets=rows, emb_dim=arguments.width, init_std=0.01, features=("f",)
        )
        params = {
            "dense": {},
            "tables": {"t": jax.jit(init_table, static_argnums=0)(spec, jax.random.key(0))},
        }
        state = jax.jit(optimizer.init)(params)
        tables[rows] = (make_step(spec, optimizer), params, state)
    gradient_UD = jnp.asarray(rng.normal(size=(arguments.ids, arguments.width)), jnp.float32)

    cumulated = {rows: np.cumsum(np.arange(1.0, rows + 1) ** -arguments.skew) for rows in tables}

    def draw(rows: int) -> jax.Array:
        places = np.searchsorted(
            cumulated[rows], rng.uniform(0, cumulated[rows][-1], arguments.ids)
        )
        # Rounding may reach the end. The multiplication keeps popular ids from being neighbours.
        scattered = np.minimum(places, rows - 1) * 2_654_435_761 % rows
        return jax.block_until_ready(jnp.asarray(scattered[:, None], jnp.int32))

    times: dict[int, list[float]] = {rows: [] for rows in tables}
    for _ in range(arguments.rounds + 3):
        for rows, (step, params, state) in tables.items():
            ids = draw(rows)
            begin = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, ids, gradient_UD))
            times[rows].append(time.perf_counter() - begin)
            tables[rows] = (step, params, state)

    device = jax.devices()[0]
    drawn = f"{arguments.ids} ids of exponent {arguments.skew} x {arguments.width} floats"
    print(f"{drawn}, {device.platform} {device.device_kind}")
    medians = {rows: statistics.median(taken[3:]) for rows, taken in times.items()}
    smallest = medians[arguments.rows[0]]
    for rows, median in medians.items():
        print(f"{rows:>12,} rows: {1e3 * median:7.2f} ms   ratio {median / smallest:.2f}")


if __name__ == "__main__":
    main()
