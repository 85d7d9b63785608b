"""The emulator of Google Cloud Storage, for several connections at a time: `gcs_emulator.py start …`.

By itself, it answers one connection after another, and pyarrow keeps several. Its dictionaries are not
made for threads, so these take turns. (Only there: a thread that waits for the rest of a request must
not keep another one waiting.)
"""

import functools
import http.server
import inspect
import runpy
import threading
from collections.abc import Callable

from gcp_storage_emulator import storage


def one_at_a_time(method: Callable, lock: threading.RLock) -> Callable:
    @functools.wraps(method)
    def locked(*arguments: object, **more: object) -> object:
        with lock:
            return method(*arguments, **more)

    return locked


if __name__ == "__main__":
    of_all = threading.RLock()
    for cls in (storage._FileStore, storage.Storage):
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method):
                setattr(cls, name, one_at_a_time(method, of_all))
    http.server.HTTPServer = http.server.ThreadingHTTPServer
    runpy.run_module("gcp_storage_emulator", run_name="__main__")
