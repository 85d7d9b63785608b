"""The launcher for one machine, with a stand-in for the training program."""

import os
import signal
import subprocess
import sys
import time

import golden
import pytest

# Takes the interpreter's place: serves `-c` and otherwise notes its start and does as it is told.
STAND_IN = f"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
# Before the note, which is what the signal waits for.
if [[ -n ${{WAIT:-}} ]]; then trap 'kill $! 2>/dev/null; exit 75' TERM; fi
echo "$S2S_JAX_HOST of $S2S_JAX_NUM_HOSTS: $*" >>"$NOTES"
starts=$(grep -c "^$S2S_JAX_HOST of" "$NOTES")
if [[ -n ${{WAIT:-}} ]]; then
  sleep 60 &
  wait
fi
codes=($CODES)
exit "${{codes[starts - 1]}}"
"""


@pytest.fixture
def launch(tmp_path):
    stand_in, notes = tmp_path / "python", tmp_path / "notes"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def start(**environment):
        return subprocess.Popen(
            ["launch/local.sh", "2", "--config", "a.py", "--io.data_paths", "a log"],
            cwd=golden.REPO,
            env=os.environ | {"PYTHON": str(stand_in), "NOTES": str(notes)} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start, lambda: sorted(notes.read_text().splitlines()) if notes.exists() else []


ARGUMENTS = "-m s2s_jax.train --config a.py --io.data_paths a log"


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ("0", "2", 0, 1),
        ("75 0", "2", 0, 2),
        ("75 75 75", "1", 75, 2),
        ("75 0", "0", 75, 1),
        ("2 0", "2", 2, 1),
        ("75 3 0", "5", 3, 2),
    ],
)
def test_starts_again_only_what_can_go_on(launch, codes, restarts, code, starts):
    start, started = launch
    process = start(CODES=codes, RESTARTS=restarts)
    _, told = process.communicate(timeout=30)
    assert process.returncode == code, told
    expected = [f"{host} of 2: {ARGUMENTS}" for host in (0, 1) for _ in range(starts)]
    assert started() == expected


def test_a_signal_reaches_all_and_nothing_starts_again(launch):
    start, started = launch
    process = start(WAIT="1", CODES="0", RESTARTS="3")
    deadline = time.monotonic() + 20
    while len(started()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert len(started()) == 2


def test_flags_for_gpus_are_known_and_those_of_the_user_win(tmp_path):
    # A flag that this XLA does not know would end every process.
    script = 'source launch/gpu_env.sh && exec "$0" -c "$1"'
    code = "import os, jax; jax.devices(); print(os.environ['XLA_FLAGS'])"
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    done = subprocess.run(
        ["bash", "-euc", script, sys.executable, code],
        cwd=golden.REPO,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": mine},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == mine
    assert len(done.stdout.split()) > 1
