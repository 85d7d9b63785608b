"""The files that a job reads, from their footers; refuses those that the features cannot read."""

from collections.abc import Mapping, Sequence

from s2s_jax.config import Config
from s2s_jax.data.encoding import features, held_out
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.files import find, split_names
from s2s_jax.data.logs.index import FileIndex, Skipped, may_skip
from s2s_jax.errors import UserError


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
