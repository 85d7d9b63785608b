"""Ends the processes of a job together, even if one of them fails or is stopped."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from jax._src import distributed

from s2s_jax.errors import EXIT_STOPPED, LostHostError, NotFiniteError, Stopped, UserError, explain
from s2s_jax.signals import Stop
from s2s_jax.storage import lock

# A process that ends early sets this key in the store that all processes share.
_ENDED = "s2s_jax/ended"
# Seconds between two checks of this key.
_CHECK_INTERVAL = 1
# Seconds for which process 0, which holds the store, stays so that the others can check the key.
_GRACE_PERIOD = 4
# Milliseconds that a process which is done waits for the others. A lost one is noticed much earlier.
_LEAVING_MS = 24 * 3_600_000
# Set when this process ends.
_ending = threading.Event()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If this process fails or is stopped, ends it at once, and the other processes too.

    Otherwise, the others would wait for this process in the next step or save, and this process would
    wait for them when it exits. So it notifies them, and they end too, see `watch_others`. If a process
    died without notifying the others, this explains the errors that they get.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        if _count() == 1:
            raise
        _ending.set()
        code = 1
        try:
            if isinstance(error, BrokenPipeError):
                # The reader of stdout wants no more, see `run_command`.
                code = 128 + signal.SIGPIPE
            else:
                code = explain(_explained(error))
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            _notify_others()
            lock.release_all()
            os._exit(code)


def _count() -> int:
    """The number of processes. (`jax.process_count` needs a device, and may wait for the others.)"""
    return distributed.global_state.num_processes


def _number() -> int:
    return distributed.global_state.process_id


def _notify_others() -> None:
    client = distributed.global_state.client
    if client is None:
        return
    # Setting the key fails if another process has set it, or if the store is gone.
    with contextlib.suppress(Exception):
        client.key_value_set(_ENDED, str(_number()))
    _wait_for_others_to_check()


def _wait_for_others_to_check() -> None:
    # Without the store, JAX aborts the other processes, and their exit codes are lost.
    if _number() == 0:
        time.sleep(_GRACE_PERIOD)


def watch_others() -> None:
    """Starts a thread that ends this process when another process has ended early."""

    def watch() -> None:
        client = distributed.global_state.client
        while client is not None and not _ending.wait(_CHECK_INTERVAL):
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
                _wait_for_others_to_check()
                lock.release_all()
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
    """Disconnects from the other processes at the end of a job, after waiting for them.

    They may have work left, such as files that only host 0 writes. If one of them fails or is stopped
    meanwhile, this process ends with it.
    """
    client = distributed.global_state.client
    if _count() == 1 or client is None:
        return
    with ending_together():
        # JAX's own wait in `shutdown` gives up after minutes, and aborts if a process fails meanwhile.
        # In another thread, because Python handles no signals in this one while it waits.
        Stop().unless_stopped(lambda: client.wait_at_barrier("s2s_jax/leaving", _LEAVING_MS))
    _ending.set()
    jax.distributed.shutdown()


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
