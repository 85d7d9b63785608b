"""The rules of a first configuration: from a log and a machine to settings, each with its reason.

All numbers are constants at the top, with the measurement behind them. The functions are pure: the same
log and machine give the same configuration. What depends on the speed of the machine, such as the
number of steps, is adjusted after a trial (`promise`).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from s2s_jax.config import (
    Config,
    EvalConfig,
    FeatureConfig,
    IOConfig,
    LastEvents,
    Linear,
    LossConfig,
    LRConfig,
    ModelConfig,
    Pack,
    TableConfig,
    TrainConfig,
)
from s2s_jax.embedding.tables import usable_capacity
from s2s_jax.planning.column_summary import ColumnSummary
from s2s_jax.planning.log_summary import LogSummary
from s2s_jax.planning.machine import Machine
from s2s_jax.training.growth import max_load

# ------------------------------------------------------------------------------------- numbers

# Widths of embeddings, as in configs/ml1m.py (docs/results/movielens.md): items; what an item
# determines, such as its category; other columns; and such of few values, for example behaviours.
ITEM_DIM, OF_ITEM_DIM, OTHER_DIM, FEW_DIM = 128, 32, 32, 16
FEW_VALUES = 64
INIT_STD = 0.02
# A growing table gives each id its own row. Above so many ids, or if a table would take more than this
# share of the memory, ids are hashed into buckets instead.
MOST_GROWING, TABLE_SHARE = 30_000_000, 0.25
# Room for ids that the log does not have yet.
SPARE_ROWS = 1.2
# Values and two moments of 4 bytes.
BYTES_PER_NUMBER = 12
# All bags of a feature are padded to bag_size, so columns with larger bags would cost too much.
MOST_BAG = 32
# A column in which an id occurs less often than this on average is like a number of the event.
LEAST_REPEATS = 1.5

# Rows are packed, so sequences that are longer than most rows gain nothing. On MovieLens-1M, 400
# positions were no better than 200 (docs/howto/better_models.md), so CPUs stop there.
SEQ_LENS = (16, 32, 64, 128, 200, 512, 1024)
MOST_SEQ_LEN = {"cpu": 200, "gpu": 512}
# In a long run, the older events of long rows help, too (docs/results/movielens.md).
MOST_WINDOWS = 12

# Small steps learn more in the same time (docs/howto/better_models.md): 8 rows of 200 positions in
# configs/ml1m.py, 100 of 16 on short histories (docs/results/neighbours.md).
POSITIONS = {"cpu": 1_600, "gpu": 6_400}
# Rows with more events than this on average have long histories.
LONG_MEAN = 50

# Above the first, items that a user already had are ranked and recommended. Without them, a perfect
# model could not reach more than half. Above the second, the config file mentions them.
MOST_RETURNING, MENTIONED_RETURNING = 0.5, 0.05

# With all items as negatives, every step encodes all of them (docs/howto/negatives_and_log_q.md).
MOST_FULL = {"cpu": 20_000, "gpu": 50_000}
NUM_NEGATIVES = 4_096
# Above this, negatives come from the batch, corrected by log-Q (docs/results/negatives.md).
MOST_UNIFORM = 1_000_000
# Counting items and neighbours reads the whole log when training starts, about so many events per
# second and core (docs/results/reading.md). It should take at most this share of the budget.
COUNTED_PER_SECOND, COUNTING_SHARE = 200_000, 0.1

# The budget if none is given.
USUAL_MINUTES = 90.0
# A run has at least so many steps, however small the log is.
LEAST_STEPS = 500
# Ten evaluations in a run (eval.every_steps auto).
EVALUATIONS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Settings for logs of long or of short histories.

    Attributes:
      name: the histories that the profile is for.
      model: `model`, apart from its seq_len.
      lr: `lr`.
      temperature: `loss.temperature`.
      neighbours: `eval.neighbours`, if the neighbours of items may be counted.
      epochs: the number of epochs, if there is time for them.
      patience: `eval.patience`.
    """

    name: Literal["long", "short"]
    model: ModelConfig
    lr: LRConfig
    temperature: float
    neighbours: float | Literal["auto"]
    epochs: int
    patience: int


