"""The index of all files and stripes that a job reads."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from s2s_jax.config.settings import Logs
from s2s_jax.data.logs import orc
from s2s_jax.errors import MachineError, UserError
from s2s_serve.storage.address import Place


class Skipped(NamedTuple):
    """Rows that could not be read and were skipped.

    Attributes:
      file: path of the file.
      stripe: number of the stripe in the file; None if the whole file cannot be read.
      rows: number of rows; None if unknown.
      reason: one sentence.
    """

    file: str
    stripe: int | None
    rows: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """The files and stripes to read, in order.

    Attributes:
      files: the files; empty ones are left out.
      skipped: files left out because they cannot be read.
      notes: notes on what the user may not expect of the files.
    """

    files: tuple[orc.OrcFile, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def stripes(self) -> tuple[tuple[orc.OrcFile, int, int], ...]:
        """The file of each stripe, its number in the file, and its first row in the file."""
        stripes = []
        for file in self.files:
            first_row = 0
            for number, rows in enumerate(file.stripe_rows):
                # A stripe without rows need not be read.
                if rows:
                    stripes.append((file, number, first_row))
                first_row += rows
        return tuple(stripes)

    @property
    def stripe_rows(self) -> tuple[int, ...]:
        """Number of rows of each stripe."""
        return tuple(file.stripe_rows[number] for file, number, _ in self.stripes)

    def identity(self) -> list[list[str]]:
        """What identifies each file, as JSON. A reading position is only valid for the same files.

        Copies of a log have the same identity, regardless of their path and time of modification.
        """
        return [[file.path.name, file.fingerprint, file.sample] for file in self.files]

    def restrict(self, identity: Sequence[Sequence[str]]) -> "FileIndex":
        """The index of only the files listed in `identity`, in that order.

        A file with the same name and footer may differ in its sample of bytes: see `rewritten`.

        Raises:
          UserError: a listed file is missing or has changed.
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
        """Names of files whose footer is as in `identity` but whose sample of bytes is not.

        Args:
          identity: the identity of as many files, as for `restrict`; older identities lack the sample.
        """
        pairs = zip(identity, self.identity(), strict=True)
        return [now[0] for before, now in pairs if list(before) != now[: len(before)]]


def may_skip(error: UserError, logs: Logs) -> bool:
    """Whether a part that cannot be read may be skipped; never if the machine is the cause."""
    return logs.skip_unreadable and not isinstance(error, MachineError)


def files_not_in(before: FileIndex, now: FileIndex) -> list[Place]:
    """The files of `now` that are not in `before`."""
    known = {id(file) for file in before.files}
    return [file.path for file in now.files if id(file) not in known]
