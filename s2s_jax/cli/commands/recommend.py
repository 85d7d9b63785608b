"""Writes the top items for each row: `s2s recommend --config FILE --input LOGS --output recs.parquet`.

Reads logs in the format of training. All events of a row are the history of a user. For each row, writes
the most likely next items of the catalogue, by default the items of `io.data_paths`. A command that was
interrupted continues when it is started again.
"""

import dataclasses
import sys
from collections import Counter

from s2s_jax import signals
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.cluster.separate import take_place
from s2s_jax.config import Config
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, Stopped
from s2s_jax.jobs.recommend import Recommended, Request, recommend
from s2s_jax.ranking.answers import By
from s2s_jax.ranking.part_directory import ALONE, Share
from s2s_jax.storage.place_option import PlaceOption

# The current names of arguments that had another name in earlier versions.
OLD_NAMES = {"out": "output"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """Ranks the items of a catalogue for each row of a log; the events of the row are the history. If a
    command was interrupted, start it again to continue: finished parts are kept as long as the weights,
    the configuration, the catalogue and the logs are the same. Several processes, started as for
    training, share the log.
    """

    input: str
    """Logs with the histories: ORC files and directories, separated by commas"""
    output: PlaceOption
    """Parquet file to write. A directory of Parquet files if it is one, if its name does not end in
    .parquet, or if the job has several processes, each of which recommends for a share of the log"""
    top_k: int = 100
    """Number of items to recommend for each row"""
    user_column: str | None = None
    """Column with the user id, written with each row; None: file and row number are written"""
    catalogue: str | None = None
    """File written by s2s catalogue, with the items to rank; None: the items of io.data_paths"""
    checkpoint: str = "best"
    """Checkpoint to use: best (by eval.metric), newest, or a step"""
    keep_seen: bool | None = None
    """Whether to recommend items of the history, too; None: only if eval.filter_seen is False"""
    by: By = "model"
    """What ranks the items. model: a checkpoint; neighbours: which items follow each other in
    io.data_paths, then popularity. neighbours needs this log and the configuration, but no checkpoint"""
    short_history: int = 0
    """Histories of fewer events than this are answered by neighbours, and rows without events by
    popularity. A column, by, says what answered each row. 0: rows without events are left out"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    # First, before JAX uses a device.
    place = take_place()
    share = ALONE if place is None else Share(place.host, place.hosts)
    with signals.StopSignals() as stop:
        try:
            with stop.at_once():
                # In another thread, because Python handles no signals in this one during compilation.
                stop.unless_stopped(lambda: _recommend(argv, share))
        except Stopped as signal_name:
            print(
                f"stopped by {signal_name}; finished parts are kept; start the same command again to "
                f"continue",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_STOPPED
    return EXIT_DONE


def _recommend(argv: list[str], share: Share) -> None:
    given = parse_with_config(Arguments, argv, "recommend", OLD_NAMES)
    if given is None:
        return
    arguments, config = given
    request = Request(
        input=arguments.input,
        output=arguments.output,
        top_k=arguments.top_k,
        user_column=arguments.user_column,
        catalogue=arguments.catalogue,
        checkpoint=arguments.checkpoint,
        keep_seen=arguments.keep_seen,
        by=arguments.by,
        short_history=arguments.short_history,
        share=share,
    )
    done = recommend(config, request)
    if done.counts is None:
        print(
            f"host {share.host} of {share.hosts} has done its share of {request.output}; others are "
            f"still at work"
        )
        return
    _print_done(config, request, done, done.counts)


def _print_done(config: Config, request: Request, done: Recommended, counts: Counter[str]) -> None:
    """Prints a summary of what was written."""
    source = f"by neighbours counted in {config.io.data_paths}"
    if done.step is not None:
        weight = f", with neighbours of weight {done.neighbours:g}" if done.neighbours else ""
        source = f"from the checkpoint of step {done.step}{weight}"
    print(
        f"wrote up to {request.top_k} items for each of {counts['users']:,} users to "
        f"{request.output}, {source}"
    )
    if request.short_history:
        print(
            f"{counts['by_neighbours']:,} users are answered by neighbours"
            f"{'' if done.step is None else f' (fewer than {request.short_history:,} events)'}, "
            f"{counts['by_popularity']:,} without events by popularity"
        )
    if counts["skipped_rows"]:
        print(
            f"{counts['skipped_rows']:,} rows cannot be read and are left out (io.on_error skip_stripe; "
            f"messages above, or of the command that skipped them, say why)"
        )
    _print_unknown(config, counts)
    _print_untrained(config, done, counts)
    if done.sharing is not None:
        print(f"{done.sharing}; a recommendation of such an item may mean any of them")
    for warning in done.warnings:
        print(warning)


def _print_unknown(config: Config, counts: Counter[str]) -> None:
    """Prints how many events of the histories are of unknown items."""
    missing = counts["not_in_catalogue"]
    if missing:
        print(f"{missing:,} events of the histories are of items that are not in the catalogue")
    item = config.feature(config.loss.item_feature)
    if item.grows and counts["shown"]:
        zeros = config.table(item.table_name).unknown == "zeros"
        used = "zeros are" if zeros else "its default row is"
        print(
            f"{counts['without_row']:,} of the {counts['shown']:,} events that the model was shown are "
            f"of items without a row in table {item.table_name}; {used} used for them"
        )


def _print_untrained(config: Config, done: Recommended, counts: Counter[str]) -> None:
    """Prints how many items were never trained, and how often they are recommended."""
    if not done.untrained_items:
        return
    if config.eval.untrained == "drop":
        how = "they are left out (eval.untrained drop)"
    else:
        how = (
            f"{counts['untrained']:,} times they are recommended (eval.untrained "
            f"{config.eval.untrained}; last ranks them after all others, drop leaves them out)"
        )
    print(
        f"{done.untrained_items:,} of the {done.items:,} items of the catalogue were never trained: "
        f"{how}"
    )
