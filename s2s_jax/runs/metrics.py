"""Where the metrics of a run are written: metrics.jsonl, TensorBoard, the terminal."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from s2s_jax.data.logs.index import Skipped
from s2s_jax.runs.tensorboard import EventFile
from s2s_jax.writing import explained, replacing


def read_lines(run_dir: Path) -> list[dict[str, float]]:
    """The whole lines of `metrics.jsonl`; a torn one, as a killed run leaves it, is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


class Writer:
    """Writes lines to metrics.jsonl, TensorBoard and the terminal."""

    def __init__(
        self,
        run_dir: Path,
        step: int,
        total_steps: int,
        tensorboard: bool,
        unwritten: Sequence[dict[str, float]] = (),
    ):
        """Opens the files of a run that stands at `step`; lines after it are taken out.

        Args:
          run_dir: the run directory.
          step: steps done, 0 or that of the checkpoint that the run continues from.
          total_steps: steps at which it ends.
          tensorboard: write event files too.
          unwritten: lines up to `step` that could not be written before.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._path = run_dir / "metrics.jsonl"
        found = read_lines(run_dir)
        if step == 0 and found:
            _set_aside(self._path)
        kept = [line for line in found if line["step"] <= step]
        kept += [line for line in unwritten if line not in kept]
        with replacing(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with explained(self._path):
            # Unbuffered, so that it is known what was written.
            self._jsonl = self._path.open("ab", buffering=0)
        self._unwritten: list[dict[str, float]] = []
        self._tensorboard: EventFile | None = None
        if tensorboard:
            with self._or_without_tensorboard():
                self._tensorboard = EventFile(run_dir / "tensorboard", step)
        self._progress = _Progress(step, total_steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    @property
    def unwritten(self) -> list[dict[str, float]]:
        """Lines that metrics.jsonl does not have because it could not be written."""
        return list(self._unwritten)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self._progress.advance(step)

    def write(self, line: dict[str, float]) -> None:
        """Writes a line of training metrics or of an evaluation.

        Raises:
          UserError: metrics.jsonl cannot be written. TensorBoard, which has nothing besides, is done
            without.
        """
        if self._tensorboard is not None:
            values = {name: value for name, value in line.items() if name != "step"}
            with self._or_without_tensorboard():
                self._tensorboard.write(int(line["step"]), values)
        if "loss" in line:
            self._progress.show(line)
        self._unwritten.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self._unwritten)
        with explained(self._path):
            self._append(text.encode())
        self._unwritten = []

    def _append(self, data: bytes) -> None:
        """Writes all of `data` or, as far as that can be undone, nothing."""
        before = os.fstat(self._jsonl.fileno()).st_size
        try:
            while data:
                data = data[self._jsonl.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._jsonl.fileno(), before)
            raise

    @contextlib.contextmanager
    def _or_without_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
            print(
                f"TensorBoard's files cannot be written ({error.strerror or error}); the run goes on "
                f"without them, metrics.jsonl has the same numbers",
                file=sys.stderr,
                flush=True,
            )


def _set_aside(path: Path) -> None:
    """Keeps the metrics of a run whose checkpoints are gone when another begins in its directory."""
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.jsonl").exists())
    kept = path.with_suffix(f".{number}.jsonl")
    with explained(kept):
        path.rename(kept)
    print(
        f"{path.parent} has metrics but no checkpoint to go on from: training begins anew, and what "
        f"{path.name} had is in {kept.name}",
        file=sys.stderr,
        flush=True,
    )


class SkipLog:
    """`skipped.jsonl`: one line for each stripe or file that could not be read and was passed over.

    Of several hosts, each has its own: `skipped.jsonl`, `skipped.1.jsonl` …
    """

    def __init__(self, run_dir: Path, skipped_files: Sequence[Skipped], host: int = 0):
        """Opens the file of a run directory and lists `skipped_files`."""
        self._path = run_dir / (f"skipped.{host}.jsonl" if host else "skipped.jsonl")
        self._known = set()
        if self._path.exists():
            for text in self._path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError):
                    line = json.loads(text)
                    self._known.add((line["file"], line["stripe"]))
        self.add(skipped_files)

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Lists, here and on stderr, what is not listed yet.

        Raises:
          UserError: the file cannot be written.
        """
        for one in skipped:
            if (one.file, one.stripe) not in self._known:
                print(f"skipped: {one.reason}", file=sys.stderr, flush=True)
                with explained(self._path), self._path.open("a") as file:
                    file.write(json.dumps(one._asdict()) + "\n")
                self._known.add((one.file, one.stripe))


class _Progress:
    """A bar on a terminal; elsewhere a plain line of text for each line of metrics."""

    def __init__(self, step: int, total_steps: int):
        self._total = total_steps
        self._first, self._started = step, 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=step, values="compiling"
            )

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if not self._started:
            # Counted from the first step on, which waited for compilation.
            self._first, self._started = step, time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, line: dict[str, float]) -> None:
        values = (
            f"loss {line['loss']:.4f}  hit rate {line['hit_rate']:.4f}  "
            f"{line['tokens_per_sec']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, values=values)
            return
        done = max(line["step"] - self._first, 1)
        left = (time.perf_counter() - self._started) / done * (self._total - line["step"])
        minutes, seconds = divmod(round(left), 60)
        text = f"step {line['step']:,.0f}/{self._total:,}  {values}  {minutes}:{seconds:02} left"
        print(text, file=sys.stderr, flush=True)


def print_summary(run_dir: Path, rows: int = 6) -> None:
    """Prints a table of some lines of metrics.jsonl, the first and the last among them."""
    lines = [line for line in read_lines(run_dir) if "loss" in line]
    if not lines:
        return
    picked = sorted({round(i * (len(lines) - 1) / max(rows - 1, 1)) for i in range(rows)})
    table = Table(title=f"{run_dir}")
    for column in ("step", "loss", "hit rate", "tokens/s", "ms a step", "of it waiting for input"):
        table.add_column(column, justify="right")
    for line in (lines[i] for i in picked):
        table.add_row(
            f"{line['step']:,}",
            f"{line['loss']:.4f}",
            f"{line['hit_rate']:.4f}",
            f"{line['tokens_per_sec']:,.0f}",
            f"{line['step_ms']:.1f}",
            f"{line['input_wait_ms']:.1f}",
        )
    Console().print(table)
