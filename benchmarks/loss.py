"""Time and memory of the streamed softmax loss and its gradients, compared with the dense form.

    python benchmarks/loss.py [--pairs 2048 16384] [--width 256 1024] [--dtype float32] [--rounds 5]

For each number of pairs and width, computes the loss and its gradients with respect to queries and
positives, alternating between `softmax_loss`, the dense form in JAX (all logits in one matrix,
differentiated by JAX) and, if PyTorch is installed, the dense form in PyTorch. Prints medians, ratios to
the dense form in JAX, and the temporary memory that the compiler reports. A tenth of the pairs are
padding, and items repeat. Vectors are multiplied in type --dtype. The largest default needs about 8 GB.
On a GPU, leave room for PyTorch: XLA_PYTHON_CLIENT_MEM_FRACTION=0.5.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.config import LossConfig
from s2s_jax.model.loss import Pairs, softmax_loss

try:
    import torch
except ImportError:
    torch = None

CONFIG = LossConfig()
# Relative tolerance of the loss.
RTOL = {"float32": 1e-4, "bfloat16": 1e-2}


def streamed(pairs: Pairs, dtype: str):
    sums = softmax_loss(CONFIG, pairs, dtype=jnp.dtype(dtype))
    return sums.loss, sums.hits


def dense(pairs: Pairs, dtype: str):
    def unit(x_NE):
        unit_NE = x_NE * jax.lax.rsqrt(jnp.maximum((x_NE * x_NE).sum(-1, keepdims=True), 1e-12))
        return unit_NE.astype(dtype)

    item_N = pairs.item_NK[:, 0]
    own_NN = jnp.eye(item_N.size, dtype=bool)
    negative_NN = pairs.valid_N & (item_N[:, None] != item_N)
    logits_NN = jnp.einsum(
        "ne,me->nm",
        unit(pairs.queries_NE),
        unit(pairs.positives_NE),
        preferred_element_type=jnp.float32,
    )
    logits_NN = logits_NN / CONFIG.temperature
    logits_NN = jnp.where(negative_NN | own_NN, logits_NN, -1e30)
    positive_N = jnp.where(own_NN, logits_NN, 0).sum(-1)
    loss_N = jax.nn.logsumexp(logits_NN, axis=-1) - positive_N
    hit_N = positive_N > jnp.where(own_NN, -1e30, logits_NN).max(-1)
    return jnp.where(pairs.valid_N, loss_N, 0).sum(), (hit_N & pairs.valid_N).sum()


def in_torch(arrays: dict[str, np.ndarray], dtype: str) -> Callable[[], float]:
    """The dense form in PyTorch, on a GPU if there is one, else with PyTorch's number of threads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # The same as XLA's default.
        torch.set_float32_matmul_precision("high")
    queries_NE = torch.tensor(arrays["queries_NE"], requires_grad=True, device=device)
    positives_NE = torch.tensor(arrays["positives_NE"], requires_grad=True, device=device)
    valid_N = torch.tensor(arrays["valid_N"], device=device)
    item_N = torch.tensor(arrays["item_NK"][:, 0], device=device)
    own_N = torch.arange(len(item_N), device=device)

    def run() -> float:
        queries_NE.grad = positives_NE.grad = None
        unit, narrow = torch.nn.functional.normalize, getattr(torch, dtype)
        logits_NN = unit(queries_NE).to(narrow) @ unit(positives_NE).to(narrow).T
        logits_NN = logits_NN.float() / CONFIG.temperature
        negative_NN = valid_N & (item_N[:, None] != item_N)
        negative_NN.fill_diagonal_(True)
        logits_NN = logits_NN.masked_fill(~negative_NN, -1e30)
        loss_N = torch.nn.functional.cross_entropy(logits_NN, own_N, reduction="none")
        loss = (loss_N * valid_N).sum()
        loss.backward()
        with torch.no_grad():
            (logits_NN.argmax(-1) == own_N).sum().item()
        return loss.item()

    return run


def compiled(loss, arrays: dict[str, np.ndarray], dtype: str) -> tuple[Callable[[], float], float]:
    """A function that runs the loss, and the bytes of its temporary memory."""

    def value_and_grad(queries_NE, positives_NE, valid_N, item_NK):
        def of_vectors(queries_NE, positives_NE):
            return loss(Pairs(queries_NE, positives_NE, valid_N, item_NK), dtype)

        return jax.value_and_grad(of_vectors, (0, 1), has_aux=True)(queries_NE, positives_NE)

    on_device = jax.device_put(arrays)
    program = jax.jit(value_and_grad).lower(**on_device).compile()

    def run() -> float:
        return float(jax.block_until_ready(program(**on_device))[0][0])

    return run, program.memory_analysis().temp_size_in_bytes


def measure(pairs: int, width: int, dtype: str, rounds: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "queries_NE": rng.normal(size=(pairs, width)).astype(np.float32),
        "positives_NE": rng.normal(size=(pairs, width)).astype(np.float32),
        "valid_N": rng.random(pairs) < 0.9,
        "item_NK": rng.integers(0, 5000, size=(pairs, 1)).astype(np.int32),
    }
    programs: dict[str, Callable[[], float]] = {}
    memory: dict[str, float] = {}
    for name, loss in {"dense": dense, "streamed": streamed}.items():
        programs[name], memory[name] = compiled(loss, arrays, dtype)
    if torch is not None:
        programs["PyTorch"] = in_torch(arrays, dtype)

    times: dict[str, list[float]] = {name: [] for name in programs}
    values = {}
    for _ in range(rounds + 1):
        for name, run in programs.items():
            begin = time.perf_counter()
            values[name] = run()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    print(f"{pairs} pairs, width {width}, {dtype}")
    for name, median in medians.items():
        np.testing.assert_allclose(values[name], values["dense"], rtol=RTOL[dtype])
        line = f"  {name:>8}: {1e3 * median:9.1f} ms   ratio {median / medians['dense']:.2f}"
        if name in memory:
            part = memory[name] / memory["dense"]
            line += f"   temporaries {memory[name] / 1e6:8.1f} MB   ratio {part:.3f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[2048, 16_384])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", choices=tuple(RTOL), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, medians of {arguments.rounds} rounds")
    if torch is None:
        print("PyTorch is not installed; skipped")
    for pairs in arguments.pairs:
        for width in arguments.width:
            measure(pairs, width, arguments.dtype, arguments.rounds)


if __name__ == "__main__":
    main()
