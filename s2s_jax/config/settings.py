"""What the parts of a job need to know: small values, each made once from the configuration.

Where something outlives the command that made it, the value has a fingerprint: what must be the same
wherever that is used again. Fingerprints are selections of `identity.KEYS`, the one list of what each
key decides.
"""

import dataclasses
from typing import Literal, Self

from s2s_jax.config import identity
from s2s_jax.config.identity import Fingerprint
from s2s_jax.config.kinds import ByTime, Pack
from s2s_jax.config.schema import Config, FeatureConfig


def positions_of(windows: int, seq_len: int) -> int:
    """Positions of a row that windows cover, each sharing one with the next."""
    return windows * (seq_len - 1) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
    """Which logs are read, and how.

    Attributes:
      paths: ORC files and directories, separated by commas.
      skip_unreadable: whether a stripe or file that cannot be read is left out; otherwise it ends the
        job.
      threads: that read and decode stripes; 0 does it in the main thread.
    """

    paths: str
    skip_unreadable: bool
    threads: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """The logs of `io.data_paths`."""
        return cls(
            paths=config.io.data_paths,
            skip_unreadable=config.io.on_error == "skip_stripe",
            threads=config.io.thread_num,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Which events training never sees, and which of these are to be found.

    Attributes:
      events: at the end of every row that are held out; 0 where rows are split by time.
      at: time from which on events are held out; None: rows are not split by time.
      validation_at: earlier time from which on they are; None: there is no validation.
      feature: whose column has the times; None: rows are not split by time.
      fingerprint: what decides that.
    """

    events: int
    at: str | None
    validation_at: str | None
    feature: FeatureConfig | None
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """The split of `eval`."""
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
        """Whether some events of a row are to be found."""
        return self.events > 0 or self.at is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """What rows of a log become: which of their events, and which ids.

    Attributes:
      features: whose columns are decoded.
      split: events that it holds out are left out; None: all are kept.
      seq_len: positions of a window; None: rows are kept whole.
      windows: of a row that are kept.
      keep_newest: whether these are the newest ones; otherwise the oldest.
      check_length: refuse rows that have more.
      fingerprint: all that decoded rows depend on but the files.
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
        """What training sees of rows."""
        return cls(
            features=config.features,
            split=Split.of(config),
            seq_len=config.model.seq_len,
            windows=config.io.sequences.windows,
            keep_newest=config.io.truncate_side == "left",
            check_length=config.io.check_length,
            fingerprint=identity.of_decoding(config),
        )

    @classmethod
    def of_whole_rows(cls, features: tuple[FeatureConfig, ...]) -> Self:
        """All events of rows, also those that are held out."""
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
        """Positions of a row that are kept: all windows, each sharing one with the next; None: all."""
        return None if self.seq_len is None else positions_of(self.windows, self.seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOrder:
    """Which row comes where in an epoch.

    Attributes:
      shuffle: permute rows anew in each epoch; otherwise they keep the order of the files.
      shuffle_rows: least rows of the shuffle blocks of all shards together.
      shards: places of the log that every batch draws from, at most.
      seed: of the permutations.
      fingerprint: what the order depends on but the files.
    """

    shuffle: bool
    shuffle_rows: int
    shards: int
    seed: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """The order of `io`."""
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
    """How decoded rows lie in the batch of a device.

    Attributes:
      rows: of the batch.
      seq_len: positions of each.
      packing: rows of the log that lie in them side by side; auto: as many as fill them well; None: each
        has a row of its own.
      keep_newest: which end of a row is kept where it does not fit.
      drawn_len: positions of a row that an epoch draws from those that were decoded; None: all.
      layout: how ids travel to the device.
    """

    rows: int
    seq_len: int
    packing: int | Literal["auto"] | None
    keep_newest: bool
    drawn_len: int | None
    layout: Literal["dense", "flat"]

    @classmethod
    def of(cls, config: Config) -> Self:
        """The sequences of `io` and `model`."""
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
        """Rows of the log of one device in one forward pass; packing is a number or None."""
        assert self.packing != "auto", "the files say how many: see batch_fill"
        return self.rows if self.packing is None else self.packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """All that batches of a log depend on.

    Attributes:
      logs: which logs.
      decoding: what their rows become.
      order: which row comes where.
      sequences: how rows lie in a batch.
      drop_remainder: leave out the last, partial batch of an epoch.
      prefetch: batches that wait in host memory.
      cache: directory of decoded stripes; None: none.
      take_new_files: whether files added since a reading position was saved take part from the next
        epoch on; otherwise they end the job.
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
        """The reading of training."""
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
        """Positions of a row of the log that an epoch trains on, at most."""
        drawn = self.sequences.drawn_len
        kept = self.decoding.history_len if drawn is None else drawn
        assert kept is not None, "training cuts rows"
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """What an item is, and what it shows.

    Attributes:
      features: of the log, all of them.
      item: the feature that says which item an event is about.
      shown: names of the features that scored events show.
      fingerprint: what ids of items depend on but the files.
    """

    features: tuple[FeatureConfig, ...]
    item: FeatureConfig
    shown: tuple[str, ...]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, config: Config) -> Self:
        """The items of `loss`."""
        return cls(
            features=config.features,
            item=config.feature(config.loss.item_feature),
            shown=config.target_features,
            fingerprint=identity.of_items(config),
        )

    @property
    def item_side(self) -> tuple[FeatureConfig, ...]:
        """The features that say what an item is, and what it shows."""
        return tuple(f for f in self.features if f.name in (self.item.name, *self.shown))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negatives:
    """Which items events compete with, and what the loss is told of how often they come up.

    Attributes:
      kind: in_batch, the other events; mixed, these and drawn items; uniform, drawn items; full, all.
      number: items that each device draws.
      seed: of the draws.
      item_shares: whether the loss is told how often each item comes in the log.
      corrects: whether it is told of any shares.
    """

    kind: Literal["in_batch", "mixed", "uniform", "full"]
    number: int
    seed: int
    item_shares: bool
    corrects: bool

    @classmethod
    def of(cls, config: Config) -> Self:
        """The negatives of `loss`."""
        return cls(
            kind=config.loss.negatives,
            number=config.loss.num_negatives,
            seed=config.train.seed,
            item_shares=config.loss.catalogue_shares,
            corrects=config.loss.corrects,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownHistory:
    """What the model is shown of what a user did.

    Attributes:
      items: what an item is.
      seq_len: positions of a sequence.
      shown_len: newest events that are shown, at most `seq_len`.
    """

    items: Items
    seq_len: int
    shown_len: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """What evaluating and recommending show."""
        return cls(items=Items.of(config), seq_len=config.model.seq_len, shown_len=config.shown_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Which items may be recommended to a user, and in which order.

    Attributes:
      items: what an item is, and what it shows.
      filter_seen: whether the items of a user's history are left out.
      untrained: what becomes of items that were never trained; see `eval.untrained`.
    """

    items: Items
    filter_seen: bool
    untrained: Literal["keep", "last", "drop"]

    @classmethod
    def of(cls, config: Config) -> Self:
        """The ranking of `eval`."""
        return cls(
            items=Items.of(config),
            filter_seen=config.eval.filter_seen,
            untrained=config.eval.untrained,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the columns of a log are taken for, to see whether they are it.

    Attributes:
      decoding: what training sees of rows.
      item: the feature that says which item an event is about.
      pairing: which event of a row a position is scored against.
      time_feature: the feature that a split by time would go by, where there is one of that name.
      paths: of the log, for messages.
    """

    decoding: Decoding
    item: FeatureConfig
    pairing: Literal["next", "previous"]
    time_feature: FeatureConfig | None
    paths: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """What training takes them for."""
        split = config.eval.split
        name = split.feature if isinstance(split, ByTime) else ByTime.feature
        named = [f for f in config.features if f.name == name]
        return cls(
            decoding=Decoding.of(config),
            item=config.feature(config.loss.item_feature),
            pairing=config.loss.pairing,
            time_feature=named[0] if named else None,
            paths=config.io.data_paths,
        )
