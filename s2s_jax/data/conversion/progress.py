"""Shows how far a conversion is."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def bar(task: str, share: Callable[[], float]) -> Iterator[None]:
    """While the `with` block runs, shows its progress on a terminal; `share` returns it, from 0 to 1."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        shown = progress.add_task(task, total=1.0)

        def watch() -> None:
            while not ended.wait(0.25):
                progress.update(shown, completed=share())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
