"""All stripes of all files that a job reads."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from s2s_jax.config import IOConfig
from s2s_jax.data.logs import orc
from s2s_jax.errors import MachineError, UserError


class Skipped(NamedTuple):
    """Rows that could not be read and so weigh nothing.

    Attributes:
      file: path.
      stripe: number of the stripe in the file; None for a file of which nothing can be read.
      rows: of the stripe; None where unknown.
      reason: one sentence.
    """

    file: str
    stripe: int | None
    rows: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """What is read, in order.

    Attributes:
      files: the files, none of them empty.
      skipped: files left out because they cannot be read.
      notes: what the user may not expect of the files that were found.
    """

    files: tuple[orc.OrcFile, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def stripes(self) -> tuple[tuple[orc.OrcFile, int, int], ...]:
        """For each stripe its file, its number there and its first row there."""
        stripes = []
        for file in self.files:
            first_row = 0
            for number, rows in enumerate(file.stripe_rows):
                # A stripe without rows has nothing to be read.
                if rows:
                    stripes.append((file, number, first_row))
                first_row += rows
        return tuple(stripes)

    @property
    def stripe_rows(self) -> tuple[int, ...]:
        """Rows of each stripe."""
        return tuple(file.stripe_rows[number] for file, number, _ in self.stripes)

    def identity(self) -> list[list[str]]:
        """What tells each file from others, as JSON: what a reading position is counted in.

        A copy of a log, wherever it lies and whenever it was made, has the same.
        """
        return [[file.path.name, file.fingerprint, file.sample] for file in self.files]

    def restrict(self, identity: Sequence[Sequence[str]]) -> "FileIndex":
        """The index of those files that `identity` lists, in its order.

        A file of the same name and footer may have another sample of bytes: see `rewritten`.

        Raises:
          UserError: one of them is not there, or not as it was.
        """
        there: dict[tuple[str, str], list[orc.OrcFile]] = {}
        for file in self.files:
            there.setdefault((file.path.name, file.fingerprint), []).append(file)
        chosen = []
        for name, fingerprint, *sample in identity:
            same = there[name, fingerprint] if (name, fingerprint) in there else []
            if not same:
                changed = any(file.path.name == name for file in self.files)
                what = "has changed" if changed else "is missing"
                raise UserError(
                    f"io.data_paths: the checkpoint's reading position was saved with other files: "
                    f"{name} {what}; bring the files back or give another train.output_dir"
                )
            exact = [number for number, file in enumerate(same) if [file.sample] == sample]
            chosen.append(same.pop(exact[0] if exact else 0))
        return FileIndex(tuple(chosen), self.skipped, self.notes)

    def rewritten(self, identity: Sequence[Sequence[str]]) -> list[str]:
        """Names of the files whose bytes are others than `identity` says, though their footers are not.

        Args:
          identity: of as many files, as `restrict` takes it; older ones say nothing of bytes.
        """
        pairs = zip(identity, self.identity(), strict=True)
        return [now[0] for before, now in pairs if list(before) != now[: len(before)]]


def may_skip(error: UserError, io: IOConfig) -> bool:
    """Whether `io.on_error` lets what cannot be read be left out: not if the machine is the reason."""
    return io.on_error == "skip_stripe" and not isinstance(error, MachineError)


def files_not_in(before: FileIndex, now: FileIndex) -> list[Path]:
    """The files of `now` that are not in `before`."""
    known = {id(file) for file in before.files}
    return [file.path for file in now.files if id(file) not in known]
