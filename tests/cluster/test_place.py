"""Finding a process's place in its job from the variables of launchers, which are made up here."""

import os
import subprocess
import sys

import jax
import pytest
from places import REPO

from s2s_jax.cluster.joining import join
from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS, find_place
from s2s_jax.errors import EXIT_STOPPED, UserError


def step(rank=0, tasks=2, nodes=1, **more):
    """Variables of task `rank` in a SLURM step whose tasks are spread evenly, in blocks."""
    per_node = tasks // nodes
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "n1" if nodes == 1 else f"n[1-{nodes}]",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(per_node) if nodes == 1 else f"{per_node}(x{nodes})",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_LOCALID": str(rank % per_node),
    } | more


def devices(env):
    place = find_place(env)
    assert place is not None
    return place.devices


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    """Hides the device files of this machine."""
    monkeypatch.setattr("s2s_jax.cluster.place.Path.glob", lambda self, pattern: iter(()))


def test_who_is_where():
    assert find_place({}) is None
    # The batch script of a job, or a step of one task.
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) is None
    assert find_place(step(tasks=1)) is None
    place = find_place(step(3, tasks=4, nodes=2))
    assert place is not None
    assert (place.host, place.hosts) == (3, 4)
    name, port = place.coordinator.split(":")
    assert name == "n1"
    # Outside the range from which Linux assigns ports, and different after the job was queued again.
    again = find_place(step(3, tasks=4, nodes=2, SLURM_RESTART_COUNT="1"))
    assert again is not None
    assert int(port) > 60999
    assert again.coordinator != place.coordinator


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("tux3", "tux3"),
        ("tux3,tux5", "tux3"),
        ("tux[007-015],host2", "tux007"),
        ("tux[1,3-5]", "tux1"),
        ("r[2-3]n[4-5]-ib", "r2n4-ib"),
        ("a-b.c,d[1-2]", "a-b.c"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    place = find_place(step(SLURM_STEP_NODELIST=nodes))
    assert place is not None
    assert place.coordinator.split(":")[0] == first


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("seen", ["0", "3", "GPU-8932f937-d72c", "MIG-1/2/3"])
def test_a_task_drives_the_one_gpu_that_it_sees(task, seen):
    assert devices(step(task, CUDA_VISIBLE_DEVICES=seen, SLURM_GPUS_ON_NODE="2")) == [0]


def test_one_task_a_node_drives_all_of_the_node():
    env = step(1, tasks=2, nodes=2, SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert devices(env) == list(range(8))


def test_tasks_that_see_the_same_gpus_share_them():
    seen = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}
    assert [devices(step(k, tasks=4, **seen)) for k in range(4)] == [[0], [1], [2], [3]]
    assert [devices(step(k, tasks=2, **seen)) for k in range(2)] == [[0, 1], [2, 3]]
    ids = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    assert [devices(step(k, tasks=4, nodes=2, **ids)) for k in range(4)] == [[0], [1], [0], [1]]
    with pytest.raises(UserError, match="3 processes on one machine see the same 4 GPUs"):
        devices(step(tasks=3, **seen))


def test_tasks_with_two_gpus_of_their_own_drive_both():
    """In a container, each task numbers its own GPUs 0 and 1."""
    own = {"CUDA_VISIBLE_DEVICES": "0,1"}
    for variables in ({"SLURM_GPUS_PER_TASK": "2"}, {"SLURM_GPUS_ON_NODE": "4"}):
        assert [devices(step(k, tasks=2, **own, **variables)) for k in range(2)] == [[0, 1], [0, 1]]


def test_nodes_may_have_other_numbers_of_tasks():
    seen = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "2(x2),4"}
    env = step(tasks=8, **seen)
    assert devices(env | {"SLURM_NODEID": "1", "SLURM_LOCALID": "1"}) == [2, 3]
    assert devices(env | {"SLURM_NODEID": "2", "SLURM_LOCALID": "1"}) == [1]


@pytest.mark.parametrize("seen", ["", "-1", "NoDevFiles"])
def test_no_gpu_is_asked_for_where_none_is_seen(seen):
    assert devices(step(CUDA_VISIBLE_DEVICES=seen)) is None


def test_where_nothing_tells_what_is_seen_each_takes_one():
    assert devices(step(1)) == [1]
    assert devices(step(1, tasks=2, nodes=2)) is None


def test_amd_and_several_variables_at_once():
    both = {"ROCR_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert devices(step(1, **both)) == [1]
    assert devices(step(1, HIP_VISIBLE_DEVICES="5")) == [0]
    assert devices(step(1, ROCR_VISIBLE_DEVICES="0,1", HIP_VISIBLE_DEVICES="1")) == [0]


def test_variables_of_our_own_win_and_mpirun_says_who_shares_a_machine():
    ours = {COORDINATOR: "a:1", NUM_HOSTS: "4", HOST: "2"}
    assert find_place(ours) == ("a:1", 4, 2, None, True)
    mpi = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert devices(ours | mpi | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == [2, 3]
    # The shell of an interactive job, in which one process per host is started by hand.
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert devices(ours | shell | {"CUDA_VISIBLE_DEVICES": "0,1"}) is None
    # If the name of a node cannot be resolved, its address can be given.
    place = find_place(step(1) | {COORDINATOR: "10.0.0.1:99"})
    assert place is not None
    assert place.coordinator == "10.0.0.1:99"


def test_the_users_own_choice_of_devices_stands():
    assert devices(step(1, CUDA_VISIBLE_DEVICES="0,1", JAX_LOCAL_DEVICE_IDS="0")) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({COORDINATOR: "http://a:1"}, COORDINATOR),
        ({COORDINATOR: "a"}, COORDINATOR),
        ({COORDINATOR: "a:70000"}, COORDINATOR),
        ({HOST: "0", NUM_HOSTS: "0", COORDINATOR: "a:1"}, NUM_HOSTS),
    ],
)
def test_variables_that_make_no_sense_are_named(change, word):
    with pytest.raises(UserError, match=word):
        find_place(step(CUDA_VISIBLE_DEVICES="0") | change)


@pytest.mark.parametrize("task", [0, 1])
def test_jax_is_told_the_devices_and_guesses_nothing(task, monkeypatch):
    arguments = {}
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *who, **how: arguments.update(how, who=who)
    )
    for name, value in step(task, CUDA_VISIBLE_DEVICES="0", http_proxy="http://nowhere:1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "a.b")
    monkeypatch.setenv("no_grpc_proxy", "")
    join()
    assert arguments["local_device_ids"] == [0]
    assert arguments["cluster_detection_method"] == "deactivate"
    assert arguments["who"][1:] == (2, task)
    assert dict(os.environ)["no_grpc_proxy"] == "a.b,n1"


BOUNDED = """
import sys
from s2s_jax.cli.exit import run_command
from s2s_jax.cluster import joining
joining._REACH_TIMEOUT, joining._START_TIMEOUT = 1, 1
run_command(lambda _: joining.join())
"""


@pytest.mark.parametrize(
    ("task", "node", "words"),
    [
        (1, "nowhere.invalid", "host 1: no answer from host 0 at nowhere.invalid:"),
        (0, "localhost", "host 0: not all of the 2 hosts connected within 1 s"),
    ],
)
def test_a_task_whose_others_do_not_come_ends_with_a_sentence(task, node, words):
    """Instead of JAX's stack trace, and of its five minutes for a name that cannot be resolved."""
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED],
        env=os.environ | step(task, SLURM_STEP_NODELIST=node, SLURM_JOB_ID=str(os.getpid())),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stderr.startswith(f"error: {words}"), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
