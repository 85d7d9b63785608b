"""Shows the embedding tables of a run: `s2s tables RUN_DIR [--checkpoint STEP] …`.

Shapes: R rows of a table, two 32-bit words per id.
"""

import dataclasses
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from s2s_jax.cli.console import OutputConsole, wide_console
from s2s_jax.cli.parsing import parse
from s2s_jax.cluster.mesh import all_devices
from s2s_jax.config import Config, load_json
from s2s_jax.embedding import id_keys
from s2s_jax.embedding.tables import TableSpec, table_specs
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.runs.checkpoints.files import complete_steps
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_jax.storage.place_option import PlaceOption
from s2s_jax.training.evaluations import chosen_step
from s2s_jax.training.growth import GrowthPlan
from s2s_serve.encoding.ids import without_reserved

_PERCENTILES = (1, 50, 99)
# Number of rows whose norms are computed at once.
_ROWS = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """For each table of a checkpoint, prints the number of rows, the load, the numbers of dropped and
    evicted ids, and the norms of the rows and of the default row. Can also look up ids, or list the ids
    that tables lost. The ids of a table with a hash_type are hashes.
    """

    run_dir: Annotated[PlaceOption, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run (its train.output_dir)"""
    checkpoint: str = "newest"
    """Checkpoint to read: best (by eval.metric), newest, or a step"""
    look_up: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TABLE ID …")] = ()
    """Name of a growing table, and the ids to look up in it"""
    evicted_since: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """List the ids that growing tables have lost since the checkpoint of this step, one per line"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    arguments = parse(Arguments, argv, "tables", {"step": "checkpoint"})
    if arguments is None:
        return EXIT_DONE
    config = load_json(arguments.run_dir / "config.json")
    all_devices()  # Refuses a platform that does not exist.
    steps = complete_steps(arguments.run_dir)
    step = chosen_step(arguments.checkpoint, steps, arguments.run_dir, config.eval)
    saved = SavedTables(arguments.run_dir, step)
    specs = _specs(config, saved)
    console = wide_console()
    if arguments.look_up:
        name, *texts = arguments.look_up
        _print_ids(console, saved, _growing(specs, name), [_parse(text) for text in texts])
        of_table = (f.hash_type for f in config.features if f.table_name == name)
        hashed = {hash_type for hash_type in of_table if hash_type is not None}
        if hashed:
            console.print(
                f"The ids of this table are {' or '.join(sorted(hashed))} hashes; an id of the log must "
                f"be hashed before it can be found"
            )
    elif arguments.evicted_since is not None:
        if arguments.evicted_since >= step:
            raise UserError(
                f"--evicted_since: expected a step before {step}, which --checkpoint names, found "
                f"{arguments.evicted_since}; give an earlier one, or a later --checkpoint"
            )
        _print_evicted(saved, SavedTables(arguments.run_dir, arguments.evicted_since), specs)
    else:
        _print_tables(console, saved, specs)
    return EXIT_DONE


def _specs(config: Config, saved: SavedTables) -> dict[str, TableSpec]:
    plan = GrowthPlan(config.features, config.tables)
    plan.set_state(saved.progress["growth"])
    return table_specs(config.features, config.tables, plan.capacities_now())


def _growing(specs: dict[str, TableSpec], name: str) -> TableSpec:
    growing = [spec.name for spec in specs.values() if spec.grows]
    if name not in growing:
        listed = ", ".join(growing) or "none"
        raise UserError(f"--look_up: expected a table that grows ({listed}), found {name}")
    return specs[name]


def _parse(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 2**64
    if not -(2**63) <= number < 2**64:
        raise UserError(f"--look_up: expected 64-bit whole numbers, found {text}")
    # As tables keep it, and as the log has it.
    (kept,) = without_reserved(np.array([number % 2**64], np.uint64)).view(np.int64).tolist()
    return kept


def _print_tables(console: OutputConsole, saved: SavedTables, specs: dict[str, TableSpec]) -> None:
    table = Table(title=f"{saved.path}")
    for column in ("table", "rows", "capacity", "load", "dropped", "evicted"):
        table.add_column(column, justify="left" if column == "table" else "right")
    table.add_column("norm of a row\n(1% / median / 99%)", justify="right")
    any_default = any(spec.default_row for spec in specs.values())
    if any_default:
        table.add_column("of the\ndefault row", justify="right")
    for name, spec in specs.items():
        values = saved.values(spec)
        is_used = np.ones(spec.rows, bool)
        cells = [f"{spec.buckets:,} buckets", f"{spec.rows:,}", "-", "-", "-"]
        if spec.grows:
            of_table = saved.id_map(spec)
            is_used = (of_table.keys_R2 != id_keys.EMPTY).any(axis=1)
            rows = int(is_used.sum())
            dropped, evicted = of_table.dropped_S.sum(), of_table.evicted_S.sum()
            load = f"{rows / spec.rows:.3f}"
            cells = [f"{rows:,}", f"{spec.rows:,}", load, f"{dropped:,}", f"{evicted:,}"]
        parts = [
            np.linalg.norm(values[begin : begin + _ROWS], axis=1)
            for begin in range(0, spec.rows, _ROWS)
        ]
        norms = np.concatenate(parts)[is_used]
        percentiles = "-"
        if len(norms):
            percentiles = " / ".join(f"{x:.4g}" for x in np.percentile(norms, _PERCENTILES))
        cells.append(percentiles)
        if any_default:
            default = saved.default_row(spec) if spec.default_row else None
            cells.append("-" if default is None else f"{np.linalg.norm(default):.4g}")
        table.add_row(name, *cells)
    console.print(table)


def _print_ids(console: OutputConsole, saved: SavedTables, spec: TableSpec, ids: list[int]) -> None:
    of_table, values = saved.id_map(spec), saved.values(spec)
    table = Table(title=f"{saved.path}, table {spec.name}")
    for column in ("id", "row", "last used in step", "uses", "norm", "first values"):
        table.add_column(column, justify="right", overflow="fold")
    row_of = {i: row for row, i in zip(*_ids(of_table.keys_R2), strict=True)}
    for i in ids:
        if i not in row_of:
            table.add_row(str(i), "none", "-", "-", "-", "-")
            continue
        row = row_of[i]
        first = " ".join(f"{x:.4g}" for x in values[row, :4])
        norm = f"{np.linalg.norm(values[row]):.4g}"
        seen, count = of_table.seen_R[row], of_table.count_R[row]
        table.add_row(str(i), f"{row:,}", f"{seen:,}", f"{count:,}", norm, first)
    console.print(table)


def _ids(keys_R2: Any) -> tuple[list[int], list[int]]:
    """The rows that have an id, and their ids."""
    keys_R2 = np.asarray(keys_R2)
    (rows,) = np.nonzero((keys_R2 != id_keys.EMPTY).any(axis=1))
    low, high = id_keys.ids_of(keys_R2[rows, 0], keys_R2[rows, 1])
    ids = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return rows.tolist(), ids.view(np.int64).tolist()


def _print_evicted(saved: SavedTables, earlier: SavedTables, specs: dict[str, TableSpec]) -> None:
    """Prints one id per line, for other programs to read."""
    for name, spec in specs.items():
        if spec.grows:
            now = set(_ids(saved.id_map(spec).keys_R2)[1])
            for i in sorted(set(_ids(earlier.id_map(spec).keys_R2)[1]) - now):
                print(f"{name}\t{i}")
