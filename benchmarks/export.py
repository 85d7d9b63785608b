"""Seconds and peak memory of `s2s export`, for tables of different sizes.

    python benchmarks/export.py [--rows 100000 1000000 10000000] [--width 128]

Trains one step of a tiny model, and then writes a table of so many rows (and its moments) into the
checkpoint, part by part, because training such a table needs three times its size in memory. The peak
memory is that of the whole command, with JAX.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.orc
import tensorstore as ts

from s2s_jax.runs.checkpoints.saved_array import keys_of_arrays

CONFIG = """\
import dataclasses
from s2s_jax.config import *
def get_config():
    return Config(
        io=IOConfig(data_paths="{path}/log", batch_size=8, thread_num=0),
        features=(FeatureConfig(name="item_id", emb_dim={width}, hash_bucket_size={rows}),),
        model=ModelConfig(seq_len=32, hidden_size=128, num_layers=2, nhead=2, dim_feedforward=128),
        loss=dataclasses.replace(Config().loss, target_features=("item_id",)),
        train=TrainConfig(output_dir="{path}/run", train_steps=1, tensorboard=False),
    )
"""
_PART = 2**17
_TRAINED_ROWS = 2**13


def run(path: Path, *command: str) -> tuple[float, float]:
    """Seconds and GiB of a command."""
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "s2s_jax", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} ended with {child.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss / 2**20


def enlarge(state: Path, keys: tuple[str, ...], rows: int) -> None:
    """Replaces an array of a checkpoint by one with more rows of random numbers."""
    base = {"driver": "file", "path": f"{state}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
    small = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    dtype, width = small.dtype.numpy_dtype, small.shape[1]
    large = ts.open(
        {"driver": "zarr", "kvstore": kvstore},
        create=True,
        delete_existing=True,
        shape=[rows, width],
        dtype=small.dtype,
        chunk_layout=ts.ChunkLayout(read_chunk_shape=[min(rows, _PART), width]),
    ).result()
    rng = np.random.default_rng(0)
    for begin in range(0, rows, _PART):
        part = rng.standard_normal((min(_PART, rows - begin), width), np.float32).astype(dtype)
        large[begin : begin + len(part)].write(part).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    for wanted in arguments.rows:
        rows = -(-wanted // 256) * 256
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            (path / "log").mkdir()
            ids = np.random.default_rng(0).integers(0, _TRAINED_ROWS, (500, 20))
            table = pa.table({"item_id": pa.array(ids.tolist(), pa.list_(pa.int64()))})
            pyarrow.orc.write_table(table, str(path / "log/log.orc"))
            config = path / "config.py"
            settings = {"path": path, "width": arguments.width}
            config.write_text(CONFIG.format(rows=_TRAINED_ROWS, **settings))
            run(path, "train", "--config", str(config))
            state = path / "run/checkpoints/1/state"
            for keys in keys_of_arrays(state):
                if keys[-2:] == ("tables", "item_id"):
                    enlarge(state, keys, rows)
            config.write_text(CONFIG.format(rows=rows, **settings))
            saved = path / "run/config.json"
            changed = json.loads(saved.read_text())
            changed["features"][0]["hash_bucket_size"] = rows
            saved.write_text(json.dumps(changed))
            seconds, peak = run(
                path, "export", "--config", str(config), "--output", str(path / "export")
            )
            files = (each for each in (path / "export").rglob("*") if each.is_file())
            size = sum(each.stat().st_size for each in files)
            print(
                f"{rows:>12,} rows of {arguments.width}: {seconds:6.1f} s, peak {peak:5.2f} GiB, "
                f"export {size / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
