"""The items of a log as a file: `s2s catalogue --config FILE --output catalogue.parquet`."""

import dataclasses
from pathlib import Path

from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Decoding, Items, Logs, Split
from s2s_jax.data.encoding.held_out import training_cut
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue, collect, item_text, save
from s2s_jax.errors import EXIT_DONE

# Items that are printed, the most frequent ones.
_TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """The file has each item with its count and what it shows of itself when it is to be predicted.
    Training (loss.catalogue) and s2s recommend (--catalogue) can read it, and need not count the
    log then.
    """

    output: Path
    """Parquet file to write"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `exit.run_command`.
    """
    given = parse_with_config(Arguments, argv, "catalogue", {"out": "output"})
    if given is None:
        return EXIT_DONE
    arguments, config = given
    # As training does that collects its own: what is held out has no say in it.
    items, logs, split = Items.of(config), Logs.of(config), Split.of(config)
    index = index_files(logs, Decoding.of(config))
    catalogue = collect(items, logs, index, training_cut(split))
    save(catalogue, str(arguments.output), items, split)
    _print_summary(catalogue, items.item, arguments.output)
    return EXIT_DONE


def _print_summary(catalogue: Catalogue, item: FeatureConfig, output: Path) -> None:
    print(f"{len(catalogue.item):,} items of {catalogue.count_I.sum():,} events in {output}")
    top = [
        f"{item_text(catalogue.item, i)} ({catalogue.count_I[i]:,})"
        for i in range(min(_TOP, len(catalogue.item)))
    ]
    print(f"most frequent: {', '.join(top)}")
    sharing = catalogue.sharing()
    if sharing is not None:
        print(
            f"{sharing}; raise hash_bucket_size of feature {item.name} ({item.hash_bucket_size:,})"
        )
    else:
        print("no two ids share a bucket")
