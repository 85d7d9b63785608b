"""The processes of a job: how they find each other, agree, and notice that one is gone.

Every process runs the same program on its own devices; `jax.distributed` connects them. Process 0
("host 0") alone writes metrics, configuration and messages; checkpoints are written by all.
"""

import contextlib
import os
import re
import sys
import traceback
import zlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from s2s_jax.errors import LostHostError, NotFiniteError, UserError, explain

# What launchers set where there is no SLURM; see launch/.
COORDINATOR, NUM_HOSTS, HOST = "S2S_JAX_COORDINATOR", "S2S_JAX_NUM_HOSTS", "S2S_JAX_HOST"
# Seconds without a sign of life after which a process counts as gone.
_HEARTBEAT_TIMEOUT = 40
_START_TIMEOUT = 300


def join() -> None:
    """Connects this process with the others of its job, if the environment says that there are any.

    Must run before JAX touches a device. Looks for `S2S_JAX_COORDINATOR` (host:port of process 0),
    `S2S_JAX_NUM_HOSTS` and `S2S_JAX_HOST`, then for SLURM's variables of a step with several tasks.

    Raises:
      UserError: the variables are incomplete, or the others do not come.
    """
    env = os.environ
    ours = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name in env]
    if ours:
        missing = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name not in env]
        if missing:
            raise UserError(f"{ours[0]} is set but not {missing[0]}; set all three, or none")
        hosts, host = _number(NUM_HOSTS), _number(HOST)
        if not 0 <= host < hosts:
            raise UserError(f"{HOST}: expected 0 to {hosts - 1} ({NUM_HOSTS} - 1), found {host}")
        if hosts > 1:
            _initialize(coordinator_address=env[COORDINATOR], num_processes=hosts, process_id=host)
    elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _initialize()


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(f"{name}: expected a whole number, found {os.environ[name]!r}") from error


def _initialize(**who: str | int) -> None:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **who,  # pyright: ignore[reportArgumentType]
            initialization_timeout=_START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except RuntimeError as error:
        raise UserError(
            f"the processes of the job did not find each other ({_first_line(error)}); check that "
            f"all are started and reach the coordinator"
        ) from error


def is_first() -> bool:
    """Whether this process writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Tells the user something, once."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def wait_for_all(what: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(facts: Mapping[str, str]) -> None:
    """Refuses processes that see different things, such as files that have not arrived everywhere.

    Raises:
      UserError: naming the first of `facts` that is not the same text on all processes.
    """
    if jax.process_count() == 1:
        return
    mine = np.array([zlib.crc32(text.encode()) for text in facts.values()], np.uint32)
    all_PF = np.asarray(multihost_utils.process_allgather(mine))
    for number, name in enumerate(facts):
        differs = np.nonzero(all_PF[:, number] != all_PF[0, number])[0]
        if len(differs):
            raise UserError(
                f"{name}: host {differs[0]} sees something else than host 0; start all with the same "
                f"configuration and the same files"
            )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends a process of several at once when its part fails, so that the others notice.

    They wait for it in the next step or save, and it would wait for them in an orderly exit: only the
    end of its connections tells them. What they see then is explained in a sentence.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        code = 1
        try:
            code = explain(_explained(error))
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _explained(error: Exception) -> Exception:
    words = "Gloo|NCCL|[Cc]onnection|UNAVAILABLE|ABORTED|DEADLINE|heartbeat|[Pp]eer|[Bb]arrier"
    if isinstance(error, UserError | NotFiniteError) or not re.search(words, str(error)):
        return error
    return LostHostError(
        f"another host of the job is gone, as host {jax.process_index()} sees by "
        f"{_first_line(error)!r}; start the job again to continue from its newest checkpoint"
    )


def leave() -> None:
    """Ends the connection after a whole run; waits for the others."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
