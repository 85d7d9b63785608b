"""Top-K items: `s2s recommend --config FILE --input LOGS --output recs.parquet`.

Reads logs in the format of training, whole rows as histories, and writes for each row the items of the
catalogue (by default the items of `io.data_paths`) that the user is most likely to go on with. A command
that was interrupted goes on where it stopped. Events of items that are not in the catalogue are counted,
and those of items that have no row in a table that grows.
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

from s2s_jax import signals
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.config import Config
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, Stopped
from s2s_jax.jobs.recommend import Recommended, Request, recommend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """Ranks the items of a catalogue for each row, whose events are the history. A command that was
    interrupted goes on where it stopped, if weights, configuration, catalogue and logs are the
    same.
    """

    input: str
    """Logs: ORC files and directories, with commas between them"""
    output: Path
    """Parquet file to write"""
    top_k: int = 100
    """Items for each row"""
    user_column: str | None = None
    """Column of the logs that names the user; None: rows are named by their file and number"""
    catalogue: str | None = None
    """File of s2s catalogue, whose items are ranked; None: the items of io.data_paths"""
    checkpoint: str = "best"
    """best (by eval.metric), newest, or a step"""
    keep_seen: bool | None = None
    """Also recommend items of the history; None: unless eval.filter_seen"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `errors.run_command`.
    """
    with signals.StopSignals() as stop:
        try:
            with stop.at_once():
                # In another thread, since compilation would keep this one from hearing signals.
                stop.unless_stopped(lambda: _recommend(argv))
        except Stopped as told:
            print(
                f"stopped by {told}; what is finished is kept, start the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_STOPPED
    return EXIT_DONE


def _recommend(argv: list[str]) -> None:
    given = parse_with_config(Arguments, argv, "recommend", {"out": "output"})
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
    )
    done = recommend(config, request)
    print(
        f"{done.counts['users']:,} users, up to {request.top_k} items each, of step {done.step} in "
        f"{request.output}"
    )
    _print_unknown(config, done.counts)
    _print_untrained(config, done)
    if done.sharing is not None:
        print(f"{done.sharing}; what is recommended as it may be any of them")
    for warning in done.warnings:
        print(warning)


def _print_unknown(config: Config, counts: Counter[str]) -> None:
    """Says how much of the histories is of items that are not known."""
    missing = counts["not_in_catalogue"]
    if missing:
        print(f"{missing:,} events of the histories are of items that are not in the catalogue")
    item = config.feature(config.loss.item_feature)
    if item.grows:
        zeros = config.table(item.table_name).unknown == "zeros"
        stands = "zeros stand" if zeros else "its default row stands"
        print(
            f"{counts['without_row']:,} of the {counts['shown']:,} events that the model was shown are "
            f"of items without a row in table {item.table_name}; {stands} for them"
        )


def _print_untrained(config: Config, done: Recommended) -> None:
    """Says how many items were never trained, and how often they are recommended."""
    if not done.untrained_items:
        return
    if config.eval.untrained == "drop":
        how = "they are left out (eval.untrained drop)"
    else:
        how = (
            f"{done.counts['untrained']:,} times they are recommended (eval.untrained "
            f"{config.eval.untrained}; last puts them after all others, drop leaves them out)"
        )
    print(
        f"{done.untrained_items:,} of the {done.items:,} items of the catalogue were never trained: "
        f"{how}"
    )
