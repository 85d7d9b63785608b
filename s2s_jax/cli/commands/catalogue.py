"""Writes the items of a log to a file: `s2s catalogue --config FILE --output catalogue.parquet`."""

import dataclasses

from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Decoding, Items, Logs, Split
from s2s_jax.data.encoding.held_out import training_cut
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue, collect, item_text, save
from s2s_jax.errors import EXIT_DONE
from s2s_jax.storage.place_option import PlaceOption

# Number of most frequent items that are printed.
_TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """The file contains every item with its number of events and the ids of the features in
    loss.target_features. s2s recommend and training (loss.catalogue) can read this file instead of
    collecting the items from the log.
    """

    output: PlaceOption
    """Parquet file to write"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    given = parse_with_config(Arguments, argv, "catalogue", {"out": "output"})
    if given is None:
        return EXIT_DONE
    arguments, config = given
    # Held-out events are not counted, as when training collects the items itself.
    items, logs, split = Items.of(config), Logs.of(config), Split.of(config)
    index = index_files(logs, Decoding.of(config))
    catalogue = collect(items, logs, index, training_cut(split))
    save(catalogue, str(arguments.output), items, split)
    _print_summary(catalogue, items.item, arguments.output)
    return EXIT_DONE


def _print_summary(catalogue: Catalogue, item: FeatureConfig, output: PlaceOption) -> None:
    print(f"wrote {len(catalogue.item):,} items of {catalogue.count_I.sum():,} events to {output}")
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
