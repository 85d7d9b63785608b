"""The machine that a first configuration is for."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from s2s_jax.errors import UserError

# Asked in another process, because a process that has used a GPU keeps its memory.
_QUESTION = """
import json, jax
devices = jax.devices()
limits = [device.memory_stats() for device in devices]
memory = sum(limit["bytes_limit"] for limit in limits if limit and "bytes_limit" in limit)
print(json.dumps([devices[0].platform, len(devices), memory]))
"""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine.

    Attributes:
      kind: cpu, or gpu for anything faster.
      devices: number of devices.
      cores: number of CPU cores.
      memory: bytes of memory for the state of training: of all devices, or of the machine for CPUs.
    """

    kind: Literal["cpu", "gpu"]
    devices: int
    cores: int
    memory: int

    @property
    def text(self) -> str:
        """The machine in words."""
        of_devices = "" if self.kind == "cpu" else f"{self.devices} GPU{'s' * (self.devices > 1)}, "
        cores = f"{self.cores} CPU core{'s' * (self.cores > 1)}"
        return f"{of_devices}{cores}, {self.memory / 1e9:.0f} GB of memory"


def this_machine() -> Machine:
    """Asks JAX for its devices, and the system for the rest.

    Raises:
      UserError: JAX finds no devices.
    """
    command = [sys.executable, "-c", _QUESTION]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"s2s init: JAX finds no devices ({reason}); repair its installation")
    platform, devices, memory = json.loads(answer.stdout.splitlines()[-1])
    return Machine(
        kind="cpu" if platform == "cpu" else "gpu",
        devices=devices,
        cores=len(os.sched_getaffinity(0)),
        memory=memory if platform != "cpu" and memory else _memory(),
    )


def is_busy() -> bool:
    """Whether programs have used more than half of the CPU cores during the last minute."""
    return os.getloadavg()[0] > 0.5 * len(os.sched_getaffinity(0))


def _memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdecimal():
            found.append(int(text))
    return min(found)
