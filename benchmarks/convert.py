"""How long do both engines of `s2s convert` take for the same events, and how much memory?

    python benchmarks/convert.py [--events 20000000] [--files 8] [--memory_limit 2GB]

Makes a synthetic table of events (Parquet; two columns of ids, one of texts), converts it with each
engine in a process of its own, and compares the files that they write. Prints seconds and the largest
sum of the memory of the process and all its children (Spark's Java and its Python workers), sampled
five times a second.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

SAMPLE_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--memory_limit", default="2GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s2s_jax_convert_") as scratch:
        source = Path(scratch) / "events"
        write_events(source, arguments.events, arguments.files)
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{arguments.events:,} events in {arguments.files} files, {size / 1e6:.0f} MB")
        print("| engine | seconds | peak memory |\n|---|---:|---:|")
        for engine in ("duckdb", "spark"):
            out = Path(scratch) / engine
            seconds, memory = measured(source, out, engine, arguments.memory_limit)
            print(f"| {engine} | {seconds:.0f} | {memory / 1e9:.1f} GB |", flush=True)
        compare(Path(scratch) / "duckdb", Path(scratch) / "spark")


def write_events(directory: Path, events: int, files: int) -> None:
    """Events of users and items whose numbers of events are uneven, in the order of their times."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    behaviors = np.array(["pv", "cart", "fav", "buy"])
    for i in range(files):
        count = events // files
        table = {
            "user_id": (rng.pareto(2, count) * events / 200).astype(np.int64) % (events // 50),
            "item_id": rng.zipf(1.3, count) % 1_000_000,
            "cate_id": rng.integers(0, 5000, count),
            "behavior_id": behaviors[rng.integers(0, 4, count)],
            "timestamp": 1_600_000_000 + i * 86_400 + np.sort(rng.integers(0, 86_400, count)),
        }
        pyarrow.parquet.write_table(pa.table(table), directory / f"{i:03}.parquet")


def measured(source: Path, out: Path, engine: str, memory_limit: str) -> tuple[float, int]:
    """Seconds and bytes of a conversion."""
    command = [sys.executable, "-m", "s2s_jax", "convert", str(source), "--output", str(out)]
    command += ["--engine", engine, "--memory_limit", memory_limit]
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stderr is not None
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return time.monotonic() - start, peak


def memory_of(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared pages count in each."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        # Java starts processes from other threads than its first.
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += (task / "children").read_text().split()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    own = int(lines[0].split()[1]) * 1024 if lines else 0
    return own + sum(memory_of(int(child)) for child in set(children))


def compare(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    same = filecmp.cmpfiles(one, other, names, shallow=False)[0] == names
    print(f"the {len(names)} files of both engines are {'equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
