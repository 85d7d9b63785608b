"""Indexes the files of a job from their footers, and refuses files that the features cannot read."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Decoding, Logs
from s2s_jax.data.encoding import held_out
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.files import find, split_names
from s2s_jax.data.logs.index import FileIndex, Skipped, may_skip
from s2s_jax.errors import UserError
from s2s_serve.encoding import features
from s2s_serve.storage.address import Place, StorePath

# Footers of files in stores that are read at the same time.
_FOOTERS = 16


def index_files(logs: Logs, decoding: Decoding) -> FileIndex:
    """Reads the footers of all files of `logs`.

    Args:
      logs: the files.
      decoding: how their rows will be decoded.

    Raises:
      UserError: a file cannot be read (and may not be skipped) or lacks a column of a feature, or there
        are no rows at all.
      MachineError: a file cannot be read on this machine.
    """
    files, skipped = [], []
    found = find(split_names(logs.paths))
    for path, read in _reads(found.files):
        try:
            file = read()
        except UserError as error:
            if not may_skip(error, logs):
                raise
            skipped.append(Skipped(str(path), None, None, str(error)))
            continue
        if file.rows == 0:
            continue
        features.check_schema(file, decoding.features)
        held_out.check_times(file, decoding.split)
        files.append(file)
    if not files:
        what = f"; {len(skipped)} files cannot be read: {skipped[0].reason}" if skipped else ""
        raise UserError(f"io.data_paths: {logs.paths} has no rows{what}")
    kinds = features.entry_kinds(files[0], decoding.features)
    check_kinds(files, kinds, f"as in {files[0].path}", decoding.features)
    return FileIndex(tuple(files), tuple(skipped), tuple(found.notes()))


def _reads(paths: Sequence[Place]) -> Iterator[tuple[Place, Callable[[], orc.OrcFile]]]:
    """Yields paths with functions that give their footers; those of stores are read at the same time."""
    with ThreadPoolExecutor(_FOOTERS) as pool:
        later = [
            pool.submit(orc.read_footer, path).result
            if isinstance(path, StorePath)
            else functools.partial(orc.read_footer, path)
            for path in paths
        ]
        yield from zip(paths, later, strict=True)


def check_kinds(
    files: Sequence[orc.OrcFile],
    kinds: Mapping[str, str],
    where: str,
    readers: Sequence[FeatureConfig],
) -> None:
    """Refuses files whose ids are of another kind, because they would be encoded differently.

    Args:
      files: files with the columns of all features.
      kinds: the result of `features.entry_kinds` for other files.
      where: describes these other files, for messages.
      readers: the features.

    Raises:
      UserError: a file is refused; the message names the file and the column.
    """
    for file in files:
        found = features.entry_kinds(file, readers)
        for name, kind in kinds.items():
            if found[name] != kind:
                (column,) = (f.column_name for f in readers if f.name == name)
                raise UserError(
                    f"{file.path}: column {column} holds {found[name]}, "
                    f"expected {kind} {where}, because the same id would be encoded differently; "
                    f"rewrite the file with ids of that kind"
                )
