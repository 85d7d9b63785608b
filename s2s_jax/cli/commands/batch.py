"""Shows one batch as the model sees it: `s2s batch FILE [--section.key value …]`."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from s2s_jax.cli.console import wide_console
from s2s_jax.cli.parsing import OfConfig, parse_with_config
from s2s_jax.config import Config, FeatureConfig
from s2s_jax.config.settings import Split
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.jobs.batch import NO_TARGET, ShownBatch, show_batch
from s2s_jax.training.step.batches import (
    ITEM_SHARE,
    NEGATIVES_SHARE,
    SEQUENCE,
    TIME,
    UNIFORM_SHARE,
)
from s2s_serve.encoding.feature import NO_ID

_NOTHING = "-"
_HOLDS = {
    "length": "number of real positions in each row; padding follows them",
    SEQUENCE: "number of the packed sequence that each position belongs to; -1: padding",
    TIME: "time of each event, in seconds",
    ITEM_SHARE: "share of all events that are of the item",
    NEGATIVES_SHARE: "share of all events that are of the sampled item",
    UNIFORM_SHARE: "probability that any one item is sampled uniformly",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(OfConfig):
    """Prints the name, type and shape of each array of a batch. For the first rows, also prints the ids,
    the times, and the target of each position. Does not train, and writes no files.
    """

    step: int = 1
    """Step whose batch is shown; the first is 1"""
    rows: int = 3
    """Number of rows to show"""
    sequences: int = 3
    """Number of packed sequences to show per row"""
    positions: int = 12
    """Number of positions to show per sequence: the first half and the last half of them"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    given = parse_with_config(Arguments, argv, "batch")
    if given is None:
        return EXIT_DONE
    arguments, config = given
    for name, least in (("step", 1), ("rows", 0), ("sequences", 1), ("positions", 2)):
        found = getattr(arguments, name)
        if found < least:
            raise UserError(f"--{name}: expected at least {least}, found {found}")
    batch = show_batch(config, arguments.step)
    console = wide_console()
    console.print(Text(_summary(config, batch, arguments.step)), soft_wrap=True)
    console.print(_arrays(config, batch))
    if batch.times is None and arguments.rows:
        console.print("no times are shown: no column of the log is known to contain times")
    for table in itertools.chain.from_iterable(
        _row(config, batch, row, arguments) for row in _first_rows(batch, arguments.rows)
    ):
        console.print(table)
    return EXIT_DONE


def _summary(config: Config, batch: ShownBatch, step: int) -> str:
    counts, lengths = batch.counts, batch.arrays["length"]
    microbatches, rows = lengths.shape
    text = (
        f"Batch of step {step:,}: {counts['examples']:,} rows of the log (there is room for "
        f"{batch.log_rows:,}) in {microbatches:,} x {rows:,} sequences "
        f"of {config.model.seq_len:,} positions, on {batch.devices}; {counts['tokens']:,} positions "
        f"({counts['tokens'] / (lengths.size * config.model.seq_len):.0%}) are real"
    )
    if counts.get("cut_positions"):
        text += f", {counts['cut_positions']:,} more did not fit"
    if counts["skipped_rows"]:
        text += f"; {counts['skipped_rows']:,} rows could not be read"
    if Split.of(config).holds_out:
        text += "; events that eval.split holds out are left out"
    return text


