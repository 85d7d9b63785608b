"""Checks that a refactoring changes no number: records short runs before it, and compares them after it.

    python benchmarks/same_numbers.py record before.json --keep before_runs     # in the old checkout
    python benchmarks/same_numbers.py compare before.json --continue-from before_runs   # in the new one

Trains, evaluates and recommends on the CPU with the commands, and collects every number that they write
except times and rates. `compare` expects numbers that are equal to the last bit, and exits with 1 if one
differs. With --continue-from it also copies the runs that `record` kept, deletes their later
checkpoints, and continues them with the present code. On 2 cores that other programs use too, recording
takes about 11 minutes, and comparing and continuing about 14. --runs chooses the runs.

The numbers depend on the processor, the number of cores and the version of jaxlib, so a recording
contains these, and each machine needs its own recording. MovieLens-1M is read from the place where
`configs/ml1m.py` expects it. The runs are defined in `short_runs.py`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from short_runs import CONTINUED, RUNS, Checkout, Failed, Missing, Numbers, continue_run, step_of


def machine() -> dict[str, str]:
    """Return what the numbers depend on besides the code."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    versions = {name: importlib.metadata.version(name) for name in ("jaxlib", "jax", "numpy")}
    cores = str(len(os.sched_getaffinity(0)))
    return {"processor": model, "cores": cores, "python": platform.python_version()} | versions


def attempt(title: str, run: Callable[[], Numbers]) -> Numbers | None:
    """Return the numbers of a run; None, with a message, if its data is not on this machine.

    Raises:
      Failed: a command of the run failed.
    """
    begun = time.perf_counter()
    try:
        numbers = run()
    except Missing as missing:
        print(f"{title}: skipped: {missing}", flush=True)
        return None
    print(f"{title}: {len(numbers)} numbers in {time.perf_counter() - begun:.0f} s", flush=True)
    return numbers


def record(checkout: Checkout, names: list[str], file: Path) -> None:
    """Runs `names` and writes their numbers to `file`.

    Raises:
      Failed: a command failed.
    """
    runs = {}
    for name in names:
        numbers = attempt(name, partial(RUNS[name], checkout, checkout.work / name))
        if numbers is not None:
            runs[name] = numbers
    file.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


def differences(before: Numbers, now: Numbers) -> list[str]:
    """Return a sentence for each number that differs, in the order of `before`."""
    found = []
    for name in before | now:
        was = before[name] if name in before else "nothing"
        found_now = now[name] if name in now else "nothing"
        if was != found_now:
            found.append(f"{name} was {was!r} and is {found_now!r}")
    return found


def compare_run(title: str, before: Numbers, run: Callable[[], Numbers]) -> bool | None:
    """Whether a run gives the numbers of `before`; None if it cannot run on this machine."""
    try:
        now = attempt(title, run)
    except Failed as failed:
        print(f"{title}: failed: {failed}", flush=True)
        return False
    if now is None:
        return None
    different = differences(before, now)
    first = f"; the first: {different[0]}" if different else ""
    compared = len(before | now)
    print(f"{title}: {compared} compared, {len(different)} differ{first}", flush=True)
    return not different


def compare(checkout: Checkout, names: list[str], file: Path, kept: Path | None) -> bool:
    """Repeats the runs `names` that are in `file`; True if numbers were compared and none differs."""
    recorded = json.loads(file.read_text())
    here = machine()
    for name, was in recorded["machine"].items():
        if here[name] != was:
            print(f"{name} was {was} and is {here[name]}, so numbers may differ")
    results = []
    for name in names:
        if name not in recorded["runs"]:
            print(f"{name}: not in {file}")
            continue
        before = recorded["runs"][name]
        again = partial(RUNS[name], checkout, checkout.work / name)
        results.append(compare_run(name, before, again))
        if kept is not None and name in CONTINUED:
            step = CONTINUED[name][1]
            later = {key: x for key, x in before.items() if step_of(key) > step}
            title = f"{name}, continued from step {step}"
            results.append(compare_run(title, later, partial(continue_run, checkout, name, kept)))
    compared = [result for result in results if result is not None]
    if not compared:
        print("nothing was compared")
    else:
        print("all compared numbers are equal" if all(compared) else "some numbers DIFFER")
    return bool(compared) and all(compared)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="the JSON file of the recorded numbers")
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=RUNS,
        default=list(RUNS),
        help="the runs to record or compare (default: all)",
    )
    parser.add_argument("--keep", type=Path, help="record: a new directory for the runs")
    parser.add_argument("--continue-from", type=Path, help="compare: a directory that record kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.action == "compare":
            kept = args.continue_from
            if not compare(Checkout(Path(temporary)), args.runs, args.file, kept):
                sys.exit(1)
            return
        work = Path(temporary) if args.keep is None else args.keep.resolve()
        if args.keep is not None and work.exists():
            # Runs in an old directory would be continued instead of repeated.
            parser.error(f"--keep: expected a new directory, found {work}")
        work.mkdir(parents=True, exist_ok=True)
        try:
            record(Checkout(work), args.runs, args.file)
        except Failed as failed:
            sys.exit(str(failed))


if __name__ == "__main__":
    main()
