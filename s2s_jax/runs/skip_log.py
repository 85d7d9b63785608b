"""Lists the stripes and files that a run skipped, in `skipped.jsonl`."""

import contextlib
import json
import sys
from collections.abc import Sequence

from s2s_jax.data.logs.index import Skipped
from s2s_jax.writing import append_text
from s2s_serve.storage.address import Place


class SkipLog:
    """`skipped.jsonl`: one line for each stripe or file that could not be read and was skipped.

    With several hosts, each has its own file: `skipped.jsonl`, `skipped.1.jsonl` …
    """

    def __init__(self, run_dir: Place, skipped_files: Sequence[Skipped], host: int = 0):
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
        """Lists skipped parts, in the file and on stderr, unless already listed.

        Raises:
          UserError: the file cannot be written.
        """
        for one in skipped:
            if (one.file, one.stripe) not in self._known:
                print(f"skipped: {one.reason}", file=sys.stderr, flush=True)
                append_text(self._path, json.dumps(one._asdict()) + "\n")
                self._known.add((one.file, one.stripe))
