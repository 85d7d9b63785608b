"""Every knob of s2s_jax, typed and documented, as frozen dataclasses."""

import dataclasses
import json
from typing import Literal

from s2s_jax.config.features import FeatureConfig, TableConfig, complete
from s2s_jax.config.kinds import (
    ByTime,
    Constant,
    Cosine,
    Crop,
    LastEvents,
    Linear,
    Pack,
    Truncate,
)
from s2s_jax.config.old_format import FORMAT
from s2s_jax.config.plain import to_plain
from s2s_jax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class IOConfig:
    """Which logs are read, and how they become batches."""

    data_paths: str = ""
    """ORC files and directories, separated by commas. In a directory (searched recursively, through
    links too) the files ending in .orc are taken or, where there are none, all files; names starting
    with . or _ are passed over"""
    batch_size: int = 16
    """Rows (users, unless packing says otherwise) of one device in one forward pass. An optimizer step
    consumes batch_size x devices x train.gradient_accumulation_steps rows"""
    thread_num: int = 2
    """Threads that read and decode stripes ahead of their use; 0 does everything in the main thread"""
    prefetch: int = 4
    """Batches that wait, ready, in host memory; two more wait on the devices"""
    drop_remainder: bool = False
    """Drop the last, partial batch of an epoch; otherwise rows that weigh nothing fill it"""
    shuffle: bool = True
    """Permute stripes, and rows within shuffle blocks, anew in each epoch; otherwise rows come in the
    order of the files"""
    shuffle_rows: int = 4096
    """Least number of rows that are decoded and shuffled together, over all shards; memory grows with
    it and, since only whole stripes can be read, with the size of stripes"""
    shards: int = 16
    """Places of the log that every batch draws from alike; never more than one for 32 stripes, and one
    without shuffle. A host reads the shards of its rows, so there should be as many as hosts, or a
    multiple. The order of rows depends on it, but not on hosts, threads or devices"""
    seed: int = 42
    """Seed of the order of rows"""
    truncate_side: Literal["left", "right"] = "left"
    """Which end of a sequence longer than model.seq_len is dropped: left keeps the newest"""
    check_length: bool = False
    """Refuse sequences that would be truncated"""
    sequences: Truncate | Crop | Pack = Truncate()
    """How rows become sequences of model.seq_len events: truncate, crop (where epochs cut longer rows
    differently) or pack (several rows lie side by side)"""
    layout: Literal["dense", "flat"] = "dense"
    """How ids travel to the devices: dense, padded to seq_len on the host, or flat, packed, and padded
    on the device, which takes less of the host's processor"""
    cache: str | None = None
    """Directory for decoded, hashed, truncated stripes (Arrow IPC), written when a stripe is first read
    and read ever after; may be shared by runs and hosts. None: no cache"""
    on_error: Literal["stop", "skip_stripe"] = "stop"
    """What a stripe or file that cannot be read does: end the run, or count as rows that weigh nothing,
    with a line in output_dir/skipped.jsonl and skipped_rows in the metrics"""
    new_files: Literal["refuse", "next_epoch"] = "refuse"
    """What files added since the checkpoint was made do to a continued run: end it, or take part from
    the next epoch on"""

    @property
    def packing(self) -> int | Literal["auto"] | None:
        """Rows of the log that lie in the rows of a device's batch; None: each has its own."""
        return self.sequences.rows if isinstance(self.sequences, Pack) else None

    @property
    def windows(self) -> int:
        """Windows' length of a row of the log that is kept."""
        return self.sequences.windows

    @property
    def windows_per_epoch(self) -> int | None:
        """Windows' length of a row of the log that an epoch trains on; None: all that is kept."""
        return self.sequences.windows_per_epoch

    @property
    def device_rows(self) -> int:
        """Rows of the log of one device in one forward pass; a number of packed rows is known."""
        assert self.packing != "auto", "the files say how many"
        return self.batch_size if self.packing is None else self.packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal transformer."""

    seq_len: int = 1024
    """Positions of a sequence; longer ones are truncated, shorter ones padded"""
    hidden_size: int = 1024
    """Width of the transformer"""
    num_layers: int = 8
    """Transformer layers"""
    nhead: int = 8
    """Attention heads; must divide hidden_size"""
    dim_feedforward: int = 1024
    """Width of the feed-forward layers"""
    dropout: float = 0.1
    """Dropout after the attention, after its projection and after the feed-forward"""
    input_norm: bool = False
    """Normalize events (layer norm, after learned positions) before the first layer. Without it the
    projection's bias and the first layers drown what young tables say, as in the RecIS example, and a
    model of few or rare events may take long before it learns anything from them"""
    input_dropout: float = 0.0
    """Dropout of events (with their learned positions), before the first layer"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the dense part computes in; parameters, layer norms and the loss stay float32. auto:
    float32 on a CPU, bfloat16 elsewhere"""
    position: Literal["none", "learned", "rope"] = "none"
    """How the transformer knows the order of events beyond causality: none, not at all; learned, a
    vector for each position, counted from the start of the sequence as it is fed (that of the last one
    learns nothing with pairing next, so evaluating and recommending show seq_len - 1 events); rope,
    queries and keys turned by angles that grow with the position"""
    attention: Literal["auto", "blocked", "cudnn", "xla"] = "auto"
    """How attention is computed: blocked (plain JAX that skips what causality hides, for CPUs), cudnn
    (fused; GPUs, bfloat16 only), xla (all scores at once). auto: blocked on a CPU, cudnn on a GPU where
    it can, else xla"""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, the attention of each layer,
    or all of each layer. Less memory for more time"""
    unroll: int | Literal["auto"] = "auto"
    """Layers that one turn of the loop over layers runs; num_layers: no loop. More makes faster code and
    longer compiles. auto: no loop, but one layer a turn if there are more than 16, or with remat, which
    saves less memory without a loop"""

    @property
    def drops_out(self) -> bool:
        """Whether training needs random keys for dropout."""
        return max(self.dropout, self.input_dropout) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRConfig:
    """The optimizers: AdamW for the dense part, sparse-row AdamW for the tables."""

    dense_lr: float = 1e-3
    """Peak learning rate of the dense part"""
    sparse_lr: float = 1e-3
    """Peak learning rate of the tables"""
    beta1: float = 0.9
    """Decay of the first moments"""
    beta2: float = 0.999
    """Decay of the second moments"""
    eps: float = 1e-8
    """Added to the root of the second moments"""
    weight_decay: float = 0.01
    """Decoupled weight decay; a table's row decays only in the steps that use it"""
    warmup_steps: int = 0
    """Steps over which both rates rise linearly from 0. These steps, and those of the decay, are as long
    as those that the run began with: rates follow the share of it that is done"""
    decay: Constant | Linear | Cosine = Constant()
    """Shape of the rates after the warm-up: constant, linear (a straight line down) or cosine (half a
    wave of it down)"""
    clip_norm: float | None = None
    """Largest global norm of the gradient, dense part and rows together; None: no clipping"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax over similarities between predictions and the events of the batch."""

    pairing: Literal["next", "previous"] = "next"
    """What a position is scored against: the event after it, or (as the RecIS example does) the
    event before it, which attention has already seen"""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Of a prediction and an event, as the loss, evaluation and recommending compare them: the cosine of
    their vectors, or the dot product, whose size lets frequent items score higher everywhere"""
    temperature: float = 0.05
    """Similarities are divided by this before the softmax; 1 goes well with dot"""
    mask_padding: bool = True
    """Leave padding out of queries, positives and negatives"""
    mask_same_item: bool = True
    """Do not count other events with the positive's item as negatives"""
    negative_scope: Literal["global", "local"] = "global"
    """Whose events are candidates: global, those of all devices, so that the loss does not depend on
    the number of devices; local, each device's own, as data-parallel RecIS does, which exchanges less"""
    negatives: Literal["in_batch", "mixed", "uniform", "full"] = "in_batch"
    """What the positive competes with: in_batch, the other events of the batch; mixed, these and sampled
    items; uniform, sampled items instead; full, all items instead (every step encodes them, so for
    catalogues of up to some ten thousand). Items are those of the log that training sees; drawn ones
    count as seen in tables that grow"""
    catalogue: str | None = None
    """Parquet file of `s2s catalogue`, where negatives or log_q need the items. None:
    they are collected from the log before training starts"""
    num_negatives: int = 1024
    """Items that each device draws for mixed and uniform, anew in each step; all of them, once, where
    there are no more"""
    log_q: Literal["none", "catalogue", "stream"] = "none"
    """Subtract from a candidate's logit the logarithm of how often it comes up, which takes the
    advantage from rare items that frequent ones, often negatives, give them in_batch and mixed. none: do
    not; catalogue: by the items' counts in the log that training sees; stream: by the batches so far,
    whose events are counted as they come in a sketch of fixed size, so that in_batch needs no catalogue
    and shares follow a log that changes"""
    item_feature: str = "item_id"
    """The feature that says which item an event is about"""
    target_features: tuple[str, ...] | None = ("item_id", "cate_id")
    """Features that the scored events show; the others are zeroed because they are unknown when
    recommending. None: all"""

    @property
    def catalogue_shares(self) -> bool:
        """Whether log_q takes the shares of items from the catalogue."""
        return self.log_q == "catalogue"

    @property
    def stream_shares(self) -> bool:
        """Whether log_q takes the shares of items from the batches so far."""
        return self.log_q == "stream"

    @property
    def corrects(self) -> bool:
        """Whether log_q takes anything from logits."""
        return self.log_q != "none"

    @property
    def needs_catalogue(self) -> bool:
        """Whether training needs the items of the log before it starts."""
        return self.negatives != "in_batch" or self.catalogue_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    output_dir: str = "runs/default"
    """Run directory: config.json, metrics.jsonl, checkpoints/, tensorboard/. A directory with
    checkpoints is continued from the newest one"""
    train_steps: int | None = None
    """Optimizer steps in all; None: as many as train_epoch gives"""
    train_epoch: int | None = None
    """Passes over the data; None: as many as train_steps needs. The sooner of the two ends the run"""
    log_steps: int = 10
    """Steps between lines of metrics.jsonl; loss and hit_rate are means over them"""
    save_steps: int = 2000
    """Steps between checkpoints; the last step is always saved"""
    max_to_keep: int = 5
    """Newest checkpoints kept"""
    gradient_accumulation_steps: int = 1
    """Forward passes of batch_size rows a device that make one optimizer step, equal to one pass
    over all their rows (negatives included) at the memory of one and an additional forward pass"""
    dense_sharding: Literal["replicated", "fsdp"] = "replicated"
    """Where the dense part and its optimizer state live: replicated, whole on every device; fsdp, cut
    over the devices and gathered layer by layer when used, which takes less memory and sends more"""
    seed: int = 42
    """Seed of the initial weights and of dropout"""
    tensorboard: bool = True
    """Write TensorBoard event files"""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profile written to output_dir/profile; a run that starts or ends between
    them profiles the steps it takes. None: no profile"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Ranking of held-out events among the items of the log."""

    split: LastEvents | ByTime | None = None
    """Which events training never sees, to be found in evaluation: last_events of every row, or by_time
    what happened from a time on. none: training sees all"""
    filter_seen: bool = True
    """Leave out items that the user had before, in evaluation (where a user who comes back to one is a
    miss) and in recommending"""
    untrained: Literal["keep", "last", "drop"] = "keep"
    """Items whose id was never trained, in evaluation and in recommending. keep: ranked like others, by
    what they show besides; last: after all others; drop: left out, so that a user who goes on with one
    is a miss"""
    batch_size: int = 256
    """Users of one device that are encoded and ranked together"""
    max_users: int | None = None
    """Users that are evaluated during training, the first of the log; None: all"""
    every_steps: int | Literal["auto"] | None = None
    """Steps between evaluations of the validation events during training, which are also evaluated at
    its end; auto: a tenth of the run; None: never. The checkpoint of the best one is kept"""
    metric: str = "ndcg@10"
    """What the best checkpoint is best at: hr, ndcg or recall @ 5, 10, 50, 100 or 200, or mrr"""
    patience: int | None = None
    """Training ends after so many evaluations in a row that were no better than the best; None: never"""

    @property
    def held_out(self) -> int:
        """Events at the end of every row that are held out; 0 where rows are split by time, or not."""
        return self.split.events if isinstance(self.split, LastEvents) else 0

    @property
    def split_at(self) -> str | None:
        """Time at which rows are split; None: they are not split by time."""
        return self.split.at if isinstance(self.split, ByTime) else None

    @property
    def validation_at(self) -> str | None:
        """Time from which on validation events are; None: there are none, or no split by time."""
        return self.split.validation_at if isinstance(self.split, ByTime) else None

    @property
    def time_feature(self) -> str:
        """The feature that has the times of a split by time."""
        return self.split.feature if isinstance(self.split, ByTime) else "timestamp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training job."""

    io: IOConfig = IOConfig()
    features: tuple[FeatureConfig, ...] = ()
    tables: tuple[TableConfig, ...] = ()
    """The tables that features read; those that are not given have the defaults"""
    model: ModelConfig = ModelConfig()
    lr: LRConfig = LRConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        """Adds the tables that are not given, so that every table has its settings in `tables`."""
        object.__setattr__(self, "tables", complete(self.features, self.tables))

    def feature(self, name: str) -> FeatureConfig:
        """The feature called `name`, which must exist."""
        (feature,) = (f for f in self.features if f.name == name)
        return feature

    def table(self, name: str) -> TableConfig:
        """The settings of the table called `name`, which a feature must read."""
        (table,) = (t for t in self.tables if t.name == name)
        return table

    @property
    def history_len(self) -> int:
        """Positions of a row of the log that are kept: all windows, each sharing one with the next."""
        return self.io.windows * (self.model.seq_len - 1) + 1

    @property
    def shown_len(self) -> int:
        """Newest positions of a history that evaluating and recommending show to the model.

        The last learned position belongs to no query in training, since no event comes after it that
        could be its target. So its vector is never trained and must not be shown.
        """
        untrained = self.model.position == "learned" and self.loss.pairing == "next"
        return self.model.seq_len - untrained

    @property
    def epoch_history_len(self) -> int:
        """Positions of a row of the log that an epoch trains on."""
        per_epoch = self.io.windows_per_epoch
        return (self.io.windows if per_epoch is None else per_epoch) * (self.model.seq_len - 1) + 1

    @property
    def known_of_next(self) -> tuple[str, ...]:
        """Names of the features that tell of the next event; evaluation is time-blind without any."""
        return tuple(f.name for f in self.features if f.of_next)

    @property
    def target_features(self) -> tuple[str, ...]:
        """Names of the features that scored events show, in the order of `features`."""
        names = [f.name for f in self.features]
        shown = self.loss.target_features
        return tuple(n for n in names if shown is None or n in shown)

    def to_json(self) -> str:
        """The resolved configuration as JSON text."""
        made_by = {"format": FORMAT, "s2s_jax": __version__}
        return json.dumps(made_by | to_plain(self), indent=2) + "\n"
