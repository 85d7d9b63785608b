"""All stripes of all files that a job reads, from their footers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from s2s_jax.config import Config, IOConfig
from s2s_jax.data import features, held_out, orc
from s2s_jax.data.files import find, split_names
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


def index_files(config: Config) -> FileIndex:
    """Reads the footers of all files that `io.data_paths` names.

    Raises:
      UserError: a file cannot be read (unless `io.on_error` is skip_stripe) or has not the columns that
        `features` names, or there are no rows at all.
      MachineError: a file cannot be read on this machine.
    """
    files, skipped = [], []
    found = find(split_names(config.io.data_paths))
    for path in found.files:
        try:
            file = orc.read_footer(path)
        except UserError as error:
            if not may_skip(error, config.io):
                raise
            skipped.append(Skipped(str(path), None, None, str(error)))
            continue
        if file.rows == 0:
            continue
        features.check_schema(file, config.features)
        held_out.check_times(file, config)
        files.append(file)
    if not files:
        what = f"; {len(skipped)} files cannot be read: {skipped[0].reason}" if skipped else ""
        raise UserError(f"io.data_paths: {config.io.data_paths} has no rows{what}")
    kinds = features.entry_kinds(files[0], config.features)
    check_kinds(files, kinds, f"as in {files[0].path}", config)
    return FileIndex(tuple(files), tuple(skipped), tuple(found.notes()))


def check_kinds(
    files: Sequence[orc.OrcFile], kinds: Mapping[str, str], where: str, config: Config
) -> None:
    """Refuses files whose ids are of another kind, and so would be other ids.

    Args:
      files: have the columns of all features.
      kinds: what `features.entry_kinds` said of other files.
      where: which files these are, for messages.
      config: names the features.

    Raises:
      UserError: naming the first such file and column.
    """
    for file in files:
        found = features.entry_kinds(file, config.features)
        for name, kind in kinds.items():
            if found[name] != kind:
                raise UserError(
                    f"{file.path}: column {config.feature(name).column_name} holds {found[name]}, "
                    f"expected {kind} {where}, since the same id would become another one; write the "
                    f"file anew with ids of that kind"
                )


def may_skip(error: UserError, io: IOConfig) -> bool:
    """Whether `io.on_error` lets what cannot be read be left out: not if the machine is the reason."""
    return io.on_error == "skip_stripe" and not isinstance(error, MachineError)


def files_not_in(before: FileIndex, now: FileIndex) -> list[Path]:
    """The files of `now` that are not in `before`."""
    known = {id(file) for file in before.files}
    return [file.path for file in now.files if id(file) not in known]
