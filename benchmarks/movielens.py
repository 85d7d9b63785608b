"""How good is `configs/ml1m.py` on a log? Metrics of the test events of several seeds, and their mean.

    python benchmarks/movielens.py LOG [--out runs/movielens] [--seeds 42 43 44] [--objective recis]
        [--model.num_layers 4 …]

Trains with each seed (80 to 95 minutes on MovieLens-1M and 2 cores), chooses the best checkpoint by the
validation events and ranks the test events. Dotted arguments override keys of the config. With
`--objective recis`, the loss is that of the RecIS example: the positive is the event *before* a
position, and all events of the batch are candidates, including padding and repeats, at temperature 1.
An interrupted command continues where it stopped, but then the reported minutes are not those of the
whole run. Means have Student's 95% intervals over seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SHOWN = ("hr@5", "hr@10", "hr@50", "ndcg@10", "mrr")
RECIS = {
    "loss.pairing": "previous",
    "loss.negatives": "in_batch",
    "loss.temperature": "1",
    "loss.mask_padding": "False",
    "loss.mask_same_item": "False",
    "loss.target_features": "None",
    "io.truncate_side": "right",
}
# Student's t at 97.5% for 1, 2, … degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def run_command(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", module, *arguments]
    code = subprocess.run(command, env=environment, check=False, cwd=REPO).returncode
    if code:
        sys.exit(code)


def run_seed(log: str, seed: int, run_dir: Path, overrides: list[str]) -> dict[str, float]:
    """Return the metrics of the test events of a run, and the minutes that its training took."""
    config = ["--config", str(REPO / "configs" / "ml1m.py"), "--io.data_paths", log]
    config += [
        "--train.output_dir",
        str(run_dir),
        "--train.seed",
        str(seed),
        "--io.seed",
        str(seed),
    ]
    config += overrides
    environment = {"PYTHONPATH": str(REPO), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
    begun = time.perf_counter()
    run_command("s2s_jax.train", config, environment)
    minutes = (time.perf_counter() - begun) / 60
    result = run_dir / "test.json"
    run_command("s2s_jax.evaluate", [*config, "--out", str(result)], environment)
    metrics = json.loads(result.read_text())["metrics"]
    return {name: metrics[f"eval/{name}"] for name in SHOWN} | {"minutes": minutes}


def mean_and_interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/movielens"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--objective", choices=("ours", "recis"), default="ours")
    args, overrides = parser.parse_known_args()
    if len(args.seeds) > len(STUDENT) + 1:
        parser.error(f"at most {len(STUDENT) + 1} seeds")
    if args.objective == "recis":
        recis = [word for key, value in RECIS.items() for word in (f"--{key}", value)]
        overrides = recis + overrides
    found = []
    for seed in args.seeds:
        run_dir = args.out.resolve() / f"{args.objective}-{seed}"
        found.append(run_seed(str(args.log.resolve()), seed, run_dir, overrides))
    print(f"| {args.objective}, seed | " + " | ".join(SHOWN) + " | minutes |")
    print("|---|" + "---:|" * (len(SHOWN) + 1))
    for seed, row in zip(args.seeds, found, strict=True):
        cells = [f"{row[name]:.4f}" for name in SHOWN]
        print(f"| {seed} | " + " | ".join(cells) + f" | {row['minutes']:.0f} |")
    means = [mean_and_interval([row[name] for row in found]) for name in SHOWN]
    print("| mean | " + " | ".join(means) + " | |")


if __name__ == "__main__":
    main()