# Measured on MovieLens-1M: docs/results/movielens.md.
LONG = Profile(
    name="long",
    model=ModelConfig(
        hidden_size=128,
        num_layers=4,
        nhead=2,
        dim_feedforward=256,
        dropout=0.3,
        input_norm=True,
        input_dropout=0.2,
        position="rope",
    ),
    lr=LRConfig(dense_lr=1e-3, sparse_lr=1e-3, warmup_steps=100, decay=Linear()),
    temperature=0.05,
    neighbours="auto",
    epochs=40,
    patience=4,
)
# Measured on logs cut into short histories: docs/results/neighbours.md.
SHORT = dataclasses.replace(
    LONG, name="short", model=dataclasses.replace(LONG.model, event_dropout=0.3), epochs=12
)


# --------------------------------------------------------------------------------------- a plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration and its reasons.

    Attributes:
      config: the configuration.
      why: sentences about its keys, by their paths, such as model.seq_len or features.item_id.
    """

    config: Config
    why: Mapping[str, str]


def plan(
    log: LogSummary, machine: Machine, output_dir: str, budget_minutes: float | None = None
) -> Plan:
    """Chooses a configuration.

    Args:
      log: what is known about the log.
      machine: the machine that it will be trained on.
      output_dir: `train.output_dir`.
      budget_minutes: how long training may take; None: as long as is usual.
    """
    why: dict[str, str] = {}
    features = choose_features(log, machine, why)
    seq_len = choose_seq_len(log, machine, why)
    profile = choose_profile(log, why)
    counts = may_count(log, machine, USUAL_MINUTES if budget_minutes is None else budget_minutes)
    batch_size = max(POSITIONS[machine.kind] // seq_len, 1)
    positions = batch_size * seq_len * machine.devices
    why["io.batch_size"] = (
        f"With {seq_len} positions a row, a step has {positions:,} positions. Small steps learn more in "
        f"the same time."
    )
    steps = steps_of_epoch(log, positions)
    loss = choose_loss(log, machine, profile, counts, why)
    first_ids = (
        positions
        + {"full": log.item.distinct, "uniform": NUM_NEGATIVES, "in_batch": 0}[loss.negatives]
    )
    config = Config(
        io=IOConfig(
            data_paths=log.paths,
            batch_size=batch_size,
            sequences=choose_packing(log, seq_len, why),
            thread_num=min(max(machine.cores // 2, 1), 4),
        ),
        features=features,
        tables=tuple(choose_table(feature, log, first_ids, counts, why) for feature in features),
        model=dataclasses.replace(profile.model, seq_len=seq_len),
        lr=profile.lr,
        loss=loss,
        eval=choose_evaluation(log, profile, counts, why),
        train=TrainConfig(
            output_dir=output_dir,
            train_epoch=max(profile.epochs, -(-LEAST_STEPS // steps)),
            max_to_keep=2,
        ),
    )
    return Plan(config=config, why=why)


# ------------------------------------------------------------------------------------- features


def choose_features(
    log: LogSummary, machine: Machine, why: dict[str, str]
) -> tuple[FeatureConfig, ...]:
    """The item and every other column that can be of use."""
    tables = _table_names([log.item.name, *(column.name for column in log.columns)])
    chosen = [_feature(log.item, ITEM_DIM, log, machine, tables)]
    item = log.item.name
    why[f"features.{item}"] = (
        f"The items: {_count(log.item, log)}, {log.item.once:.0%} of them with one event."
    )
    left_out = dict(log.unusable)
    for column in log.columns:
        reason = _useless(column)
        if reason is not None:
            left_out[column.name] = reason
            continue
        few = column.distinct <= FEW_VALUES
        dim = OF_ITEM_DIM if column.of_item else FEW_DIM if few else OTHER_DIM
        chosen.append(_feature(column, dim, log, machine, tables))
        kind = (
            "the item determines it" if column.of_item else "it differs between events of an item"
        )
        bags = f", up to {column.largest_bag} in an event" if column.largest_bag > 1 else ""
        why[f"features.{column.name}"] = f"{_count(column, log)}{bags}; {kind}."
    notes = [f"Not used: {name} ({reason})." for name, reason in left_out.items()]
    if log.times:
        times = "Times are not used, so recommendations do not depend on them. " + " ".join(
            log.times
        )
        notes.append(times)
    why["features"] = " ".join(["Ids may be texts or numbers: they are hashed to 63 bits.", *notes])
    return tuple(chosen)


def _useless(column: ColumnSummary) -> str | None:
    """Why a column cannot help; None if it can."""
    if column.distinct < 2:
        return "it always has the same value"
    if column.repeats < LEAST_REPEATS:
        return "nearly every event has another value"
    if column.largest_bag > MOST_BAG:
        return f"events have up to {column.largest_bag:,} ids in it, which would take much memory"
    return None


def _feature(
    column: ColumnSummary, dim: int, log: LogSummary, machine: Machine, tables: Mapping[str, str]
) -> FeatureConfig:
    # In stripes that were not read, bags may be larger.
    bag_size = column.largest_bag * (2 if log.sampled and column.largest_bag > 1 else 1)
    table = tables[column.name]
    return FeatureConfig(
        name=column.name,
        emb_dim=dim,
        hash_type="murmur",
        hash_bucket_size=choose_buckets(column.distinct, dim, machine),
        bag_size=max(bag_size, 1),
        shard_name=None if table == column.name else table,
    )


def _table_names(columns: Sequence[str]) -> dict[str, str]:
    """A name for the table of each column: the column's own, if it has only allowed characters."""
    names: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"[^\w.-]", "_", column)
        while name != column and name in {*columns, *names.values()}:
            name += "_"
        names[column] = name
    return names


