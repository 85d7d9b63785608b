"""Is a training step as fast as with the same model in PyTorch?

    python benchmarks/train_step.py [--hidden 256 512] [--layers 4 8] [--batch 8 4] [--seq_len 256] \
        [--peer_python /path/to/python/with/torch] [--compiled] [--dtype float32] [--rounds 10]

Alternates rounds of steps with `torch_peer.py`, which runs in a separate process and, if --peer_python
is given, in a separate environment: same sizes, same type, random ids, no dropout. As in training,
steps are dispatched without waiting, except for the last one of a round. Prints the median of the
rounds, the median of their ratios, the peak of allocated memory on a GPU, and model FLOPs per second by
the formula

    6M[D·E + Y(4E² + 2E·F)] + 6·B·Y·E·L(L+1) + 6·N²·E

with M = B·L positions, N = B(L−1) pairs, E model width, F feed-forward width, D concatenated embedding
width, Y layers. With several values of --hidden, --layers and --batch, the i-th of each make one size.
The two default sizes need about 14 GB. Without PyTorch, --peer_python none times only ours.

Both processes inherit the environment. If other programs use the same CPU cores, set
OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0; otherwise PyTorch's threads spin while they wait for each
other, which makes it several times slower. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives both processes
huge pages, if Linux has them on request: each step allocates new temporary memory, and small pages cost
10% to 33% of our time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig, LossConfig, ModelConfig, TrainConfig, validate
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

# item_id and timestamp, the first and the last, have the large tables.
FEATURES = ("item_id", "cate_id", "behavior_id", "timestamp")
EMB_DIM, SMALL_ROWS, TEMPERATURE = 128, 2_048, 0.05


def model_flops(config: Config) -> int:
    """Floating-point operations of a step on one device, by the formula above."""
    model, batch = config.model, config.io.batch_size
    length, width, hidden = model.seq_len, model.hidden_size, model.dim_feedforward
    embedded = sum(feature.emb_dim for feature in config.features)
    layers = model.num_layers * (4 * width**2 + 2 * width * hidden)
    linear = 6 * batch * length * (embedded * width + layers)
    attention = 6 * batch * model.num_layers * width * length * (length + 1)
    return linear + attention + 6 * (batch * (length - 1)) ** 2 * width


def make_config(arguments: argparse.Namespace, hidden: int, layers: int, batch: int) -> Config:
    # The published loss: every event of the batch is a candidate, with all its features.
    loss = LossConfig(temperature=TEMPERATURE)
    if not arguments.masks:
        loss = LossConfig(
            temperature=TEMPERATURE,
            mask_padding=False,
            mask_same_item=False,
            target_features=None,
        )
    rows = (arguments.rows, SMALL_ROWS, SMALL_ROWS, arguments.rows)
    made = Config(
        features=tuple(
            FeatureConfig(name=name, emb_dim=EMB_DIM, hash_bucket_size=count)
            for name, count in zip(FEATURES, rows, strict=True)
        ),
        model=ModelConfig(
            seq_len=arguments.seq_len,
            hidden_size=hidden,
            num_layers=layers,
            nhead=arguments.heads,
            dim_feedforward=hidden,
            dropout=0.0,
            dtype=arguments.dtype,
            attention=arguments.attention,
            remat=arguments.remat,
            unroll="auto" if arguments.unroll == 0 else arguments.unroll,
        ),
        loss=loss,
        train=TrainConfig(train_steps=1),
    )
    made = Config(**(vars(made) | {"io": type(made.io)(batch_size=batch)}))
    validate(made)
    return made


class Ours:
    """Steps of `config`, each with new random ids, which are on the device before the step begins."""

    def __init__(self, config: Config):
        self.config, self.mesh = config, make_mesh(jax.devices()[:1])
        functions = make_step_functions(StepSettings.of(config), self.mesh)
        self.state, self.rng = functions.init(), np.random.default_rng(0)
        self.step: Any = functions.train_step.lower(self.state, self._batch()).compile()

    def _batch(self) -> dict[str, jax.Array]:
        shape = (self.config.io.batch_size, self.config.model.seq_len)
        ids = [self.rng.integers(0, f.hash_bucket_size, shape) for f in self.config.features]
        arrays = {
            "ids": np.stack(ids, axis=-1).astype(np.int32),
            "length": np.full(shape[0], shape[1], np.int32),
        }
        return jax.block_until_ready(put_batch(arrays, 1, self.mesh))

    def run(self, steps: int) -> dict[str, Any]:
        """Seconds per step, the last loss, and the peak memory if the device reports it."""
        batches, metrics = [self._batch() for _ in range(steps)], {}
        begin = time.perf_counter()
        for batch in batches:
            self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        seconds = (time.perf_counter() - begin) / steps
        answer = {"seconds": seconds, "loss": float(metrics["loss"])}
        memory = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            answer["peak_bytes"] = memory["peak_bytes_in_use"]
        return answer


class Peer:
    """`torch_peer.py` in a separate process."""

    def __init__(self, python: str, config: Config, compiled: bool):
        model = config.model
        sizes = {
            "batch": config.io.batch_size,
            "seq_len": model.seq_len,
            "hidden": model.hidden_size,
            "layers": model.num_layers,
            "heads": model.nhead,
            "feed_forward": model.dim_feedforward,
            "emb_dim": EMB_DIM,
            "item_rows": config.features[0].hash_bucket_size,
            "time_rows": config.features[-1].hash_bucket_size,
            "temperature": config.loss.temperature,
            "dtype": model.dtype,
        }
        command = [python, str(Path(__file__).with_name("torch_peer.py"))]
        command += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        command += ["--compile"] if compiled else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def run(self, steps: int) -> dict[str, Any]:
        """See `Ours.run`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the PyTorch peer ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(arguments: argparse.Namespace, config: Config) -> None:
    model = config.model
    runners: dict[str, Any] = {"s2s_jax": Ours(config)}
    if arguments.peer_python != "none":
        runners["PyTorch eager"] = Peer(arguments.peer_python, config, compiled=False)
        if arguments.compiled:
            runners["PyTorch compiled"] = Peer(arguments.peer_python, config, compiled=True)
    for runner in runners.values():
        runner.run(arguments.warmup)
    rounds: dict[str, list[float]] = {name: [] for name in runners}
    last: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for name, runner in runners.items():
            answer = runner.run(arguments.steps)
            rounds[name].append(answer["seconds"])
            last[name] = answer
    print(
        f"hidden {model.hidden_size} x {model.num_layers} layers x seq {model.seq_len} x batch "
        f"{config.io.batch_size}, {model.dtype}, {model_flops(config) / 1e9:.1f} GFLOP a step"
    )
    for name, medians in rounds.items():
        ours = zip(rounds["s2s_jax"], medians, strict=True)
        ratio = statistics.median(one / other for one, other in ours)
        median = statistics.median(medians)
        memory = ""
        if "peak_bytes" in last[name]:
            memory = f"   peak {last[name]['peak_bytes'] / 1e9:.2f} GB"
        print(
            f"  {name:17} {1e3 * median:8.1f} ms (least {1e3 * min(medians):8.1f})   "
            f"{model_flops(config) / median / 1e9:8.1f} GFLOP/s   ours is {ratio:.2f} x its time   "
            f"loss {last[name]['loss']:.3f}{memory}",
            flush=True,
        )
        if name != "s2s_jax":
            runners[name].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2_048_000, help="rows of the two large tables")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument(
        "--unroll", type=int, default=0, help="layers per iteration of the loop; 0: the default"
    )
    parser.add_argument(
        "--masks", action="store_true", help="use the loss of base.py, not of RecIS"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--peer_python", default=sys.executable, help="Python with PyTorch; none: time only ours"
    )
    parser.add_argument("--compiled", action="store_true", help="also time compiled PyTorch")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    sizes = zip(arguments.hidden, arguments.layers, arguments.batch, strict=True)
    for hidden, layers, batch in sizes:
        measure(arguments, make_config(arguments, hidden, layers, batch))


if __name__ == "__main__":
    main()
