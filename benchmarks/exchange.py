"""How many bytes does a sharded table move per step, for growing numbers of devices?

    python benchmarks/exchange.py [--devices 2 8 32 128 256] [--ids 4096] [--width 64] [--skew 1.05]

Looks up a fixed number of ids per device (power law over 10 million items, hashed over 2,048,000
buckets) and sends gradients back to the rows, on simulated CPU devices. Bytes are those of the results
of all collectives in the compiled HLO, where each iteration of a loop counts, without the n-th part
that a device gets from itself. Compares our exchange, XLA's automatic partitioning (GSPMD) of a plain
gather and scatter, and the lower bound: the unique rows that a device needs from others, once in each
direction.
"""

import argparse
import os
import re
import subprocess
import sys

BUCKETS, ITEMS = 2_048_000, 10_000_000
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "s64": 8, "u64": 8}
_COLLECTIVE = r"(all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\("


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 8, 32, 128, 256])
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--skew", type=float, default=1.05)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments.devices[0], arguments.ids, arguments.width, arguments.skew)
        return
    print(f"{arguments.ids} ids a device x {arguments.width} floats; KB a device and step")
    print("devices      ours     GSPMD     bound   ours/bound   rounds out, back")
    for devices in arguments.devices:
        # The number of simulated devices is fixed when JAX starts.
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, __file__, "--inside", "--devices", str(devices)]
        for name in ("ids", "width", "skew"):
            command += [f"--{name}", str(getattr(arguments, name))]
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=env)


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes of the results of collectives, by the computation that contains them."""
    found: dict[str, int] = {}
    computation = ""
    for line in hlo.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened:
            computation = opened.group(1)
        collective = re.search(_COLLECTIVE, line)
        if collective:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", line[: collective.start()])
            for kind, sizes in shapes:
                size = _BYTES[kind]
                for axis in filter(None, sizes.split(",")):
                    size *= int(axis)
                found[computation] = found.setdefault(computation, 0) + size
    return found


def measure(devices: int, ids_per_device: int, width: int, skew: float) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from s2s_jax.cluster.mesh import make_mesh
    from s2s_jax.config import FeatureConfig, TableConfig
    from s2s_jax.embedding import slices
    from s2s_jax.embedding.sharded import ShardedTables
    from s2s_serve.encoding import hashing

    mesh = make_mesh()
    (axis,) = mesh.axis_names
    feature = FeatureConfig(name="f", hash_bucket_size=BUCKETS, emb_dim=width)
    tables = ShardedTables((feature,), (TableConfig(name="f"),), mesh)
    (spec,) = tables.specs.values()
    rng = np.random.default_rng(0)
    # The inverse of the power law's cumulative distribution.
    chance = rng.random((devices, ids_per_device))
    ranks = (1 + chance * (ITEMS ** (1 - skew) - 1)) ** (1 / (1 - skew))
    hashed = hashing.hash_integers(ranks.astype(np.int64).reshape(-1), "murmur")
    buckets = hashing.to_buckets(hashed, BUCKETS)

    def ours(table, ids, gradient):
        found = tables.look_up({"f": table}, {}, {"f": ids})

        def visit(carry, summed):
            table, count = carry
            gradients = summed["f"]
            return table.at[gradients.rows_G].add(gradients.sums_GD, mode="drop"), count + 1

        carry = table, jnp.zeros(256, jnp.int32)
        table, count = tables.reduce(found.needed, {"f": found.rows["f"] * gradient}, visit, carry)
        return table, count, found.needed["f"].begins_n1

    def automatic(table, ids, gradient):
        rows = table[ids.reshape(-1)]
        return table.at[ids.reshape(-1)].add(rows * gradient)

    by_rows = NamedSharding(mesh, PartitionSpec(axis))
    by_batch = NamedSharding(mesh, PartitionSpec(None, axis))
    table = jax.ShapeDtypeStruct((spec.rows, width), jnp.float32, sharding=by_rows)
    ids = buckets.reshape(1, devices, ids_per_device, 1)
    shape = jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=by_batch)
    everything = devices * ids_per_device
    gradient = jax.ShapeDtypeStruct((everything, width), jnp.float32, sharding=by_rows)
    compiled = jax.jit(ours, donate_argnums=0).lower(table, shape, gradient).compile()
    gspmd = jax.jit(automatic, donate_argnums=0, out_shardings=by_rows)
    gspmd_hlo = gspmd.lower(table, shape, gradient).compile().as_text()

    zeros = jax.jit(lambda: jnp.zeros(table.shape, jnp.float32), out_shardings=by_rows)()
    ones = jax.jit(lambda: jnp.ones(gradient.shape, jnp.float32), out_shardings=by_rows)()
    _, visits, begins = compiled(zeros, jax.device_put(ids, by_batch), ones)
    runs = np.diff(np.asarray(begins).reshape(devices, devices + 1), axis=1)
    rows_U = jax.ShapeDtypeStruct((ids_per_device,), jnp.int32)
    values = jax.ShapeDtypeStruct((ids_per_device, width), jnp.float32)
    rounds_out = -(-runs.max() // slices.slice_rows(rows_U, values, devices))
    rounds_back = int(np.asarray(visits).max())

    hlo = compiled.as_text()
    moved = 0
    for computation, size in collective_bytes(hlo).items():
        body = hlo[hlo.index(f"%{computation} ") :].split("\n}")[0]
        back = "all-gather" in body
        inside = f"body=%{computation}" in hlo
        moved += size * ((rounds_back if back else rounds_out) if inside else 1)
    away = runs.sum(axis=1) - np.diagonal(runs)
    bound = 2 * 4 * width * away.mean()
    automatic_bytes = sum(collective_bytes(gspmd_hlo).values())
    moved *= (devices - 1) / devices
    automatic_bytes *= (devices - 1) / devices
    print(
        f"{devices:7} {moved / 1e3:9.0f} {automatic_bytes / 1e3:9.0f} {bound / 1e3:9.0f} "
        f"{moved / bound:12.2f}   {rounds_out}, {rounds_back}",
        flush=True,
    )


if __name__ == "__main__":
    main()
