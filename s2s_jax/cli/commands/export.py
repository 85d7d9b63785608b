"""Exports a checkpoint for serving: `s2s export --config FILE --train.output_dir RUN --output DIR`.

The export has everything that is needed to answer what users will do next: the model, its tables, the
items and their vectors. `s2s serve DIR` and the package `s2s_serve` use it without JAX.
"""

import dataclasses
from typing import Literal

from s2s_jax import signals
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, Stopped, explain
from s2s_jax.jobs.export import Exported, Request, export
from s2s_jax.storage.place_option import PlaceOption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """Writes a checkpoint as a new version of an export, which answers histories without JAX. Earlier
    versions stay, and a server with the export changes to the new one.
    """

    output: PlaceOption
    """Directory of the export; versions are in its directory versions/"""
    checkpoint: str = "best"
    """Checkpoint to export: best (by eval.metric), newest, or a step"""
    catalogue: str | None = None
    """File written by s2s catalogue, with the items to recommend; None: the items of io.data_paths"""
    titles: PlaceOption | None = None
    """CSV, Parquet or MovieLens file with an item's id and its title in the first two columns"""
    item_columns: PlaceOption | None = None
    """Parquet file with ids of items in its first column. Answers can be limited by its other columns"""
    index: Literal["auto", "yes", "no"] = "auto"
    """Whether an index for approximate search is built. auto: if there are more than 50,000 items"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    given = parse_with_config(Arguments, argv, "export", {"out": "output"})
    if given is None:
        return EXIT_DONE
    arguments, config = given
    request = Request(
        output=arguments.output,
        checkpoint=arguments.checkpoint,
        catalogue=arguments.catalogue,
        titles=arguments.titles,
        item_columns=arguments.item_columns,
        index=arguments.index,
    )
    done: list[Exported] = []
    with signals.StopSignals() as stop:
        try:
            with stop.at_once():
                # In another thread, because Python handles no signals in this one during compilation.
                stop.unless_stopped(lambda: done.append(export(config, request)))
        except Stopped as stopped:
            explain(stopped)
            return EXIT_STOPPED
    _print(done[0])
    return EXIT_DONE


def _print(done: Exported) -> None:
    manifest = done.manifest
    print(
        f"exported {manifest.items:,} items and the checkpoint of step {manifest.step:,} to "
        f"{done.directory} ({_size(done.bytes)})"
    )
    if manifest.index is not None:
        recalls = ", ".join(f"{name} {x:.3f}" for name, x in manifest.index.recall.items())
        print(f"the index finds nearly the same items as comparing all: {recalls}")
    print(f"to serve it: s2s serve {done.directory.parent.parent}")


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