def choose_buckets(distinct: int, dim: int, machine: Machine) -> int:
    """0 for a growing table; otherwise the number of buckets, for very many ids or little memory."""
    room = int(TABLE_SHARE * machine.memory) // (BYTES_PER_NUMBER * dim)
    rows = capacity_for(SPARE_ROWS * distinct)
    if rows <= room and distinct <= MOST_GROWING:
        return 0
    return min(2 ** (max(room, 1_024).bit_length() - 1), rows)


def capacity_for(rows: float) -> int:
    """The smallest capacity of a growing table that holds so many rows without growing."""
    capacity = usable_capacity(1)
    while max_load(capacity) * capacity < rows:
        capacity *= 2
    return capacity


def choose_table(
    feature: FeatureConfig, log: LogSummary, first_ids: int, counts: bool, why: dict[str, str]
) -> TableConfig:
    """The table of a feature; a growing one has room for all ids from the beginning.

    Args:
      feature: the feature.
      log: what is known about the log.
      first_ids: about how many events and negatives the first step has. A table grows ahead of its use
        if it would be full after two more steps with as many new ids.
      counts: whether the neighbours of items may be counted when training starts.
      why: the reasons so far.
    """
    init: Literal["normal", "neighbours"] = "normal"
    if counts and feature.name == log.item.name:
        init = "neighbours"
        why[f"tables.{feature.table_name}.init"] = (
            "Items begin with vectors from counts of which items follow each other."
        )
    if not feature.grows:
        return TableConfig(name=feature.table_name, init=init, init_std=INIT_STD)
    (column,) = (c for c in (log.item, *log.columns) if c.name == feature.name)
    rows = max(SPARE_ROWS * column.distinct, 3 * min(column.distinct, first_ids * feature.bag_size))
    capacity = capacity_for(rows)
    return TableConfig(name=feature.table_name, init=init, capacity=capacity, init_std=INIT_STD)


# ------------------------------------------------------------------------------- sequences, model


def choose_seq_len(log: LogSummary, machine: Machine, why: dict[str, str]) -> int:
    """The smallest length that covers most rows."""
    most = MOST_SEQ_LEN[machine.kind]
    wanted = next((n for n in SEQ_LENS if n >= log.lengths.most_have), most)
    why["model.seq_len"] = f"95% of the rows have at most {log.lengths.most_have:,} events." + (
        f" Longer sequences than {most} gained nothing where this was measured."
        if wanted > most or log.lengths.most_have > most
        else ""
    )
    return min(wanted, most)


