"""Evaluates a run: `s2s evaluate --config FILE [--split test] …`.

Ranks the held-out event of every user among the items of the log. Prints hit rate, NDCG and MRR with 95%
intervals, next to those of two rankings without a model (by popularity and by counted neighbours), and
again by length of history and by popularity of the target. Writes all of this as JSON to the run
directory.
"""

import dataclasses
import json
import sys
from typing import Literal

from rich.table import Table

from s2s_jax import signals
from s2s_jax.cli.console import OutputConsole
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.cluster import hosts
from s2s_jax.cluster.ending import ending_together, leave
from s2s_jax.cluster.joining import join
from s2s_jax.config import Config
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.first_look import odd_facts
from s2s_jax.errors import EXIT_DONE
from s2s_jax.jobs.evaluate import Evaluated, Intervals, evaluate
from s2s_jax.ranking.tally import BASELINES, below_neighbours
from s2s_jax.runs.place import place_of_run
from s2s_jax.storage.place_option import PlaceOption
from s2s_jax.writing import replacing

# The current names of arguments that had another name in earlier versions.
OLD_NAMES = {"out": "output"}
_SHOWN = ("hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "mrr")
_SLICED = ("hr@10", "ndcg@10")
_UNTRAINED = {"keep": "ranked like others", "last": "ranked last", "drop": "left out, and missed"}
# If at least this share of the targets is in the user's history, eval.filter_seen is worth a note.
_MANY_RETURN = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """Ranks the held-out event of every user among the items of the log. Prints hit rate, NDCG, MRR and
    coverage, next to the metrics of two rankings without a model, and writes them as JSON. The two
    recommend the most popular items, and the items that followed the user's newest items elsewhere.
    """

    checkpoint: str = "best"
    """Checkpoint to evaluate: best (by eval.metric), newest, or a step"""
    split: Literal["test", "validation"] = "test"
    """Which held-out events to rank"""
    output: PlaceOption | None = None
    """JSON file to write; None: evaluation_SPLIT_STEP.json in the run directory"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    # First, so that a mistake that only this process notices also ends the other processes.
    join()
    with ending_together(), signals.StopSignals() as stop, stop.at_once():
        # In another thread, because Python handles no signals in this one during compilation.
        stop.unless_stopped(lambda: _evaluate(argv))
    leave()
    return EXIT_DONE


def _evaluate(argv: list[str]) -> None:
    given = parse_with_config(Arguments, argv, "evaluate", OLD_NAMES)
    if given is None:
        return
    arguments, config = given
    done = evaluate(config, arguments.checkpoint, arguments.split)
    if hosts.is_first():
        out = arguments.output
        if out is None:
            out = (
                place_of_run(config.train.output_dir) / f"evaluation_{done.split}_{done.step}.json"
            )
        intervals = done.evaluation.intervals()
        text = json.dumps(done.as_json(config, intervals), indent=2)
        where = f"{config.train.output_dir}, step {done.step}, {done.split}, in {out}"
        try:
            # First, so that the result is not lost if the reader of stdout stops reading.
            with replacing(out) as unfinished:
                unfinished.write_text(text)
        finally:
            # If the file cannot be written, the result is at least printed.
            _print(config, done, intervals, f"{_time_awareness(config)}: {where}")
        for warning in odd_facts(Assumptions.of(config), done.index):
            print(warning, file=sys.stderr)


def _time_awareness(config: Config) -> str:
    """What the model knows about time. Metrics are comparable only if this is the same."""
    known, gaps = config.known_of_next, config.model.time_bias
    of_target = f"time-aware ({', '.join(known)} of the target known)" if known else "time-blind"
    if gaps is None:
        return of_target
    true_time = f"true time (the {gaps.column} of known events)"
    return f"{true_time}, {of_target}" if known else true_time


def _print(config: Config, done: Evaluated, intervals: Intervals, title: str) -> None:
    console = OutputConsole()
    values = done.evaluation.metrics
    table = Table(title=f"{values['eval/users']:,.0f} users, {title}")
    for column in ("", "value", "95% interval", *BASELINES):
        table.add_column(column, justify="left" if column == "" else "right")
    for name in _SHOWN:
        low, high = intervals[f"eval/{name}"]
        without_model = [f"{values[f'eval/{baseline}/{name}']:.4f}" for baseline in BASELINES]
        interval = f"{low:.4f} to {high:.4f}"
        table.add_row(name, f"{values[f'eval/{name}']:.4f}", interval, *without_model)
    table.add_row("coverage@10", f"{values['eval/coverage@10']:.4f}")
    if "eval/unknown_items" in values:
        table.add_row("unknown items", f"{values['eval/unknown_items']:.4f}")
    table.add_row("returning targets", f"{values['eval/returning_targets']:.4f}")
    for name in ("untrained_targets", "untrained_items"):
        if values["eval/untrained_items"]:
            table.add_row(name.replace("_", " "), f"{values[f'eval/{name}']:.4f}")
    console.print(table)
    if done.neighbours:
        console.print(f"with neighbours of weight {done.neighbours:g} (eval.neighbours)")
    below = below_neighbours(values, config.eval.metric, added=done.neighbours > 0)
    if below is not None:
        console.print(below)
    if values["eval/untrained_items"]:
        console.print(
            f"{values['eval/untrained_items']:.1%} of the items were never trained, and "
            f"{values['eval/untrained_targets']:.1%} of the targets are such items; they are "
            f"{_UNTRAINED[config.eval.untrained]} (eval.untrained {config.eval.untrained})"
        )
    if config.eval.filter_seen and values["eval/returning_targets"] >= _MANY_RETURN:
        console.print(
            f"{values['eval/returning_targets']:.1%} of the targets are items of the user's history, "
            f"which are never recommended and so count as missed; set eval.filter_seen to False to rank "
            f"and recommend such items"
        )
    unknown = values["eval/unknown_targets"]
    if unknown:
        console.print(f"{unknown:,.0f} more users have a target that is not in the catalogue")
    if "eval/shared_rows" in values:
        console.print(
            f"{values['eval/shared_rows']:.1%} of the log's events are of items whose id shares a table "
            f"row with other ids: a hit on one of them counts for all of them"
        )
    table = Table(title="by length of history and popularity of the target")
    for column in ("", "users", *_SLICED):
        table.add_column(column, justify="left" if column == "" else "right")
    slices = [key.split("/")[1] for key in values if key.count("/") == 2]
    for name in dict.fromkeys(slices):
        if name not in BASELINES:
            of = f"eval/{name}/"
            cells = [f"{values[of + metric]:.4f}" for metric in _SLICED]
            table.add_row(name.replace("_", " "), f"{values[of + 'users']:,.0f}", *cells)
    console.print(table)
