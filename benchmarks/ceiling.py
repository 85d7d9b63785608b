"""How many operations per second do matrix products reach, with a config's shapes and a large square?

    python benchmarks/ceiling.py --config configs/base.py [--io.batch_size 8]

Multiplies in the type that the model computes in, many times within one computation, so that dispatch
does not count. Prints the best rate of five rounds for each shape, forward and backward. `breakdown.py`
takes the best rate of all as the ceiling of the device.

Shapes: M positions of a batch, D concatenated embedding width, E model width, F feed-forward width.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp

from s2s_jax.config import Config, load
from s2s_jax.model.linear import compute_dtype

ROUNDS = 5
# Side of the square product, and operations per round: about 0.1 s on a GPU.
SQUARE = {"cpu": 512}
OPERATIONS = {"cpu": 1e9}
SQUARE_ELSE, OPERATIONS_ELSE = 8192, 4e13


def shapes_of(config: Config) -> list[tuple[int, int, int]]:
    """(rows, summed dimension, columns) of the model's products: forward and both backward products."""
    model, positions = config.model, config.io.batch_size * config.model.seq_len
    width, hidden = model.hidden_size, model.dim_feedforward
    embedded = sum(feature.emb_dim for feature in config.features)
    layers = (
        (embedded, width),
        (width, 3 * width),
        (width, width),
        (width, hidden),
        (hidden, width),
    )
    shapes = []
    for size_in, size_out in layers:
        shapes += [(positions, size_in, size_out), (positions, size_out, size_in)]
        shapes.append((size_in, positions, size_out))
    square = SQUARE.get(jax.default_backend(), SQUARE_ELSE)
    return list(dict.fromkeys([*shapes, (square, square, square)]))


@functools.partial(jax.jit, static_argnums=2)
def products(a: jax.Array, b: jax.Array, count: int) -> jax.Array:
    """Multiplies a by b `count` times, one after the other."""

    def multiply(_, carry):
        # Each product depends on the one before it; otherwise XLA could drop all but one.
        a, product = carry
        a = a.at[0, 0].set(product[0, 0])
        return a, a @ b

    return jax.lax.fori_loop(0, count, multiply, (a, jnp.zeros((len(a), b.shape[1]), a.dtype)))[1]


def rate(shape: tuple[int, int, int], numbers: jax.Array) -> float:
    """Operations per second."""
    rows, between, columns = shape
    operations = 2 * math.prod(shape)
    count = max(3, round(OPERATIONS.get(jax.default_backend(), OPERATIONS_ELSE) / operations))
    a = numbers[: rows * between].reshape(rows, between)
    # Keeps products about as large as their inputs.
    b = numbers[: between * columns].reshape(between, columns) * between**-0.5
    jax.block_until_ready(products(a, b, count))
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(products(a, b, count))
        seconds.append(time.perf_counter() - begin)
    return count * operations / min(seconds)


def measure(config: Config) -> float:
    """Prints the rate of each shape; returns the best."""
    shapes, best = shapes_of(config), 0.0
    most = max(between * max(rows, columns) for rows, between, columns in shapes)
    numbers = jax.random.normal(jax.random.key(0), most, compute_dtype(config.model))
    for shape in shapes:
        reached = rate(shape, numbers)
        best = max(best, reached)
        print(
            f"  product of {' x '.join(f'{n:,}' for n in shape):24} {reached / 1e12:9.3f} TFLOP/s"
        )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    arguments, overrides = parser.parse_known_args()
    config = load(arguments.config, overrides)
    print(f"{jax.devices()[0].device_kind}, {compute_dtype(config.model)}")
    print(f"best: {measure(config) / 1e12:.3f} TFLOP/s")


if __name__ == "__main__":
    main()
