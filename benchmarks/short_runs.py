"""The short runs whose numbers `same_numbers.py` records and compares.

Each goes through the commands alone, so that code may move behind them. Keys and commands that have been
renamed are given in the form that the checkout knows.
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
# Of a line of metrics.jsonl, what depends on how busy the machine is.
TIMES = {"examples_per_sec", "tokens_per_sec", "step_ms", "input_wait_ms", "mfu"}

# What a run wrote, by name: a number, or the digest of many.
Numbers = dict[str, float | str]
Flags = dict[str, object]


class Failed(Exception):
    """A command did not do what it should."""


class Missing(Exception):
    """What a run needs is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Settings whose keys were renamed.

    Attributes:
      old: by their old keys.
      new: the same by their new ones.
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
LOG_Q_OF_STREAM = Renamed(
    {"loss.log_q": True, "loss.log_q_from": "stream"},
    {"loss.log_q": "stream"},
)
LOG_Q_OF_CATALOGUE = Renamed(
    {"loss.log_q": True, "loss.log_q_from": "catalogue"},
    {"loss.log_q": "catalogue"},
)
COSINE = Renamed(
    {"lr.decay": "cosine", "lr.decay_steps": 28, "lr.final_ratio": 0.1},
    {"lr.decay": "cosine", "lr.decay.steps": 28, "lr.decay.final_ratio": 0.1},
)
# One whose ids wait until they come again and are forgotten soon; and one of so many ids that it grows
# once and is then full.
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
    """The commands of this checkout, run one after the other.

    Attributes:
      work: directory for all that they write.
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
          Failed: it did not exit with 0.
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
            told = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise Failed(f"{' '.join(command)} exited with {done.returncode}:\n{told}")

    def door(self, module: str, *arguments: str) -> None:
        """Runs `python -m module`."""
        self.call(sys.executable, "-m", module, *arguments)

    def words(self, config: Path, *settings: Flags | Renamed) -> list[str]:
        """Arguments that say `settings`, by the keys that this checkout knows."""
        flags: Flags = {}
        for setting in settings:
            if isinstance(setting, Renamed):
                flags |= setting.old if self._knows(setting.old) else setting.new
            else:
                flags |= setting
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        return ["--config", str(config), *words]

    def _knows(self, flags: Flags) -> bool:
        """Whether the help of training tells of all these keys."""
        if not self._help:
            self._help = subprocess.run(
                [sys.executable, "-m", "s2s_jax.train", "--config", str(QUICKSTART), "--help"],
                cwd=REPO,
                env=self._environment | {"COLUMNS": "200"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        told = set(self._help.split())
        # `loss.log_q` is old and new; what came with it is old alone.
        return all(f"--{key}" in told for key in flags)

    def log(self) -> Path:
        """The quickstart's log, made when it is first asked for.

        Raises:
          Failed: no command makes it.
        """
        log = self.work / "log"
        if log.exists():
            return log
        doors = (
            ["s2s_jax", "synthesize"],
            ["s2s_jax.data.logs.synthesize"],
            ["s2s_jax.data.synthesize"],
        )
        failures = []
        for door in doors:
            try:
                self.door(*door, "--out", str(log))
            except Failed as failed:
                failures.append(str(failed))
            if (log / "part-0.orc").exists():
                return log
        raise Failed("\n".join(failures))


def read_metrics(run_dir: Path, after_step: int = 0) -> Numbers:
    """The numbers of the lines of metrics.jsonl after a step."""
    numbers: Numbers = {}
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        if step > after_step:
            numbers |= {f"step {step} {k}": v for k, v in line.items() if k not in TIMES}
    return numbers


def step_of(name: str) -> float:
    """The step of a line's number; infinity for what is measured at the end of a run."""
    words = name.split()
    return int(words[1]) if words[0] == "step" else math.inf


def evaluate(checkout: Checkout, words: list[str], checkpoint: str) -> Numbers:
    """Metrics of the test events, and their intervals."""
    out = checkout.work / "evaluation.json"
    arguments = ["--checkpoint", checkpoint, "--split", "test", "--out", str(out)]
    checkout.door("s2s_jax.evaluate", *words, *arguments)
    found = json.loads(out.read_text())
    numbers: Numbers = {f"{k} at {checkpoint}": value for k, value in found["metrics"].items()}
    for name, (low, high) in found["intervals_95"].items():
        numbers |= {f"{name} at {checkpoint}, low": low, f"{name} at {checkpoint}, high": high}
    return numbers


