"""Checks some stripes before training starts: is there anything to learn, and does the log look right?

All hosts look at the same stripes, so they refuse the same logs with the same message.
"""

import contextlib
from collections.abc import Iterable, Iterator

import pyarrow as pa

from s2s_jax.data.inspection import user_rows
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.learnable import Learnable
from s2s_jax.data.inspection.log_facts import LogFacts
from s2s_jax.data.inspection.time_facts import time_columns
from s2s_jax.data.logs import orc, stripe_sample
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import MachineError, UserError

# Ids of a feature that are checked in each stripe.
_IDS = 200_000


def first_look(assumptions: Assumptions, index: FileIndex) -> list[str]:
    """Refuses a log with nothing to learn from; returns warnings about likely mistakes.

    Reads a sample of the stripes, and more only until there is something to learn from.

    Args:
      assumptions: what the columns are taken for.
      index: the index of the log's files.

    Raises:
      UserError: no row of the log gives a pair of events, all events are of one item, or times that
        the model needs cannot be true.
      MachineError: a stripe cannot be read on this machine.
    """
    learnable, facts = _look(assumptions, index)
    learnable.refuse_nothing()
    facts.refuse_untrue_times()
    return [*learnable.notes(), *facts.warnings(), *user_rows.warnings_of_log(index)]


def odd_facts(assumptions: Assumptions, index: FileIndex) -> list[str]:
    """Warnings about a log whose metrics may not mean what the user expects.

    Reads a sample of the stripes, and only the columns of times and users.

    Args:
      assumptions: what the columns are taken for.
      index: the index of the log's files.

    Raises:
      MachineError: a stripe cannot be read on this machine.
    """
    facts = LogFacts(assumptions)
    for stripe in stripe_sample.spread(index):
        file, number, _ = index.stripes[stripe]
        facts.add(_times(file, number, time_columns(file.schema, assumptions)))
    return [*facts.warnings(), *user_rows.warnings_of_log(index)]


def _look(assumptions: Assumptions, index: FileIndex) -> tuple[Learnable, LogFacts]:
    learnable = Learnable(assumptions)
    facts = LogFacts(assumptions, most_ids=_IDS)
    for stripe in _stripes(index, learnable):
        file, number, first_row = index.stripes[stripe]
        try:
            batch = orc.read_stripe(file, number, learnable.column_names)
            learnable.add(batch, file, first_row)
        except MachineError:
            raise
        except UserError as error:
            # The real reading refuses or skips this stripe, depending on io.on_error.
            learnable.add_unreadable(str(error))
            continue
        arrays = {name: batch.column(name) for name in learnable.column_names}
        others = [name for name in time_columns(file.schema, assumptions) if name not in arrays]
        facts.add(arrays | _times(file, number, others))
    return learnable, facts


def _times(file: orc.OrcFile, stripe: int, names: Iterable[str]) -> dict[str, pa.Array]:
    """Columns of times, which need not be features; unreadable columns are left out."""
    times = {}
    for name in names:
        with contextlib.suppress(UserError):
            times[name] = orc.read_stripe(file, stripe, [name]).column(0)
    return times


def _stripes(index: FileIndex, learnable: Learnable) -> Iterator[int]:
    chosen = stripe_sample.spread(index)
    yield from chosen
    for stripe in sorted(set(range(len(index.stripes))) - set(chosen)):
        if learnable.found:
            return
        yield stripe
