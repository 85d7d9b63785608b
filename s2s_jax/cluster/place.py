"""Where a process stands among those of its job, as its launcher's variables say.

Launchers are `S2S_JAX_*` set by hand or by launch/, and SLURM's `srun`. JAX would guess from the same
variables that task k of a machine drives GPU k, which is wrong where each task sees only its own GPU,
and where one task drives all of them.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from s2s_jax.errors import UserError

COORDINATOR, NUM_HOSTS, HOST = "S2S_JAX_COORDINATOR", "S2S_JAX_NUM_HOSTS", "S2S_JAX_HOST"
# Each that is set narrows the GPUs that a process sees; SLURM sets several at once, to the same.
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
# Ports above those that Linux hands out by itself.
_FIRST_PORT, _PORTS = 61440, 4096


class Place(NamedTuple):
    """One of several processes.

    Attributes:
      coordinator: host:port of process 0.
      hosts: number of processes.
      host: number of this one.
      devices: which of the GPUs that it sees are its own; None: all, or there are none.
      by_hand: whether the numbers are from `S2S_JAX_*` variables, so that they may be wrong.
    """

    coordinator: str
    hosts: int
    host: int
    devices: list[int] | None
    by_hand: bool


def find_place(env: Mapping[str, str]) -> Place | None:
    """Where the process with the environment `env` stands; None: it is alone.

    Raises:
      UserError: variables are missing, are no numbers, or contradict each other.
    """
    ours = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name in env]
    in_step = _in_slurm_step(env)
    if ours and not (in_step and ours == [COORDINATOR]):
        missing = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name not in env]
        if missing:
            raise UserError(f"{ours[0]} is set but not {missing[0]}; set all three, or none")
        hosts, host = _number(env, NUM_HOSTS), _number(env, HOST)
        if hosts < 1:
            raise UserError(f"{NUM_HOSTS}: expected at least 1, found {hosts}")
        if not 0 <= host < hosts:
            raise UserError(f"{HOST}: expected 0 to {hosts - 1} ({NUM_HOSTS} - 1), found {host}")
        coordinator = env[COORDINATOR]
    elif in_step:
        hosts, host = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
        coordinator = env[COORDINATOR] if ours else _slurm_coordinator(env)
    else:
        return None
    split_address(coordinator)
    if hosts == 1:
        return None
    return Place(coordinator, hosts, host, _own_devices(env), by_hand=HOST in env)


def split_address(address: str) -> tuple[str, int]:
    """Name and port of `host:port`; an IPv6 address stands in brackets.

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
    """A port of the first node that steps of other jobs, and the next start of this one, do not use."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set, though SLURM sets it; start with srun")
    # The later two are not set outside of a job that was queued again, and by old versions.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (_number(env, name) if env.get(name) else 0 for name in names)
    port = _FIRST_PORT + (job + 61 * step + 379 * restarts) % _PORTS
    return f"{_first_node(nodes)}:{port}"


def _first_node(nodes: str) -> str:
    """`a[01-03,7]-b[2-4],c` → `a01-b2`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _own_devices(env: Mapping[str, str]) -> list[int] | None:
    """Positions, among the GPUs that this process sees, of those that it drives.

    Where a launcher gave each process of a machine its own, these are all that it sees. Where all see
    the same, each takes its share.
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
            f"start 1 or {seen} a machine, or give each its own (srun --gpus-per-task=1)"
        )
    share = seen // tasks
    return list(range(rank * share, (rank + 1) * share))


def _among_local(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Number of this process among those of its machine, and their number, if a launcher tells."""
    if _in_slurm_step(env):
        rank = _number(env, "SLURM_LOCALID")
        node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
        told = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
        if not told:
            # All on one machine, unless the list names several.
            nodes = _number(env, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in env else 1
            return rank, -(-_number(env, "SLURM_STEP_NUM_TASKS") // nodes)
        return rank, _tasks_of_node(told, node)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env and "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
        rank, size = (_number(env, name) for name in names)
        return rank, size
    return None


def _tasks_of_node(told: str, node: int) -> int:
    """`4(x2),1` → 4 for nodes 0 and 1, 1 for node 2."""
    counts: list[int] = []
    for part in told.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE: expected such as 4(x2),1, found {told!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[min(node, len(counts) - 1)]


def _count_visible(env: Mapping[str, str]) -> int | None:
    """How many GPUs this process sees; None: no variable and no device file tells."""
    # CUDA ends a list at the first entry that is none; SLURM writes NoDevFiles for no GPU.
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
    """Whether SLURM gave each task of this node GPUs of its own.

    Each may call its own by the same numbers, from 0 on, so that the numbers do not tell.
    """
    if env.get("SLURM_GPUS_PER_TASK") or "gres/gpu" in env.get("SLURM_TRES_PER_TASK", ""):
        return True
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return on_node.isdigit() and seen * tasks <= int(on_node)
