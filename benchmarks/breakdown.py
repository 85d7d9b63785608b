"""Where does the time of a step go, and how close is the step to the speed of the device?

    python benchmarks/breakdown.py --config configs/base.py [--steps 20] [--rounds 5] [--io.batch_size 8]

Times the whole step of a config on one device and, alternating with it, the parts of the step
(`step_parts.py`). Each part is a separate jitted computation with the same shapes, forward and backward
if it has both: tables (unique rows of a batch's ids, embeddings, gradients back to these rows),
attention of all layers, the rest of the dense part (projection and transformer, with q + k + v instead
of attention), the loss, and the two halves of the optimizer. Ids are random, without padding. Calls
follow each other without waiting, so dispatch counts only if it takes longer than the device. Prints
medians of the rounds. Parts do not add up exactly to the whole, because XLA fuses operations across
parts.

Also prints the ceiling (see `ceiling.py`) and MFU: the model's operations (`s2s_jax.training.flops`) per
second, as a fraction of the ceiling and of the peak in the data sheet. Memory is the allocator's peak up
to the first steps, if the device reports it, and the compiler's figure for the step.
"""

import argparse
import statistics
import time
from typing import Any

import ceiling
import jax
import numpy as np
from step_parts import Parts

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, Pack, load
from s2s_jax.config.settings import Sequences
from s2s_jax.model.linear import compute_dtype
from s2s_jax.training.flops import peak_flops, step_flops
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

BATCHES = 8


class Step:
    """The whole step; called with the number of a batch."""

    def __init__(self, config: Config):
        self.config, self.mesh = config, make_mesh(jax.devices()[:1])
        functions = make_step_functions(StepSettings.of(config), self.mesh)
        self.state, rng = functions.init(), np.random.default_rng(0)
        self.batches = [self._batch(rng) for _ in range(BATCHES)]
        self.compiled: Any = functions.train_step.lower(self.state, self.batches[0]).compile()

    def _batch(self, rng: np.random.Generator) -> dict[str, jax.Array]:
        config, columns = self.config, []
        shape = (config.io.batch_size, config.model.seq_len)
        for feature in config.features:
            most = feature.hash_bucket_size or config.table(feature.table_name).capacity // 2
            ids = rng.integers(0, most, (*shape, feature.bag_size)).astype("<i8")
            columns.append(ids.view("<i4") if feature.grows else ids.astype(np.int32))
        length = np.full(shape[0], shape[1], np.int32)
        arrays = {"ids": np.concatenate(columns, axis=-1), "length": length}
        return jax.block_until_ready(put_batch(arrays, 1, self.mesh))

    def __call__(self, number: int) -> Any:
        """Dispatches a step."""
        self.state, metrics = self.compiled(self.state, self.batches[number])
        return metrics


def clock(call: Any, steps: int) -> float:
    """Milliseconds per call, for successive calls."""
    begin, made = time.perf_counter(), None
    for number in range(steps):
        made = call(number % BATCHES)
    jax.block_until_ready(made)
    return 1e3 * (time.perf_counter() - begin) / steps


def measure(config: Config, steps: int, rounds: int) -> None:
    step = Step(config)
    # Gives new ids of growing tables their rows before anything is timed.
    clock(step, BATCHES)
    stats, analysis = jax.devices()[0].memory_stats() or {}, step.compiled.memory_analysis()
    parts = Parts(config, step.mesh, step.state, step.batches)
    calls = parts.calls | {"whole step": step}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            taken[name].append(clock(call, steps))
    ms = {name: statistics.median(each[1:]) for name, each in taken.items()}
    whole, model = ms.pop("whole step"), config.model
    sizes = f"{config.io.batch_size} x {model.seq_len:,} positions, width {model.hidden_size:,}"
    print(
        f"{jax.devices()[0].device_kind}, {sizes} x {model.num_layers} layers, {compute_dtype(model)}"
    )
    for name, each in [*ms.items(), ("sum of parts", sum(ms.values())), ("whole step", whole)]:
        print(f"  {name:20} {each:10.3f} ms {each / whole:8.1%}", flush=True)
    best = ceiling.measure(config)
    operations = step_flops(StepSettings.of(config), Sequences.of(config), devices=1)
    rate, peak = 1e3 * operations / whole, peak_flops(config.model)
    print(f"  {operations / 1e12:.3f} TFLOP a step, {rate / 1e12:.3f} TFLOP/s")
    print(f"  MFU {rate / best:.3f} of the ceiling of {best / 1e12:.3f} TFLOP/s")
    if peak is not None:
        print(f"  MFU {rate / peak:.3f} of the data sheet's {peak / 1e12:.0f} TFLOP/s")
    if "peak_bytes_in_use" in stats:
        print(f"  memory: {stats['peak_bytes_in_use'] / 1e9:.2f} GB at the peak")
    size = analysis.argument_size_in_bytes - analysis.alias_size_in_bytes
    size += analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    temporary = analysis.temp_size_in_bytes / 1e9
    print(f"  memory as compiled: {size / 1e9:.2f} GB, of it temporary {temporary:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    config = load(arguments.config, overrides)
    if config.train.gradient_accumulation_steps > 1:
        parser.error("train.gradient_accumulation_steps: expected 1")
    packs = isinstance(config.io.sequences, Pack)
    if config.loss.negatives != "in_batch" or config.loss.corrects or packs:
        parser.error(
            "expected in_batch negatives, no log-Q and no packing, because this reads no log"
        )
    measure(config, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
