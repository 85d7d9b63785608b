"""Seconds and peak memory of evaluating and recommending, with many stripes or with one huge row.

    python benchmarks/ranking_memory.py [--users 6000] [--stripes 160] [--huge 2000000] [--items 4000]

Writes a log of random events, trains for one step, and runs each command in a separate process, whose
peak memory (including JAX) it prints. With --huge, one of the rows has this many events.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.orc

CONFIG = """\
import dataclasses
from s2s_jax.config import *
def get_config():
    return Config(
        io=IOConfig(data_paths="{path}/log", batch_size=8, thread_num=0),
        features=(FeatureConfig(name="item_id", emb_dim=64, hash_bucket_size={items}),),
        model=ModelConfig(seq_len=128, hidden_size=64, num_layers=2, nhead=2, dim_feedforward=128),
        loss=dataclasses.replace(Config().loss, target_features=("item_id",)),
        eval=EvalConfig(split=LastEvents(events=2)),
        train=TrainConfig(output_dir="{path}/run", train_steps=1, tensorboard=False),
    )
"""


def write(path: Path, users: int, stripes: int, items: int, huge: int) -> None:
    rng = np.random.default_rng(0)
    path.mkdir()
    with pyarrow.orc.ORCWriter(str(path / "log.orc"), stripe_size=1, batch_size=2**16) as writer:
        for rows in np.array_split(rng.integers(5, 150, users), stripes):
            if huge:
                rows, huge = np.append(rows, huge), 0
            ends = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
            ids = pa.array(rng.integers(0, items, ends[-1]))
            writer.write(pa.table({"item_id": pa.ListArray.from_arrays(pa.array(ends), ids)}))


def run(*command: str) -> None:
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} ended with {child.returncode}")
    peak = usage.ru_maxrss / 2**20
    print(f"{command[0]:<20} {time.perf_counter() - begin:7.1f} s, peak {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=6000)
    parser.add_argument("--stripes", type=int, default=160)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--huge", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        path = Path(made)
        write(path / "log", **vars(arguments))
        config = path / "config.py"
        config.write_text(CONFIG.format(path=path, items=arguments.items))
        run("s2s_jax.train", "--config", str(config))
        run("s2s_jax.evaluate", "--config", str(config))
        out = ("--input", str(path / "log"), "--output", str(path / "recs.parquet"))
        run("s2s_jax.recommend", "--config", str(config), *out)


if __name__ == "__main__":
    main()
