"""How the processes of a job end: all together, also when one of them fails or is stopped."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from jax._src import distributed

from s2s_jax.errors import EXIT_STOPPED, LostHostError, NotFiniteError, Stopped, UserError, explain

# The key under which a process that ends early says so, in the store shared by all processes.
_ENDED = "s2s_jax/ended"
# Seconds between checks of this key, and the time that an ending process gives the others to check it,
# which matters if it is the one that holds the store.
_LOOK_EVERY, _TIME_TO_LOOK = 1, 4
# Set when this process itself ends early.
_ending = threading.Event()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If this process fails or is stopped, ends it at once, and the other processes too.

    The others would wait for it in the next step or save, and it would wait for them in an orderly
    exit. So it notifies them, see `watch_others`. If a process died without notifying the others, the
    resulting errors are explained.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        if _count() == 1:
            raise
        _ending.set()
        code = 1
        try:
            code = explain(_explained(error))
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            _tell_others()
            os._exit(code)


def _count() -> int:
    """Number of processes; `jax.process_count` needs a device, and may wait for the others."""
    return distributed.global_state.num_processes


def _number() -> int:
    return distributed.global_state.process_id


def _tell_others() -> None:
    client = distributed.global_state.client
    if client is None:
        return
    # Another process may have done so before, or all others may be gone.
    with contextlib.suppress(Exception):
        client.key_value_set(_ENDED, str(_number()))
    _give_time_to_look()


def _give_time_to_look() -> None:
    # When the store is gone, JAX aborts the remaining processes, which would lose their exit codes.
    if _number() == 0:
        time.sleep(_TIME_TO_LOOK)


def watch_others() -> None:
    """Starts a thread that ends this process when another one says that it ended early."""

    def watch() -> None:
        client = distributed.global_state.client
        while client is not None and not _ending.wait(_LOOK_EVERY):
            try:
                host = client.key_value_try_get(_ENDED)
            except Exception:  # The key is not set.
                continue
            if not _ending.is_set():
                explain(
                    LostHostError(
                        f"host {host} of the job has ended, and so does host {_number()}; see the "
                        f"messages of host {host}, and start the job again to continue from its "
                        f"newest checkpoint"
                    )
                )
                _give_time_to_look()
                os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, name="s2s-watch", daemon=True).start()


def _explained(error: BaseException) -> BaseException:
    words = "Gloo|NCCL|[Cc]onnection|UNAVAILABLE|ABORTED|DEADLINE|heartbeat|[Pp]eer|[Bb]arrier"
    if isinstance(error, UserError | NotFiniteError | Stopped) or not re.search(words, str(error)):
        return error
    return LostHostError(
        f"another host of the job is gone (host {_number()} got {first_line(error)!r}); start the "
        f"job again to continue from its newest checkpoint"
    )


def leave() -> None:
    """Disconnects after a complete run; waits for the others."""
    _ending.set()
    if _count() > 1:
        jax.distributed.shutdown()


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