def _arrays(config: Config, batch: ShownBatch) -> Table:
    letters = "A microbatches, B rows, L positions, K ids of a bag, C sampled items"
    table = Table(title=f"Arrays ({letters})", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("array", "type", "shape", "letters", "holds"):
        table.add_column(name, no_wrap=name != "holds")
    for name, array in batch.arrays.items():
        shape = " x ".join(f"{size:,}" for size in array.shape)
        holds = _HOLDS[name] if name in _HOLDS else _holds_ids(config, name.removeprefix("ids/"))
        table.add_row(name, str(array.dtype), shape, _letters(name, array), Text(holds))
    return table


def _letters(name: str, array: np.ndarray) -> str:
    if name == UNIFORM_SHARE:
        return "1 x devices"
    letters = ["1", "C", "1", "K", "2"] if "negatives" in name else ["A", "B", "L", "K", "2"]
    return " x ".join(letters[: array.ndim])


def _holds_ids(config: Config, name: str) -> str:
    feature = config.feature(name.removeprefix("negatives:"))
    of = "sampled items: " if name.startswith("negatives:") else ""
    next_ = ", of the row's next event" if feature.of_next else ""
    return f"{of}{_kind(feature)}{next_}; {NO_ID}: none"


def _kind(feature: FeatureConfig) -> str:
    """A description of the ids of a feature."""
    if feature.op != "id":
        return f"{feature.op} of column {feature.column_name}"
    hashed = "" if feature.hash_type is None else f"{feature.hash_type} hashes of "
    column = f"{hashed}column {feature.column_name}"
    if feature.grows:
        return f"ids of 64 bits, low and high word: {column}"
    return f"{column} modulo {feature.hash_bucket_size:,}"


# ------------------------------------------------------------------------------------------ rows


def _first_rows(batch: ShownBatch, count: int) -> list[tuple[int, int]]:
    """The microbatch and row of the first `count` rows that are not empty."""
    filled = np.argwhere(batch.arrays["length"] > 0)[:count]
    return [(int(microbatch), int(row)) for microbatch, row in filled]


def _row(
    config: Config, batch: ShownBatch, at: tuple[int, int], arguments: Arguments
) -> Iterator[Table | Text]:
    """A table of a row; if the row has packed sequences, a table of each of the first ones."""
    length = int(batch.arrays["length"][at])
    where = f"Microbatch {at[0]}, row {at[1]}"
    if SEQUENCE not in batch.arrays:
        title = f"{where}: {length:,} positions"
        yield _positions(config, batch, at, range(length), title, arguments.positions)
        return
    sequence_L = batch.arrays[SEQUENCE][at][:length]
    begins = [0, *(np.flatnonzero(np.diff(sequence_L)) + 1).tolist(), length]
    total = len(begins) - 1
    for number, (begin, stop) in enumerate(itertools.pairwise(begins)):
        if number == arguments.sequences:
            yield Text(f"… {total - number:,} more packed sequences in this row\n")
            return
        title = (
            f"{where}, packed sequence {sequence_L[begin]} of {total:,}: {stop - begin:,} positions"
        )
        yield _positions(config, batch, at, range(begin, stop), title, arguments.positions)


def _positions(
    config: Config,
    batch: ShownBatch,
    at: tuple[int, int],
    positions: range,
    title: str,
    most: int,
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("position", justify="right")
    if batch.times is not None:
        table.add_column("time (UTC)")
    for feature in config.features:
        table.add_column(_heading(feature), justify="right")
    item = config.loss.item_feature
    table.add_column(f"target: position\nand its {item}", justify="right")
    for position in _first_and_last(positions, most):
        if position is None:
            table.add_row(*["…"] * len(table.columns))
            continue
        cells = [f"{position:,}"]
        if batch.times is not None:
            time = batch.times[at][position]
            cells.append(_NOTHING if np.isnat(time) else str(time).replace("T", " "))
        cells += [_ids(batch, feature, at, position) for feature in config.features]
        target = int(batch.target[at][position])
        described = f"{target:,}: {_ids(batch, config.feature(item), at, target)}"
        cells.append(_NOTHING if target == NO_TARGET else described)
        table.add_row(*map(Text, cells))
    return table


def _heading(feature: FeatureConfig) -> str:
    if feature.op != "id":
        kind = feature.op
    elif feature.grows:
        kind = "id" if feature.hash_type is None else "hash"
    else:
        kind = "bucket"
    return f"{feature.name}\n{kind}{' of next' if feature.of_next else ''}"


def _first_and_last(positions: range, most: int) -> list[int | None]:
    """The first and the last positions, with None between them for those that are not shown."""
    if len(positions) <= most:
        return list(positions)
    first, last = most - most // 2, most // 2
    return [*positions[:first], None, *positions[-last:]]


def _ids(batch: ShownBatch, feature: FeatureConfig, at: tuple[int, int], position: int) -> str:
    """The ids of a feature at a position; those that are not hashed are shown as in the log."""
    ids = batch.arrays[f"ids/{feature.name}"][at][position]
    if not feature.grows:
        return " ".join(str(i) for i in ids.tolist() if i != NO_ID) or _NOTHING
    numbers = np.ascontiguousarray(ids).view("<i8")[:, 0]
    is_id = (ids != NO_ID).any(axis=-1)
    return " ".join(map(str, numbers[is_id].tolist())) or _NOTHING
