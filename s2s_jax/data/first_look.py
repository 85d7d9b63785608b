"""A look at some stripes before training starts: is there anything to learn from, and is it as meant?

All hosts look at the same stripes, and so refuse the same logs with the same sentence.
"""

import contextlib
from collections.abc import Iterator

from s2s_jax.config import Config
from s2s_jax.data import orc, stripe_sample
from s2s_jax.data.index import FileIndex
from s2s_jax.data.learnable import Learnable
from s2s_jax.data.time_facts import TimeFacts, time_columns
from s2s_jax.errors import MachineError, UserError


def first_look(config: Config, index: FileIndex) -> list[str]:
    """Refuses a log that gives nothing to learn from; returns what the user may not have meant.

    Looks at some stripes, and at more only while there is nothing to learn from in those before.

    Args:
      config: the configuration.
      index: of the files.

    Raises:
      UserError: no row of the log gives a pair of events, or all events are of one item.
      MachineError: a stripe cannot be read on this machine.
    """
    learnable = Learnable(config)
    times: dict[str, TimeFacts] = {}
    for stripe in _stripes(index, learnable):
        file, number, first_row = index.stripes[stripe]
        units = time_columns(file.schema, config)
        try:
            batch = orc.read_stripe(file, number, learnable.column_names)
            learnable.add(batch, file, first_row)
        except MachineError:
            raise
        except UserError as error:
            # What reads everything refuses or skips it, as io.on_error says.
            learnable.add_unreadable(str(error))
            continue
        for name, unit in units.items():
            if name not in batch.schema.names:
                # No feature, so that training can do without it.
                with contextlib.suppress(UserError):
                    other = orc.read_stripe(file, number, [name])
                    times.setdefault(name, TimeFacts(name, unit)).add(other.column(0))
            else:
                times.setdefault(name, TimeFacts(name, unit)).add(batch.column(name))
    learnable.refuse_nothing()
    notes = learnable.notes()
    for facts in times.values():
        notes += facts.warnings()
    return notes


def _stripes(index: FileIndex, learnable: Learnable) -> Iterator[int]:
    chosen = stripe_sample.spread(index)
    yield from chosen
    for stripe in sorted(set(range(len(index.stripes))) - set(chosen)):
        if learnable.found:
            return
        yield stripe
