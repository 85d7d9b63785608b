"""A trial: trains a configuration for a few steps, as `s2s train` would, and measures it."""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from s2s_jax.errors import UserError
from s2s_jax.planning import config_file
from s2s_jax.planning.promise import LEAST_USERS, Measured
from s2s_jax.planning.rules import Plan
from s2s_jax.runs.metrics_file import Line, read_lines

# The trial evaluates after half of its steps, and again at its end.
STEPS = 60
# Users of an evaluation in the trial: several batches but, for many items, fewer.
_MOST_USERS = 2_048
_PAIRS_OF_USER_AND_ITEM = 200_000_000
# Seconds between two looks at the files of the trial. Times of events are as exact as this.
_LOOK_EVERY = 0.03
# A trial that is stopped gets so many seconds to end.
_PATIENCE = 10.0


def trial_of(plan: Plan, items: int, directory: Path) -> Plan:
    """The plan of a trial.

    Args:
      plan: the plan to try.
      items: the number of items of the log.
      directory: the directory that the trial writes to.
    """
    config = plan.config
    evaluates = config.eval.every_steps is not None
    users = min(max(_PAIRS_OF_USER_AND_ITEM // items, LEAST_USERS), _MOST_USERS)
    return Plan(
        config=dataclasses.replace(
            config,
            # The warm-up would be longer than the trial.
            lr=dataclasses.replace(config.lr, warmup_steps=0),
            eval=dataclasses.replace(
                config.eval,
                every_steps=STEPS // 2 if evaluates else None,
                max_users=users if evaluates else None,
                patience=None,
            ),
            train=dataclasses.replace(
                config.train,
                output_dir=str(directory),
                train_epoch=None,
                train_steps=STEPS,
                log_steps=1,
                save_steps=STEPS,
                max_to_keep=1,
            ),
        ),
        why={},
    )


def run(plan: Plan, items: int) -> Measured:
    """Runs a trial in another process, in a temporary directory, and measures it.

    Args:
      plan: the plan to try.
      items: the number of items of the log.

    Raises:
      UserError: training fails.
    """
    with tempfile.TemporaryDirectory(prefix="s2s_init_") as name:
        directory = Path(name)
        trial = trial_of(plan, items, directory / "run")
        config_file.write(trial, ["A trial."], directory / "trial.py")
        return _Watch(directory).run(trial.config.eval.every_steps is not None)


class _Watch:
    """Starts the command of a trial and notes when its lines of metrics appear."""

    def __init__(self, directory: Path):
        self._directory, self._run_dir = directory, directory / "run"
        # When each line was first seen.
        self._seen: list[tuple[float, Line]] = []
        self._memory = 0

    def run(self, evaluates: bool) -> Measured:
        command = [sys.executable, "-m", "s2s_jax", "train", "--config"]
        output = self._directory / "output.txt"
        with output.open("wb") as file:
            begun = time.monotonic()
            process = subprocess.Popen(
                [*command, str(self._directory / "trial.py")],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            try:
                while process.poll() is None:
                    self._look(process.pid)
                    time.sleep(_LOOK_EVERY)
            finally:
                _end(process)
        ended = time.monotonic()
        self._look(None)
        if process.returncode:
            raise UserError(_why_failed(process.returncode, output.read_text(errors="replace")))
        return self._measured(begun, ended, evaluates)

    def _look(self, pid: int | None) -> None:
        """Notes new lines, and the peak of the memory of the process."""
        now = time.monotonic()
        lines = read_lines(self._run_dir)
        self._seen += [(now, line) for line in lines[len(self._seen) :]]
        if pid is not None:
            self._memory = max(self._memory, _peak_memory(pid))

    def _measured(self, begun: float, ended: float, evaluates: bool) -> Measured:
        steps = [(at, line) for at, line in self._seen if "step_ms" in line]
        others = [(at, line) for at, line in self._seen if "eval/users" in line]
        assert len(steps) == STEPS, "a whole trial logs every step"
        assert len(others) == 2 * evaluates, "a trial evaluates twice"
        at_step = {line["step"]: at for at, line in steps}
        users = [int(line["eval/users"]) for _, line in others]
        stepping = [line["step_ms"] / 1e3 for _, line in steps]
        of_devices = [line["device_memory_mb"] for _, line in steps if "device_memory_mb" in line]
        # Both lines may be seen in one look.
        evaluating = [max(at - at_step[line["step"]], _LOOK_EVERY) for at, line in others]
        return Measured(
            # Also what happens between steps, such as compiling again when a table grows.
            around=ended - begun - sum(stepping) - sum(evaluating),
            steps=stepping,
            evaluations=evaluating,
            users=users[-1] if users else 0,
            memory=self._memory,
            device_memory=round(1e6 * max(of_devices)) if of_devices else None,
        )


def _peak_memory(pid: int) -> int:
    """The most memory that a process has had so far, in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return 1_024 * int(found[1]) if found else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that is still running because this one was stopped."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _why_failed(code: int, output: str) -> str:
    errors = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    if errors:
        return f"the trial failed: {errors[-1]}"
    if code == -9:
        return (
            "the trial was killed, most likely because the machine has too little memory; use one with "
            "more memory, or a smaller log"
        )
    last = (output.strip().splitlines() or ["no output"])[-1]
    return f"the trial ended with code {code}: {last}"
