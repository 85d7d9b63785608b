"""The launchers, with stand-ins for the training program and for SLURM."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import small
from places import REPO

from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS
from s2s_jax.data.logs import synthesize
from s2s_jax.errors import EXIT_NOT_FINITE, EXIT_USER_ERROR

# Replaces the interpreter: runs `-c`, otherwise records its start and behaves as instructed.
STAND_IN = f"""#!/usr/bin/env bash
if [[ $1 == -c || $2 == s2s_jax.progress ]]; then exec {sys.executable} "$@"; fi
# The trap comes before the note, because tests send the signal once they see the note.
if [[ -n ${{WAIT:-}} ]]; then trap 'kill $! 2>/dev/null; exit 75' TERM; fi
echo "$S2S_JAX_HOST of $S2S_JAX_NUM_HOSTS: $*" >>"$NOTES"
starts=$(grep -c "^$S2S_JAX_HOST of" "$NOTES")
if [[ -n ${{WAIT:-}} ]]; then
  # It must not hold the pipe that the test reads to its end.
  sleep 60 >/dev/null 2>&1 &
  wait
fi
echo "${{CUDA_VISIBLE_DEVICES-unset}} $JAX_PLATFORMS $PWD" >>"$NOTES.devices"
codes=($CODES)
code=${{codes[starts - 1]}}
# One code for all, or one for each: 2/75.
if [[ $code == */* ]]; then code=$(cut -d/ -f$((S2S_JAX_HOST + 1)) <<<"$code"); fi
if [[ $code == hang ]]; then exec sleep 60; fi
if ((code > 128)); then kill -$((code - 128)) $$; fi
exit "$code"
"""


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "stand-in"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


@pytest.fixture
def launch(tmp_path, stand_in):
    notes = tmp_path / "notes"

    def start(*arguments, cwd=REPO, **environment):
        return subprocess.Popen(
            [
                REPO / "launch/local.sh",
                *(arguments or ("2", "--config", "a.py", "--io.data_paths", "a log")),
            ],
            cwd=cwd,
            env=os.environ | {"PYTHON": str(stand_in), "NOTES": str(notes)} | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
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
        # The code of a mistake outranks the codes of the others, which lost that process.
        ("75/2 0", "2", 2, 1),
        ("2/75 0", "2", 2, 1),
        ("134/3 0", "2", 3, 1),
        # One process was killed, and another one ended because of that.
        ("137/75 0", "1", 0, 2),
        ("75/137", "0", 75, 1),
        ("137 137", "1", 137, 2),
    ],
)
def test_starts_again_only_what_can_go_on(launch, codes, restarts, code, starts):
    start, started = launch
    process = start(CODES=codes, RESTARTS=restarts)
    _, output = process.communicate(timeout=30)
    assert process.returncode == code, output
    expected = [f"{host} of 2: {ARGUMENTS}" for host in (0, 1) for _ in range(starts)]
    assert started() == expected


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend"])
def test_starts_the_command_that_is_named_first(launch, command):
    start, started = launch
    process = start("2", command, "--config", "a.py", CODES="0")
    _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert started() == [f"{host} of 2: -m s2s_jax.{command} --config a.py" for host in (0, 1)]


def test_who_made_a_mistake_is_not_waited_with(launch):
    start, _ = launch
    begin = time.monotonic()
    process = start(CODES="2/hang", PATIENCE="1")
    _, output = process.communicate(timeout=30)
    assert process.returncode == 2, output
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}, ["GPU-a cuda,cpu", "GPU-b cuda,cpu"]),
        ({"CUDA_VISIBLE_DEVICES": "6,7"}, ["6 cuda,cpu", "7 cuda,cpu"]),
        ({}, ["0 cuda,cpu", "1 cuda,cpu"]),
        ({"JAX_PLATFORMS": "cuda"}, ["0 cuda", "1 cuda"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [" cpu", " cpu"]),
        ({"JAX_PLATFORMS": "cpu"}, ["unset cpu", "unset cpu"]),
        ({"JAX_PLATFORMS": "nonsense"}, ["unset nonsense", "unset nonsense"]),
    ],
)
def test_each_process_has_a_gpu_of_those_that_are_given(
    launch, stand_in, tmp_path, monkeypatch, environment, devices
):
    start, _ = launch
    smi = stand_in.with_name("nvidia-smi")
    smi.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: A (UUID: GPU-$i)"; done\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "where I stand").mkdir()
    process = start(CODES="0", cwd=tmp_path / "where I stand", **environment)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    lines = sorted((tmp_path / "notes.devices").read_text().splitlines())
    assert lines == [f"{each} {tmp_path}/where I stand" for each in devices]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((), {"PYTHON": "/no/python"}, "no /no/python"),
        ((), {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "4"}, "2 processes need a GPU each"),
        (("two",), {}, "usage"),
        ((), {"RESTARTS": "often"}, "RESTARTS"),
    ],
)
def test_what_cannot_be_launched_is_said_at_once(launch, arguments, environment, words):
    start, started = launch
    process = start(*arguments, CODES="0", **environment)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 2
    assert words in output
    assert len(output.splitlines()) == 1
    assert started() == []


@pytest.mark.parametrize("keys", [False, True])
def test_a_signal_reaches_all_and_nothing_starts_again(launch, keys):
    start, started = launch
    process = start(WAIT="1", CODES="0", RESTARTS="3")
    deadline = time.monotonic() + 20
    while len(started()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    if keys:
        # Like Ctrl-C in a terminal: all processes in the foreground get it.
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=50)
    assert process.returncode == 75
    assert len(started()) == 2


def test_flags_for_gpus_are_known_and_those_of_the_user_win(tmp_path):
    # A flag unknown to this XLA would end every process.
    script = 'source launch/gpu_env.sh && exec "$0" -c "$1"'
    code = "import os, jax; jax.devices(); print(os.environ['XLA_FLAGS'])"
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    done = subprocess.run(
        ["bash", "-euc", script, sys.executable, code],
        cwd=REPO,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": mine},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == mine
    assert len(done.stdout.split()) > 1


# Replacements of SLURM's commands. Like the real one, srun runs two tasks and returns the highest code.
SLURM = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for host in 0 1; do S2S_JAX_HOST=$host S2S_JAX_NUM_HOSTS=2 setsid "$@" & pids+=($!); done
        echo "${pids[*]}" >"$NOTES.pids"
        for pid in "${pids[@]}"; do wait "$pid" || { code=$?; ((code > most)) && most=$code; }; done
        exit "${most:-0}" """,
    # All processes of a task get a signal.
    "scancel": """
        echo "scancel $*" >>"$NOTES.slurm"
        for pid in $(cat "$NOTES.pids"); do kill -TERM -- "-$pid"; done """,
    "squeue": 'echo "${STATE:-RUNNING}"',
    "scontrol": """
        if [[ $1 == show ]]; then echo "JobId=7"; echo "   Command=$COMMAND"; exit; fi
        echo "scontrol $*" >>"$NOTES.slurm" """,
}


@pytest.fixture
def submit(tmp_path, stand_in):
    """Starts a copy of the batch script, as SLURM does, in a directory with a space in its name."""
    for name, text in SLURM.items():
        (stand_in.parent / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stand_in.parent / name).chmod(0o755)
    script = tmp_path / "slurm_script"
    script.write_text((REPO / "launch/slurm.sbatch").read_text())
    stands = tmp_path / "where I stand"
    stands.mkdir()
    small.write_log(stands / "a log", 8)
    (stands / "a.py").write_text(
        "from s2s_jax.config import load_file\n"
        f"def get_config():\n    return load_file({str(REPO / 'configs/quickstart.py')!r})\n"
    )

    def start(*more, command=(), **environment):
        arguments = (*command, "--config", "a.py", "--train.output_dir", "my run", *more)
        env = os.environ | {
            "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
            "PYTHON": str(stand_in),
            "NOTES": str(tmp_path / "notes"),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(stands),
            "COMMAND": f"{REPO}/launch/slurm.sbatch {' '.join(arguments)}",
        }
        return subprocess.Popen(
            ["bash", script, *arguments],
            env=env | environment,
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
        )

    return start, stands


def commands(tmp_path) -> list[str]:
    path = tmp_path / "notes.slurm"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        ("0", 0, False),
        ("2/75", 2, False),
        ("75/2", 2, False),
        ("134/2", 2, False),
        ("3/75", 3, False),
        ("1/75", 1, False),
        ("137/75", 137, True),
    ],
)
def test_slurm_queues_again_only_what_can_go_on(submit, tmp_path, codes, code, again):
    start, stands = submit
    process = start(CODES=codes)
    _, output = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert commands(tmp_path) == (["scontrol requeue 7"] if again else [])
    notes = (tmp_path / "notes.devices").read_text()
    assert all(line.endswith(f" {stands}") for line in notes.splitlines())


@pytest.mark.slow
def test_slurm_gives_up_after_starts_that_save_nothing(submit, tmp_path):
    start, stands = submit

    def run(**environment):
        process = start(**environment)
        _, output = process.communicate(timeout=60)
        assert process.returncode == 75, output
        return output

    codes = "75 75 75 75 75 75 75"
    for _ in range(2):
        assert "queued again" in run(CODES=codes)
    # A checkpoint of an earlier start does not count, one of this start does.
    (stands / "my run" / "checkpoints" / "5").mkdir(parents=True)
    assert "not queued again" in run(CODES=codes)
    assert "queued again" in run(CODES=codes)
    assert len(commands(tmp_path)) == 3
    # Another job has its own count.
    assert "; queued again" in run(CODES=codes, SLURM_JOB_ID="8")


@pytest.mark.slow
def test_slurm_recommends_as_long_as_there_are_more_parts(submit, tmp_path):
    start, stands = submit
    # A start ended without a new part; those of earlier starts are no progress.
    (stands / ".s2s_jax-7.starts").write_text("1")
    (stands / "recs").mkdir()
    (stands / "recs" / "part-000000.parquet").touch()
    more = ("--input", "a log", "--output", "recs")
    for said in ("saved: 1 finished parts; queued again", "not queued again"):
        process = start(*more, command=("recommend",), CODES="75 75")
        _, output = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert said in output
    assert not list(stands.glob(".s2s_jax*"))
    notes = (tmp_path / "notes").read_text().splitlines()
    assert {note.split(": ")[1].split()[1] for note in notes} == {"s2s_jax.recommend"}


# Replaces the interpreter: the calls for the progress that AWAY numbers fail, as if the store were away.
NO_STORE = """#!/usr/bin/env bash
if [[ $2 != s2s_jax.progress ]]; then exit 75; fi
echo >>"$NOTES.asked"
if [[ " $AWAY " == *" $(wc -l <"$NOTES.asked") "* ]]; then exit 2; fi
printf '5\\tstep 5\\n'
"""


@pytest.mark.parametrize(("away", "saved"), [("2 3", "step 5"), ("2 3 4", "unknown")])
def test_slurm_queues_again_while_the_store_is_away(submit, stand_in, tmp_path, away, saved):
    start, stands = submit
    stand_in.write_text(NO_STORE)
    # Nobody waits here.
    (stand_in.parent / "sleep").symlink_to("/bin/true")
    process = start(AWAY=away)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert f"saved: {saved}; queued again" in output
    assert commands(tmp_path) == ["scontrol requeue 7"]
    assert (stands / ".s2s_jax-7.starts").read_text() == "1\n"


def test_slurm_hands_on_the_signal_and_keeps_a_cancelled_job_cancelled(submit, tmp_path):
    start, _ = submit
    for state, expected in (("RUNNING", ["scontrol requeue 7"]), ("COMPLETING", [])):
        for name in ("notes", "notes.slurm"):
            (tmp_path / name).unlink(missing_ok=True)
        process = start(CODES="0", WAIT="1", STATE=state)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not (tmp_path / "notes").exists() or (tmp_path / "notes").read_text().count("of") < 2
        ):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert process.returncode == 75, output
        assert commands(tmp_path) == ["scancel --signal=TERM 7.0", *expected]


@pytest.mark.parametrize(
    ("more", "environment", "words"),
    [
        (("--train.steps", "5"), {}, "train.steps: no such key"),
        (("--input", "a log"), {}, "--input: no such option"),
        ((), {"PYTHON": "/no/python"}, "no /no/python"),
        ((), {"COMMAND": "/elsewhere/slurm.sbatch"}, "S2S_JAX_HOME"),
    ],
)
def test_slurm_is_told_at_once_what_cannot_start(submit, tmp_path, more, environment, words):
    start, _ = submit
    process = start(*more, CODES="75", **environment)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 2, output
    assert words in output
    assert commands(tmp_path) == []


# Replaces the interpreter for real processes; the second one gets other arguments.
MISTAKEN = f"""#!/usr/bin/env bash
if [[ ${{S2S_JAX_HOST:-}} == 1 ]]; then set -- "$@" $OF_SECOND; fi
exec {sys.executable} "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_second", "words"),
    [
        ("--io.data_paths nowhere", "io.data_paths: nowhere does not exist"),
        ("--train.steps 5", "train.steps: no such key"),
        ("--io.seed 5", "--config: host 1 does not see the same as host 0"),
    ],
)
def test_a_mistake_of_one_process_ends_all_with_its_sentence(tmp_path, stand_in, of_second, words):
    """This works even if the environment names a proxy that does not exist."""
    stand_in.write_text(MISTAKEN)
    synthesize.synthesize(synthesize.Settings(output=tmp_path / "log", users=50))
    arguments = f"--config {REPO}/configs/quickstart.py --io.data_paths log"
    process = subprocess.Popen(
        [REPO / "launch/local.sh", "2", *arguments.split(), "--train.output_dir", "run"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHON": str(stand_in), "JAX_PLATFORMS": "cpu", "OF_SECOND": of_second}
        | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = time.monotonic()
    _, output = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert f"error: {words}" in output
    # Most of this time is the start of Python.
    assert time.monotonic() - begin < 120


def test_kubernetes_ends_the_job_at_codes_that_starting_again_does_not_mend():
    text = (REPO / "launch/kubernetes.yaml").read_text()
    (codes,) = re.findall(r"action: FailJob\s+onExitCodes:.*?values: \[(.*?)\]", text, re.DOTALL)
    assert [int(code) for code in codes.split(",")] == [1, EXIT_USER_ERROR, EXIT_NOT_FINITE]
    names = set(re.findall(r"S2S_JAX_[A-Z_]+$", text, re.MULTILINE))
    assert names == {COORDINATOR, NUM_HOSTS, HOST}
    # As the other launchers set it, so that a process whose driver fails does not train on its CPU.
    (platforms,) = re.findall(r'name: JAX_PLATFORMS\s+value: "(.*)"', text)
    for other in ("local.sh", "slurm.sbatch"):
        assert (
            f"JAX_PLATFORMS=${{JAX_PLATFORMS:-{platforms}}}"
            in (REPO / "launch" / other).read_text()
        )
    (port,) = re.findall(r"containerPort: (\d+)", text)
    assert re.search(rf'value: "s2s-jax-0\.s2s-jax:{port}"', text)


@pytest.mark.skipif(os.geteuid() != 0, reason="the script refuses others than root")
@pytest.mark.parametrize("there", ["slurmctld", "slurmd", "munged", "slurmctld slurmd munged"])
def test_slurm_is_installed_unless_all_of_it_is_there(tmp_path, there):
    """With stand-ins; without namespaces, the script ends before it starts anything."""
    notes = tmp_path / "notes"
    stand_ins = dict.fromkeys(there.split(), "")
    stand_ins |= {"apt-get": f'echo "$1" >>{notes}', "unshare": "exit 1"}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    script = ["/bin/bash", REPO / "scripts/slurm_test.sh"]
    done = subprocess.run(script, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 77
    assert "no permission to make namespaces" in done.stderr
    asked = notes.read_text().split() if notes.exists() else []
    assert asked == ([] if len(there.split()) == 3 else ["update", "install"])


@pytest.mark.slow
def test_a_real_slurm():
    """Uses two node daemons on this machine; see the script."""
    done = subprocess.run(
        [REPO / "scripts/slurm_test.sh"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
