"""The short runs whose numbers `same_numbers.py` records and compares.

Each run uses only the commands, so that it works in checkouts whose modules differ. For keys and
commands that have been renamed, it uses the names that the checkout has.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import golden_recorder
import pyarrow.parquet as pq

REPO = Path(__file__).resolve().parents[1]
DATA = Path(os.getenv("S2S_JAX_DATA", str(REPO.parent / "shared" / "data")))
QUICKSTART = REPO / "configs" / "quickstart.py"
# The values of a line of metrics.jsonl that depend on how busy the machine is.
TIMES = {"examples_per_sec", "tokens_per_sec", "step_ms", "input_wait_ms", "mfu"}

# The results of a run, by name: a number, or the digest of many numbers.
Numbers = dict[str, float | str]
Flags = dict[str, object]


class Failed(Exception):
    """A command failed."""


class Missing(Exception):
    """The data that a run needs is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Settings whose keys were renamed.

    Attributes:
      old: the settings with their old keys.
      new: the same settings with their new keys.
    """

    old: Flags
    new: Flags


HELD_OUT = Renamed(
    {"eval.held_out": 2},
    {"eval.split": "last_events", "eval.split.events": 2},
)
BY_TIME = Renamed(
    {"eval.split_at": "2023-12-15", "eval.validation_at": "2023-12-08"},
    {
        "eval.split": "by_time",
        "eval.split.at": "2023-12-15",
        "eval.split.validation_at": "2023-12-08",
    },
)
PACKED = Renamed(
    {"io.packing": "auto", "io.windows": 3},
    {"io.sequences": "pack", "io.sequences.rows": "auto", "io.sequences.windows": 3},
)
CROPPED = Renamed(
    {"io.windows": 3, "io.windows_per_epoch": 1},
    {"io.sequences": "crop", "io.sequences.windows": 3},
)
LOG_Q_STREAM = Renamed(
    {"loss.log_q": True, "loss.log_q_from": "stream"},
    {"loss.log_q": "stream"},
)
LOG_Q_CATALOGUE = Renamed(
    {"loss.log_q": True, "loss.log_q_from": "catalogue"},
    {"loss.log_q": "catalogue"},
)
COSINE = Renamed(
    {"lr.decay": "cosine", "lr.decay_steps": 28, "lr.final_ratio": 0.1},
    {"lr.decay": "cosine", "lr.decay.steps": 28, "lr.decay.final_ratio": 0.1},
)
# In the first table, ids wait for their second sighting and are soon evicted. The second has so many
# ids that it grows once and is then full.
_TABLES = {
    "item_id": {
        "init_std": 0.02,
        "capacity": 4_096,
        "admit_after": 2,
        "unknown": "default_row",
        "evict_after_steps": 5,
        "evict_every": 5,
    },
    "timestamp": {"capacity": 4_096, "max_capacity": 8_192},
}
_NUMBERS = {"item_id": 0, "timestamp": 3}
GROWING = Renamed(
    {f"features.{_NUMBERS[t]}.{key}": x for t, keys in _TABLES.items() for key, x in keys.items()},
    {f"tables.{t}.{key}": x for t, keys in _TABLES.items() for key, x in keys.items()},
)


class Checkout:
    """Runs the commands of this checkout.

    Attributes:
      work: the directory for the files that they write.
    """

    def __init__(self, work: Path):
        self.work = work
        dropped = ("JAX_", "XLA_", "S2S_JAX_", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self._environment = kept | {
            "PYTHONPATH": str(REPO),
            "PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "S2S_JAX_DATA": str(DATA),
        }
        self._help = ""

    def call(self, *command: str, **environment: str) -> None:
        """Runs a command.

        Raises:
          Failed: the command did not exit with 0.
        """
        done = subprocess.run(
            command,
            cwd=REPO,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last_lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise Failed(f"{' '.join(command)} exited with {done.returncode}:\n{last_lines}")

    def run_module(self, module: str, *arguments: str) -> None:
        """Runs `python -m module`."""
        self.call(sys.executable, "-m", module, *arguments)

    def arguments(self, config: Path, *settings: Flags | Renamed) -> list[str]:
        """Return arguments for `settings`, with the keys that this checkout has."""
        flags: Flags = {}
        for setting in settings:
            if isinstance(setting, Renamed):
                flags |= setting.old if self._knows(setting.old) else setting.new
            else:
                flags |= setting
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        return ["--config", str(config), *words]

    def _knows(self, flags: Flags) -> bool:
        """Whether the help of training lists all these keys."""
        if not self._help:
            self._help = subprocess.run(
                [sys.executable, "-m", "s2s_jax.train", "--config", str(QUICKSTART), "--help"],
                cwd=REPO,
                env=self._environment | {"COLUMNS": "200"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        listed = set(self._help.split())
        # `loss.log_q` is both an old and a new key, but `loss.log_q_from` is only an old one.
        return all(f"--{key}" in listed for key in flags)

    def log(self) -> Path:
        """Return the directory of the quickstart's log, after making the log if it is missing.

        Raises:
          Failed: none of the commands made it.
        """
        log = self.work / "log"
        if log.exists():
            return log
        modules = (
            ["s2s_jax", "synthesize"],
            ["s2s_jax.data.logs.synthesize"],
            ["s2s_jax.data.synthesize"],
        )
        failures = []
        for module in modules:
            try:
                self.run_module(*module, "--out", str(log))
            except Failed as failed:
                failures.append(str(failed))
            if (log / "part-0.orc").exists():
                return log
        raise Failed("\n".join(failures))


def read_metrics(run_dir: Path, after_step: int = 0) -> Numbers:
    """Return the numbers in the lines of metrics.jsonl after a step."""
    numbers: Numbers = {}
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        if step > after_step:
            numbers |= {f"step {step} {k}": v for k, v in line.items() if k not in TIMES}
    return numbers


def step_of(name: str) -> float:
    """Return the step of a number; infinity if it was measured at the end of a run."""
    words = name.split()
    return int(words[1]) if words[0] == "step" else math.inf


def evaluate(checkout: Checkout, words: list[str], checkpoint: str) -> Numbers:
    """Return the metrics of the test events and their intervals."""
    out = checkout.work / "evaluation.json"
    arguments = ["--checkpoint", checkpoint, "--split", "test", "--out", str(out)]
    checkout.run_module("s2s_jax.evaluate", *words, *arguments)
    found = json.loads(out.read_text())
    numbers: Numbers = {f"{k} at {checkpoint}": value for k, value in found["metrics"].items()}
    for name, (low, high) in found["intervals_95"].items():
        numbers |= {f"{name} at {checkpoint}, low": low, f"{name} at {checkpoint}, high": high}
    return numbers


def recommend(checkout: Checkout, words: list[str]) -> Numbers:
    """Return a digest of each column of the recommendations for the first file of the log."""
    out = checkout.work / "recommended.parquet"
    log = str(checkout.log() / "part-0.orc")
    arguments = ["--input", log, "--output", str(out), "--top_k", "10", "--user_column", "user_id"]
    checkout.run_module("s2s_jax.recommend", *words, *arguments)
    table = pq.read_table(out)
    return {
        f"recommended {name}": hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()
        for name in table.column_names
    }


# -------------------------------------------------------------------------------------------- runs


def quickstart_arguments(checkout: Checkout, *settings: Flags | Renamed) -> list[str]:
    """Return the arguments of a run of `configs/quickstart.py` on its log, with more `settings`."""
    common: Flags = {"io.data_paths": checkout.log(), "train.tensorboard": False}
    return checkout.arguments(QUICKSTART, common, *settings)


def quickstart(checkout: Checkout, run_dir: Path, start: int = 0) -> Numbers:
    """The complete quickstart: training, evaluation and recommendation."""
    words = quickstart_arguments(checkout, HELD_OUT, {"train.output_dir": run_dir})
    checkout.run_module("s2s_jax.train", *words)
    numbers = read_metrics(run_dir, start)
    for step in ("200", "400"):
        numbers |= evaluate(checkout, words, step)
    return numbers | recommend(checkout, words)


def growing(checkout: Checkout, run_dir: Path, start: int = 0) -> Numbers:
    """Tables that grow and evict, packed windows, a split by time: 20 steps, then 20 more."""
    settings: Flags = {
        "io.batch_size": 8,
        "features.0.hash_bucket_size": 0,
        "features.3.hash_bucket_size": 0,
        "loss.negatives": "mixed",
        "eval.every_steps": 20,
        "train.log_steps": 1,
        "train.save_steps": 20,
        "train.output_dir": run_dir,
    }
    renamed = (GROWING, PACKED, LOG_Q_STREAM, BY_TIME)
    words = quickstart_arguments(checkout, settings, *renamed)
    for steps in (20, 40):
        if steps > start:
            checkout.run_module("s2s_jax.train", *words, "--train.train_steps", str(steps))
    return read_metrics(run_dir, start) | evaluate(checkout, words, "newest")


def options(checkout: Checkout, run_dir: Path) -> Numbers:
    """Windows drawn anew in each epoch, log-Q from the catalogue, and learning rates that decay."""
    settings: Flags = {
        "loss.negatives": "mixed",
        "model.dropout": 0.2,
        "train.train_steps": 30,
        "train.log_steps": 1,
        "train.output_dir": run_dir,
    }
    words = quickstart_arguments(checkout, settings, CROPPED, LOG_Q_CATALOGUE, COSINE)
    checkout.run_module("s2s_jax.train", *words)
    return read_metrics(run_dir)


def recis(checkout: Checkout, run_dir: Path) -> Numbers:
    """The objective of the RecIS example, in a small model."""
    settings: Flags = {
        "io.data_paths": checkout.log(),
        "features.0.emb_dim": 16,
        "features.3.hash_bucket_size": 65_536,
        "model.seq_len": 32,
        "model.hidden_size": 32,
        "model.num_layers": 2,
        "model.nhead": 4,
        "model.dim_feedforward": 64,
        "train.train_steps": 20,
        "train.log_steps": 1,
        "train.tensorboard": False,
        "train.output_dir": run_dir,
    }
    checkout.run_module(
        "s2s_jax.train", *checkout.arguments(REPO / "configs" / "recis.py", settings)
    )
    return read_metrics(run_dir)


def two_processes(checkout: Checkout, run_dir: Path) -> Numbers:
    """The quickstart as a job of two processes."""
    settings: Flags = {"train.train_steps": 30, "train.log_steps": 1, "train.output_dir": run_dir}
    script = str(REPO / "launch" / "local.sh")
    checkout.call("bash", script, "2", *quickstart_arguments(checkout, settings))
    return read_metrics(run_dir)


def ml1m(checkout: Checkout, run_dir: Path) -> Numbers:
    """The first steps of `configs/ml1m.py`, a part of the validation events and all test events."""
    if not (DATA / "ml-1m").is_dir():
        raise Missing(
            f"{DATA / 'ml-1m'} does not exist; set S2S_JAX_DATA to the directory of ml-1m"
        )
    settings: Flags = {
        "lr.warmup_steps": 10,
        "eval.every_steps": 50,
        "eval.max_users": 500,
        "train.train_steps": 50,
        "train.log_steps": 1,
        "train.tensorboard": False,
        "train.output_dir": run_dir,
    }
    words = checkout.arguments(REPO / "configs" / "ml1m.py", settings)
    checkout.run_module("s2s_jax.train", *words)
    return read_metrics(run_dir) | evaluate(checkout, words, "newest")


def golden(checkout: Checkout, run_dir: Path) -> Numbers:
    """The numbers that the golden tests compute."""
    run_dir.mkdir()
    out = run_dir / "golden.jsonl"
    (tests,) = (REPO / "tests").rglob("test_golden.py")
    options = ["-q", "-n", "0", "-p", golden_recorder.__name__, "-p", "no:cacheprovider"]
    path = f"{REPO}{os.pathsep}{REPO / 'benchmarks'}"
    command = [sys.executable, "-m", "pytest", *options, str(tests)]
    checkout.call(*command, **{"PYTHONPATH": path, golden_recorder.OUT: str(out)})
    numbers: Numbers = {}
    for text in out.read_text().splitlines():
        line = json.loads(text)
        for name in ("loss", "hit_rate"):
            numbers |= {f"{line['test']} step {n} {name}": x for n, x in enumerate(line[name], 1)}
    return numbers


RUNS: dict[str, Callable[[Checkout, Path], Numbers]] = {
    run.__name__: run for run in (quickstart, ml1m, golden, two_processes, growing, options, recis)
}
# The runs that are continued from a recorded checkpoint, with the step of the checkpoint.
CONTINUED = {"quickstart": (quickstart, 200), "growing": (growing, 20)}


def continue_run(checkout: Checkout, name: str, kept: Path) -> Numbers:
    """Continue a kept run from a checkpoint in its middle with this checkout; return its numbers."""
    run, step = CONTINUED[name]
    run_dir = checkout.work / f"{name}-continued"
    shutil.copytree(kept / name, run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return run(checkout, run_dir, step)
