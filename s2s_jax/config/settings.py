"""The few settings that each part of the program needs, as small frozen values.

Functions take these values instead of the whole `Config`. Each value is made from the configuration by
its class method `of`.

Some results outlive the command that made them, such as cached stripes and catalogue files. The values
that determine such a result have a `fingerprint`: the settings that must be the same when the result is
used again. `identity.KEYS` says which keys are in which fingerprint.
"""

import dataclasses
from typing import Literal, Self

from s2s_jax.config import identity
from s2s_jax.config.identity import Fingerprint
from s2s_jax.config.kinds import ByTime, Pack
from s2s_jax.config.schema import Config, FeatureConfig


def positions_of(windows: int, seq_len: int) -> int:
    """Return the number of events that `windows` windows cover; each shares one event with the next."""
    return windows * (seq_len - 1) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
    """The log files to read, and how to read them.

    Attributes:
      paths: ORC files and directories, separated by commas.
      skip_unreadable: whether to skip stripes and files that cannot be read; otherwise they end the job.
      threads: the number of threads that read and decode stripes; 0 means the main thread does it.
    """

    paths: str
    skip_unreadable: bool
    threads: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the logs that `io` names."""
        return cls(
            paths=config.io.data_paths,
            skip_unreadable=config.io.on_error == "skip_stripe",
            threads=config.io.thread_num,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The events that are held out: training never sees them, and evaluation ranks some of them.

    Attributes:
      events: the number of events held out at the end of every row; 0 with a split by time.
      at: the time of the test split, as in `eval.split.at`; None without a split by time.
      validation_at: the earlier time of the validation split; None if there is none.
      feature: the feature whose column has the times; None without a split by time.
      fingerprint: the settings that determine which events are held out.
    """

    events: int
    at: str | None
    validation_at: str | None
    feature: FeatureConfig | None
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the split that `eval.split` describes."""
        split, fingerprint = config.eval.split, identity.of_split(config)
        if isinstance(split, ByTime):
            return cls(
                events=0,
                at=split.at,
                validation_at=split.validation_at,
                feature=config.feature(split.feature),
                fingerprint=fingerprint,
            )
        return cls(
            events=0 if split is None else split.events,
            at=None,
            validation_at=None,
            feature=None,
            fingerprint=fingerprint,
        )

    @property
    def holds_out(self) -> bool:
        """Whether any events are held out."""
        return self.events > 0 or self.at is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How rows of the log are decoded: which events are kept, and how entries become ids.

    Attributes:
      features: the features to decode; an `EventTime` comes last.
      split: the split whose held-out events are dropped; None keeps all events.
      seq_len: the length of a window, in events; None keeps all events of a row.
      windows: the maximum number of windows to keep of a row.
      keep_newest: whether to keep the newest windows; otherwise the oldest.
      check_length: whether to refuse rows that do not fit in these windows, instead of truncating them.
      fingerprint: the settings that determine the decoded rows of a file.
    """

    features: tuple[FeatureConfig, ...]
    split: Split | None
    seq_len: int | None
    windows: int
    keep_newest: bool
    check_length: bool
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the decoding of rows for training."""
        return cls(
            features=config.decoded_features,
            split=Split.of(config),
            seq_len=config.model.seq_len,
            windows=config.io.sequences.windows,
            keep_newest=config.io.truncate_side == "left",
            check_length=config.io.check_length,
            fingerprint=identity.of_decoding(config),
        )

    @classmethod
    def of_whole_rows(cls, features: tuple[FeatureConfig, ...]) -> Self:
        """Return a decoding that keeps all events of all rows, including held-out ones."""
        return cls(
            features=features,
            split=None,
            seq_len=None,
            windows=1,
            keep_newest=True,
            check_length=False,
            fingerprint=identity.of_features(features),
        )

    @property
    def history_len(self) -> int | None:
        """The maximum number of events to keep of a row; None keeps all."""
        return None if self.seq_len is None else positions_of(self.windows, self.seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOrder:
    """The order of rows in an epoch.

    Attributes:
      shuffle: whether to permute rows, differently in each epoch; otherwise rows keep the order of the
        files.
      shuffle_rows: the minimum number of rows that are shuffled together, over all shards.
      shards: the maximum number of places in the log from which a batch takes rows.
      seed: the seed of the permutations.
      fingerprint: the settings that determine the order of the rows of given files.
    """

    shuffle: bool
    shuffle_rows: int
    shards: int
    seed: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the order that `io` describes."""
        io = config.io
        return cls(
            shuffle=io.shuffle,
            shuffle_rows=io.shuffle_rows,
            shards=io.shards,
            seed=io.seed,
            fingerprint=identity.of_order(config),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """How decoded rows become the sequences of a device's batch.

    Attributes:
      rows: the number of rows of the batch.
      seq_len: the length of these rows, in positions.
      packing: the number of rows of the log to pack into the batch; "auto" chooses it so that the batch
        is well filled; None puts each row of the log into its own row of the batch.
      keep_newest: whether to keep the newest events of a row that does not fit; otherwise the oldest.
      drawn_len: the maximum number of a row's decoded events to use per epoch; None uses all.
      layout: the layout of ids on their way to the device, see `io.layout`.
    """

    rows: int
    seq_len: int
    packing: int | Literal["auto"] | None
    keep_newest: bool
    drawn_len: int | None
    layout: Literal["dense", "flat"]

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the sequences that `io` and `model` describe."""
        io, seq_len = config.io, config.model.seq_len
        drawn = io.sequences.windows_per_epoch
        return cls(
            rows=io.batch_size,
            seq_len=seq_len,
            packing=io.sequences.rows if isinstance(io.sequences, Pack) else None,
            keep_newest=io.truncate_side == "left",
            drawn_len=None if drawn is None else positions_of(drawn, seq_len),
            layout=io.layout,
        )

    @property
    def device_rows(self) -> int:
        """The number of rows of the log per device and forward pass; `packing` must not be "auto"."""
        assert self.packing != "auto", "batch_fill must replace auto with a number"
        return self.rows if self.packing is None else self.packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """All settings for reading batches of a log.

    Attributes:
      logs: the log files to read.
      decoding: how rows are decoded.
      order: the order of rows in an epoch.
      sequences: how rows become the sequences of a batch.
      drop_remainder: whether to drop the last batch of an epoch if it is not full.
      prefetch: the number of batches that wait in host memory.
      cache: the directory for decoded stripes; None means no cache.
      take_new_files: whether a continued run reads files that were added since its checkpoint, starting
        with the next epoch; otherwise such files end the job.
    """

    logs: Logs
    decoding: Decoding
    order: ReadingOrder
    sequences: Sequences
    drop_remainder: bool
    prefetch: int
    cache: str | None
    take_new_files: bool

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the settings with which training reads."""
        return cls(
            logs=Logs.of(config),
            decoding=Decoding.of(config),
            order=ReadingOrder.of(config),
            sequences=Sequences.of(config),
            drop_remainder=config.io.drop_remainder,
            prefetch=config.io.prefetch,
            cache=config.io.cache,
            take_new_files=config.io.new_files == "next_epoch",
        )

    @property
    def epoch_history_len(self) -> int:
        """The maximum number of events of a row that an epoch trains on."""
        drawn = self.sequences.drawn_len
        kept = self.decoding.history_len if drawn is None else drawn
        assert kept is not None, "training always limits the length of rows"
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """How items and their features are read from the log.

    Attributes:
      features: all features of the log.
      item: the feature that says which item an event is about.
      shown: the names of the target features: the model sees only these of a target or negative.
      fingerprint: the settings that determine the ids of items and of target features.
    """

    features: tuple[FeatureConfig, ...]
    item: FeatureConfig
    shown: tuple[str, ...]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the items that `loss` describes."""
        return cls(
            features=config.features,
            item=config.feature(config.loss.item_feature),
            shown=config.target_features,
            fingerprint=identity.of_items(config),
        )

    @property
    def item_side(self) -> tuple[FeatureConfig, ...]:
        """The item feature and the target features."""
        return tuple(f for f in self.features if f.name in (self.item.name, *self.shown))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negatives:
    """The negatives of the loss, and whether the loss corrects for their frequency.

    Attributes:
      kind: the kind of negatives, see `loss.negatives`.
      number: the number of items that each device samples per step.
      seed: the seed of the sampling.
      item_shares: whether the correction takes the shares of items from the catalogue.
      uniform_share: whether the loss needs the share of an item in uniform draws.
    """

    kind: Literal["in_batch", "mixed", "uniform", "full"]
    number: int
    seed: int
    item_shares: bool
    uniform_share: bool

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the negatives that `loss` describes."""
        return cls(
            kind=config.loss.negatives,
            number=config.loss.num_negatives,
            seed=config.train.seed,
            item_shares=config.loss.catalogue_shares,
            uniform_share=config.loss.corrects or config.loss.objective == "gbce",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownHistory:
    """The part of a user's history that the model sees in evaluation and recommendation.

    Attributes:
      items: how items are read from the log.
      decoded: what is decoded of a row: all features and, last, the times if the model needs them.
      seq_len: the length of a sequence, in positions.
      shown_len: the number of newest events that the model sees, at most `seq_len`.
    """

    items: Items
    decoded: tuple[FeatureConfig, ...]
    seq_len: int
    shown_len: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the history for the model and loss of a configuration."""
        return cls(
            items=Items.of(config),
            decoded=config.decoded_features,
            seq_len=config.model.seq_len,
            shown_len=config.shown_len,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Which items may be recommended to a user, and in which order.

    Attributes:
      items: how items are read from the log.
      filter_seen: whether the items of a user's history are left out.
      untrained: how items that were never trained are ranked, see `eval.untrained`.
      neighbours: the weight of counted neighbours in a logit, see `eval.neighbours`.
      temperature: `loss.temperature`; a score is a logit times the temperature.
    """

    items: Items
    filter_seen: bool
    untrained: Literal["keep", "last", "drop"]
    neighbours: float | Literal["auto"]
    temperature: float

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the ranking that `eval` describes."""
        return cls(
            items=Items.of(config),
            filter_seen=config.eval.filter_seen,
            untrained=config.eval.untrained,
            neighbours=config.eval.neighbours,
            temperature=config.loss.temperature,
        )

    @property
    def weight(self) -> float:
        """The weight of counted neighbours, which must not be "auto"."""
        assert self.neighbours != "auto", "`Restored.with_weight` must replace auto with a number"
        return self.neighbours
