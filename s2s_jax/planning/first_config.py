"""Writes a first configuration for a log: looks at the log, applies the rules, tries and measures."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from s2s_jax.config import load
from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.batch_fill import with_packing
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.first_look import odd_facts
from s2s_jax.errors import UserError
from s2s_jax.planning import config_file, promise, rules, trial
from s2s_jax.planning.log_summary import LogSummary, absolute, read_index, summarize
from s2s_jax.planning.machine import Machine, is_busy, this_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Looks at a log and at this machine, trains for a few steps in a temporary directory, and writes a
    config file for `s2s train`, with a comment on each choice. Prints how long training will take, and
    how much memory it needs.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """ORC files and directories; directories are searched in the same way as in training"""
    output: Path
    """Config file to write; its name ends in .py. Training will write to runs/NAME"""
    budget_minutes: float | None = None
    """How long training may take on this machine, in minutes. By default, as long as is of use for such
    a log, but at most 90 minutes"""
    item_feature: str = "item_id"
    """Column with the items"""
    overwrite: bool = False
    """Replace the config file if it exists"""


def make(settings: Settings) -> list[str]:
    """Writes a config file and returns what to expect of it, a sentence each.

    Raises:
      UserError: an argument is impossible, the log cannot be read or learned from, the trial fails, or
        the file cannot be written.
    """
    _check(settings)
    # Reading the log uses the machine, too.
    busy = is_busy()
    names = absolute(settings.paths)
    index = read_index(names)
    for note in index.notes:
        _say(note)
    log = summarize(index, ",".join(names), settings.item_feature)
    _say(
        f"{log.rows:,} rows with {'about ' * log.sampled}{log.events:,} events, "
        f"{log.lengths.mean:,.1f} a row, of {log.item.distinct:,} items"
    )
    machine = this_machine()
    output_dir = str(Path("runs") / settings.output.stem)
    plan = rules.plan(log, machine, output_dir, settings.budget_minutes)
    for warning in odd_facts(Assumptions.of(plan.config), index):
        _say(warning)
    _say(f"trying {trial.STEPS} steps on this machine ({machine.text})")
    measured = trial.run(plan, log.item.distinct)
    steps_per_epoch = _steps_per_epoch(plan, machine)
    users = max(round(log.rows * log.lengths.ranked), 1)
    plan, expected = promise.fit(plan, measured, steps_per_epoch, users, settings.budget_minutes)
    found = promise.sentences(expected, plan.config.eval.patience is not None, busy)
    config_file.write(plan, _about(settings, log, machine, found), settings.output)
    assert load(settings.output) == plan.config, "the file has the configuration of the plan"
    if (Path(output_dir) / "config.json").exists():
        found.append(
            f"There is a run in {output_dir}, which training would continue; remove it, or change "
            f"train.output_dir in the file."
        )
    return found


def _check(settings: Settings) -> None:
    budget = settings.budget_minutes
    if budget is not None and not 0 < budget < float("inf"):
        raise UserError(f"--budget_minutes: expected more than 0, found {budget:g}")
    if settings.output.suffix != ".py":
        raise UserError(
            f"--output: expected the name of a Python file (ending in .py), found {settings.output}"
        )
    if settings.output.exists() and not settings.overwrite:
        raise UserError(
            f"--output: {settings.output} exists; give another name, or --overwrite to replace it"
        )


def _steps_per_epoch(plan: rules.Plan, machine: Machine) -> int:
    """The number of steps of an epoch, as in training."""
    reading = Reading.of(plan.config)
    index = index_files(reading.logs, reading.decoding)
    rows = with_packing(reading, index).sequences.device_rows * machine.devices
    return -(-sum(index.stripe_rows) // rows)


def _about(settings: Settings, log: LogSummary, machine: Machine, found: list[str]) -> list[str]:
    """The paragraphs of the docstring of the file."""
    lengths = log.lengths
    sampled = " Only a sample of the stripes was read." if log.sampled else ""
    return [
        f"Settings for a log of {log.rows:,} rows and {'about ' * log.sampled}{log.events:,} events.",
        f"Rows have {lengths.mean:,.1f} events on average; the median is {lengths.median:,.0f}, 95% "
        f"have at most {lengths.most_have:,}, and the longest has {lengths.longest:,}.{sampled}",
        f"What to expect on the machine that it was written on ({machine.text}): {' '.join(found)}",
        f"Use it with s2s train, s2s evaluate and s2s recommend, as --config "
        f"{settings.output}. Every setting may be changed here, or on the command line.",
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
