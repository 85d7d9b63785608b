"""Does a device learn the same as a CPU? Compares the losses of the first steps.

    python benchmarks/parity.py [--steps 20]

Trains a small config, without dropout, from the same seed and on the same batches: sequences in which
item i is followed by i + 1. It runs in float32 on the CPU, and on the default device in float32 with
the highest precision of products, in float32 with the default precision (10-bit mantissas on newer
GPUs), and in bfloat16. Prints the largest relative difference of a loss from the CPU's; exits with 1 if
it is above 1e-4 in exact float32 or above 2% otherwise. Without a GPU, this compares the CPU with
itself. JAX_PLATFORMS, if set, must include the CPU.
"""

import argparse
import dataclasses
import sys

import jax
import numpy as np

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Config,
    FeatureConfig,
    ModelConfig,
    TableConfig,
    TrainConfig,
    validate,
)
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

ROWS, SEQ_LEN, ITEMS = 16, 128, 2_000
# Large enough that events differ from the start; otherwise the first steps amplify any rounding error.
INIT_STD = 0.1
EXACT, NARROW = 1e-4, 0.02


def make_config(dtype: str, attention: str) -> Config:
    features = (
        FeatureConfig(name="item_id", emb_dim=64, hash_bucket_size=ITEMS),
        FeatureConfig(name="cate_id", emb_dim=32, hash_bucket_size=64),
        FeatureConfig(name="user_id", emb_dim=32, hash_bucket_size=0),
    )
    tables = (
        TableConfig(name="item_id", init_std=INIT_STD),
        TableConfig(name="cate_id", init_std=INIT_STD),
        TableConfig(name="user_id", init_std=INIT_STD, capacity=4_096),
    )
    model = ModelConfig(
        seq_len=SEQ_LEN,
        hidden_size=128,
        num_layers=2,
        nhead=2,
        dim_feedforward=256,
        dropout=0.0,
        dtype=dtype,
        attention=attention,
    )
    config = Config(features=features, tables=tables, model=model, train=TrainConfig(train_steps=1))
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, batch_size=ROWS))
    validate(config)
    return config


def make_batches(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(steps):
        length = rng.integers(SEQ_LEN // 2, SEQ_LEN + 1, (ROWS, 1))
        items = (rng.integers(0, ITEMS, (ROWS, 1)) + np.arange(SEQ_LEN)) % ITEMS
        users = np.broadcast_to(rng.integers(0, 1_500, (ROWS, 1)), items.shape)
        words = users.astype("<i8")[..., None].view("<i4")
        ids = np.concatenate([items[..., None], items[..., None] % 64, words], axis=-1)
        ids = np.where((np.arange(SEQ_LEN) < length)[..., None], ids, -1)
        batches.append({"ids": ids.astype(np.int32), "length": length[:, 0].astype(np.int32)})
    return batches


def losses(config: Config, device: jax.Device, precision: str | None, steps: int) -> np.ndarray:
    mesh = make_mesh([device])
    with jax.default_matmul_precision(precision), jax.default_device(device):
        functions = make_step_functions(StepSettings.of(config), mesh)
        state, found = functions.init(), []
        for batch in make_batches(steps):
            state, metrics = functions.train_step(state, put_batch(batch, 1, mesh))
            found.append(float(metrics["loss"]))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    expected = losses(make_config("float32", "blocked"), cpu, "highest", steps)
    print(f"{device.device_kind}, {steps} steps; CPU's loss {expected[0]:.4f} → {expected[-1]:.4f}")
    wrong = 0
    for name, dtype, attention, precision, most in (
        ("exact float32", "float32", "xla", "highest", EXACT),
        ("float32", "float32", "auto", None, NARROW),
        ("bfloat16", "bfloat16", "auto", None, NARROW),
    ):
        found = losses(make_config(dtype, attention), device, precision, steps)
        difference = np.max(np.abs(found / expected - 1))
        # False also for NaN.
        agrees = bool(difference <= most)
        wrong += not agrees
        print(
            f"  {name:14} {found[0]:.4f} → {found[-1]:.4f}   largest difference {difference:.2e}, "
            f"allowed {most:.0e}: {'agrees' if agrees else 'DIFFERS'}",
            flush=True,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