def choose_packing(log: LogSummary, seq_len: int, why: dict[str, str]) -> Pack:
    """Short rows share a row of the batch; long rows are cut into windows."""
    windows = min(max(-(-(log.lengths.longest - 1) // (seq_len - 1)), 1), MOST_WINDOWS)
    why["io.sequences"] = (
        f"Rows have {log.lengths.mean:,.1f} events on average, so several share one row of a batch."
    ) + (
        f" Long rows (the longest has {log.lengths.longest:,} events) are cut into windows."
        if windows > 1
        else ""
    )
    return Pack(rows="auto", windows=windows)


def steps_of_epoch(log: LogSummary, positions: int) -> int:
    """About how many steps an epoch has, if packing fills 85% of the positions of each."""
    return max(int(log.events / (0.85 * positions)), 1)


def choose_profile(log: LogSummary, why: dict[str, str]) -> Profile:
    """Settings of the model and of training for long or for short histories."""
    profile = LONG if log.lengths.mean > LONG_MEAN else SHORT
    why["model"] = (
        f"Sizes and rates for {profile.name} histories ({log.lengths.mean:,.1f} events on average)."
    )
    return profile


# --------------------------------------------------------------------------- loss and evaluation


def may_count(log: LogSummary, machine: Machine, minutes: float) -> bool:
    """Whether the log is small enough to count its items when training starts."""
    seconds = log.events / (COUNTED_PER_SECOND * machine.cores)
    return seconds <= COUNTING_SHARE * 60 * minutes


def choose_loss(
    log: LogSummary, machine: Machine, profile: Profile, counts: bool, why: dict[str, str]
) -> LossConfig:
    """The negatives, and what is known of items that are recommended."""
    targets = (log.item.name, *(c.name for c in log.columns if c.of_item and not _useless(c)))
    why["loss.target_features"] = "The features that an item determines: they are known in advance."
    loss = LossConfig(
        temperature=profile.temperature, item_feature=log.item.name, target_features=targets
    )
    items = log.item.distinct
    if counts and items <= MOST_FULL[machine.kind]:
        why["loss.negatives"] = f"{items:,} items are few enough to compare with all in every step."
        return dataclasses.replace(loss, negatives="full")
    if counts and items <= MOST_UNIFORM:
        why["loss.negatives"] = (
            f"{items:,} items are too many to compare with all in every step, so some are drawn."
        )
        return dataclasses.replace(loss, negatives="uniform", num_negatives=NUM_NEGATIVES)
    why["loss.negatives"] = (
        "The other events of the batch, corrected for their frequency: the log is too large to count "
        "its items first."
    )
    return dataclasses.replace(loss, negatives="in_batch", log_q="stream")


def choose_evaluation(
    log: LogSummary, profile: Profile, counts: bool, why: dict[str, str]
) -> EvalConfig:
    """What is held out, and when it is ranked."""
    why["eval.split"] = (
        "The last event of each row is for s2s evaluate, the one before it for evaluations during "
        f"training. {log.lengths.usable:.0%} of the rows have at least two more."
    )
    settings = EvalConfig(split=LastEvents(events=2))
    if log.returning >= MOST_RETURNING:
        why["eval.filter_seen"] = (
            f"Items that a user already had are ranked and recommended, too: {log.returning:.0%} of the "
            f"rows end with such an item."
        )
        settings = dataclasses.replace(settings, filter_seen=False)
    elif log.returning >= MENTIONED_RETURNING:
        why["eval.filter_seen"] = (
            f"Items that a user already had are never recommended. {log.returning:.0%} of the rows end "
            f"with such an item, which counts as missed; to rank them, give False."
        )
    if not counts:
        why["eval.every_steps"] = (
            "Never: counting the items of this log before training would take too long. Check the "
            "result with s2s evaluate."
        )
        return dataclasses.replace(settings, every_steps=None)
    why["eval.every_steps"] = "Ten times in a run; the best checkpoint is kept."
    why["eval.neighbours"] = (
        "Counts of which items follow each other are added to the model's scores, with the weight that "
        "does best on the validation events."
    )
    return dataclasses.replace(
        settings, every_steps="auto", neighbours=profile.neighbours, patience=profile.patience
    )


def _count(column: ColumnSummary, log: LogSummary) -> str:
    """The number of ids of a column in words."""
    about = "at least about " if log.sampled else ""
    return f"{about}{column.distinct:,} distinct {'texts' if column.text else 'numbers'}"