def recommend(checkout: Checkout, words: list[str]) -> Numbers:
    """A digest of each column of the recommendations for the first file of the log."""
    out = checkout.work / "recommended.parquet"
    log = str(checkout.log() / "part-0.orc")
    arguments = ["--input", log, "--output", str(out), "--top_k", "10", "--user_column", "user_id"]
    checkout.door("s2s_jax.recommend", *words, *arguments)
    table = pq.read_table(out)
    return {
        f"recommended {name}": hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()
        for name in table.column_names
    }


# ---------------------------------------------------------------------------------------- the runs


def quickstart_words(checkout: Checkout, *settings: Flags | Renamed) -> list[str]:
    """Arguments of a run of `configs/quickstart.py` on its log; `settings` add to it."""
    common: Flags = {"io.data_paths": checkout.log(), "train.tensorboard": False}
    return checkout.words(QUICKSTART, common, *settings)


def quickstart(checkout: Checkout, run_dir: Path, start: int = 0) -> Numbers:
    """The whole quickstart, its events held out, evaluated and recommended from."""
    words = quickstart_words(checkout, HELD_OUT, {"train.output_dir": run_dir})
    checkout.door("s2s_jax.train", *words)
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
    renamed = (GROWING, PACKED, LOG_Q_OF_STREAM, BY_TIME)
    words = quickstart_words(checkout, settings, *renamed)
    for steps in (20, 40):
        if steps > start:
            checkout.door("s2s_jax.train", *words, "--train.train_steps", str(steps))
    return read_metrics(run_dir, start) | evaluate(checkout, words, "newest")


def options(checkout: Checkout, run_dir: Path) -> Numbers:
    """Windows drawn anew in each epoch, log-Q of the catalogue, and rates that fall."""
    settings: Flags = {
        "loss.negatives": "mixed",
        "model.dropout": 0.2,
        "train.train_steps": 30,
        "train.log_steps": 1,
        "train.output_dir": run_dir,
    }
    words = quickstart_words(checkout, settings, CROPPED, LOG_Q_OF_CATALOGUE, COSINE)
    checkout.door("s2s_jax.train", *words)
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
    checkout.door("s2s_jax.train", *checkout.words(REPO / "configs" / "recis.py", settings))
    return read_metrics(run_dir)


def two_processes(checkout: Checkout, run_dir: Path) -> Numbers:
    """The quickstart as a job of two processes."""
    settings: Flags = {"train.train_steps": 30, "train.log_steps": 1, "train.output_dir": run_dir}
    script = str(REPO / "launch" / "local.sh")
    checkout.call("bash", script, "2", *quickstart_words(checkout, settings))
    return read_metrics(run_dir)


def ml1m(checkout: Checkout, run_dir: Path) -> Numbers:
    """The first steps of `configs/ml1m.py`, some validation events and all test events."""
    if not (DATA / "ml-1m").is_dir():
        raise Missing(f"there is no {DATA / 'ml-1m'}; S2S_JAX_DATA names the directory of ml-1m")
    settings: Flags = {
        "lr.warmup_steps": 10,
        "eval.every_steps": 50,
        "eval.max_users": 500,
        "train.train_steps": 50,
        "train.log_steps": 1,
        "train.tensorboard": False,
        "train.output_dir": run_dir,
    }
    words = checkout.words(REPO / "configs" / "ml1m.py", settings)
    checkout.door("s2s_jax.train", *words)
    return read_metrics(run_dir) | evaluate(checkout, words, "newest")


def golden(checkout: Checkout, run_dir: Path) -> Numbers:
    """What the golden tests compute."""
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
# Runs that are continued from a recorded checkpoint, and its step.
CONTINUED = {"quickstart": (quickstart, 200), "growing": (growing, 20)}


def continue_run(checkout: Checkout, name: str, kept: Path) -> Numbers:
    """The numbers of a kept run, continued by this checkout from a checkpoint in its middle."""
    run, step = CONTINUED[name]
    run_dir = checkout.work / f"{name}-continued"
    shutil.copytree(kept / name, run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return run(checkout, run_dir, step)
