"""Finds the place of a process in its job from the variables of its launcher.

These are `S2S_JAX_*`, set by hand or by the scripts in launch/, or those of SLURM's `srun`. From the
same variables, JAX would guess that task k of a machine uses GPU k, which is wrong if each task sees
only its own GPU, or if one task uses all of them.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from s2s_jax.errors import UserError

COORDINATOR, NUM_HOSTS, HOST = "S2S_JAX_COORDINATOR", "S2S_JAX_NUM_HOSTS", "S2S_JAX_HOST"
# Each of these, if set, restricts the GPUs that a process sees; SLURM sets several of them to the same.
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
# Ports above the range from which Linux assigns ports.
_FIRST_PORT, _PORTS = 61440, 4096


class Place(NamedTuple):
    """The place of a process in its job.

    Attributes:
      coordinator: host:port of process 0.
      hosts: number of processes.
      host: number of this process.
      devices: indices of its own GPUs, among those that it sees; None: all, or there are none.
      by_hand: whether the numbers are from `S2S_JAX_*` variables, and so may be wrong.
    """

    coordinator: str
    hosts: int
    host: int
    devices: list[int] | None
    by_hand: bool


def find_place(env: Mapping[str, str]) -> Place | None:
    """The place of a process with the environment `env`; None: it is the only process.

    Raises:
      UserError: variables are missing, are not numbers, or contradict each other.
    """
    ours = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name in env]
    in_slurm_step = _in_slurm_step(env)
    if ours and not (in_slurm_step and ours == [COORDINATOR]):
        missing = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name not in env]
        if missing:
            raise UserError(f"{ours[0]} is set but not {missing[0]}; set all three, or none")
        hosts, host = _number(env, NUM_HOSTS), _number(env, HOST)
        if hosts < 1:
            raise UserError(f"{NUM_HOSTS}: expected at least 1, found {hosts}")
        if not 0 <= host < hosts:
            raise UserError(f"{HOST}: expected 0 to {hosts - 1} ({NUM_HOSTS} - 1), found {host}")
        coordinator = env[COORDINATOR]
    elif in_slurm_step:
        hosts, host = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
        coordinator = env[COORDINATOR] if ours else _slurm_coordinator(env)
    else:
        return None
    split_address(coordinator)
    if hosts == 1:
        return None
    return Place(coordinator, hosts, host, _own_devices(env), by_hand=HOST in env)


def split_address(address: str) -> tuple[str, int]:
    """Name and port of `host:port`; an IPv6 address must be in brackets.

    Raises:
      UserError: it is not of this form.
    """
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if not found or not 0 < int(found[2]) < 2**16:
        raise UserError(
            f"{COORDINATOR}: expected HOST:PORT of process 0, such as node1:8476, found {address!r}"
        )
    return found[1].strip("[]"), int(found[2])


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError as error:
        raise UserError(f"{name} is not set, though SLURM sets it; start with srun") from error
    except ValueError as error:
        raise UserError(f"{name}: expected a whole number, found {env[name]!r}") from error


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    return (
        "SLURM_PROCID" in env
        and "SLURM_STEP_NUM_TASKS" in env
        and _number(env, "SLURM_STEP_NUM_TASKS") > 1
    )


def _slurm_coordinator(env: Mapping[str, str]) -> str:
    """The first node, with a port that differs between jobs, and between restarts of a job."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set, though SLURM sets it; start with srun")
    # SLURM_RESTART_COUNT is only set after a restart, and old versions of SLURM may lack the last two.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (_number(env, name) if env.get(name) else 0 for name in names)
    port = _FIRST_PORT + (job + 61 * step + 379 * restarts) % _PORTS
    return f"{_first_node(nodes)}:{port}"


def _first_node(nodes: str) -> str:
    """The first name in a list of nodes: `a[01-03,7]-b[2-4],c` gives `a01-b2`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _own_devices(env: Mapping[str, str]) -> list[int] | None:
    """Indices of this process's own GPUs among those that it sees.

    If the launcher gave each process its own GPUs, these are all that it sees. If all processes of a
    machine see the same GPUs, each takes its share.
    """
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    local = _among_local(env)
    seen = _count_visible(env)
    if local is None or seen == 0:
        return None
    rank, tasks = local
    if seen is None:
        return [rank] if tasks > 1 else None
    if tasks == 1 or seen == 1 or _bound_to_task(env, seen, tasks):
        return list(range(seen))
    if seen % tasks:
        raise UserError(
            f"{tasks} processes on one machine see the same {seen} GPUs, which cannot be shared evenly; "
            f"start 1 or {seen} per machine, or give each its own (srun --gpus-per-task=1)"
        )
    share = seen // tasks
    return list(range(rank * share, (rank + 1) * share))


def _among_local(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Number of this process on its machine, and the number of processes there, if known."""
    if _in_slurm_step(env):
        rank = _number(env, "SLURM_LOCALID")
        node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
        counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
        if not counts:
            # All processes are on one machine, unless there are several nodes.
            nodes = _number(env, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in env else 1
            return rank, -(-_number(env, "SLURM_STEP_NUM_TASKS") // nodes)
        return rank, _tasks_of_node(counts, node)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env and "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
        rank, size = (_number(env, name) for name in names)
        return rank, size
    return None


def _tasks_of_node(text: str, node: int) -> int:
    """The number of tasks of a node: `4(x2),1` is 4 for nodes 0 and 1, and 1 for node 2."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE: expected counts such as 4(x2),1, found {text!r}"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[min(node, len(counts) - 1)]


def _count_visible(env: Mapping[str, str]) -> int | None:
    """Number of GPUs that this process sees; None: unknown from variables and device files."""
    # CUDA ignores a list from its first invalid entry on; SLURM writes NoDevFiles for no GPU.
    is_device = re.compile(r"\d+|GPU-.+|MIG-.+").fullmatch
    counts = [
        len(list(itertools.takewhile(is_device, map(str.strip, env[name].split(",")))))
        for name in _VISIBLE
        if name in env
    ]
    if counts:
        return min(counts)
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or None


def _bound_to_task(env: Mapping[str, str], seen: int, tasks: int) -> bool:
    """Whether SLURM gave each task of this node its own GPUs.

    The numbers of the GPUs do not show it, because each task may number its own GPUs from 0.
    """
    if env.get("SLURM_GPUS_PER_TASK") or "gres/gpu" in env.get("SLURM_TRES_PER_TASK", ""):
        return True
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return on_node.isdigit() and seen * tasks <= int(on_node)
