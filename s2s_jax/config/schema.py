"""All settings of s2s_jax, typed and documented, as frozen dataclasses."""

import dataclasses
import json
from typing import Literal

from s2s_jax.config.features import EventTime, FeatureConfig, TableConfig, complete
from s2s_jax.config.kinds import (
    ByTime,
    Constant,
    Cosine,
    Crop,
    LastEvents,
    Linear,
    Pack,
    TimeGaps,
    Truncate,
)
from s2s_jax.config.old.format import FORMAT
from s2s_jax.config.plain import to_dict
from s2s_jax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class IOConfig:
    """The logs to read, and how they become batches."""

    data_paths: str = ""
    """ORC files and directories, separated by commas: paths, or addresses in stores (s3://, gs://,
    hdfs://). Directories are searched recursively, following links, for files that end in .orc or, if
    there are none, for all files. Names that start with . or _ are skipped"""
    batch_size: int = 16
    """Rows (users, unless io.sequences is pack) per device in one forward pass. An optimizer step uses
    batch_size x devices x train.gradient_accumulation_steps rows"""
    thread_num: int = 2
    """Threads that read and decode stripes ahead of their use. 0: everything runs in the main thread"""
    prefetch: int = 4
    """Batches that wait in host memory. Two more wait on the devices"""
    drop_remainder: bool = False
    """Drop the last batch of an epoch if it is not full. Otherwise it is filled up with rows that have
    no weight"""
    shuffle: bool = True
    """Permute stripes, and rows within shuffle blocks, differently in each epoch. Otherwise rows keep
    the order of the files"""
    shuffle_rows: int = 4096
    """Minimum number of rows that are decoded and shuffled together, over all shards. Memory grows with
    it and, since only whole stripes can be read, with the size of stripes"""
    shards: int = 16
    """Number of places in the log from which every batch takes rows, the same number from each. There
    is at most one per 32 stripes, and only one without shuffle. A host only reads the shards of its own
    rows, so this should be the number of hosts or a multiple of it. The order of rows depends on it,
    but not on the number of hosts, threads or devices"""
    seed: int = 42
    """Seed of the order of rows"""
    truncate_side: Literal["left", "right"] = "left"
    """The end of a row where events beyond model.seq_len are dropped. left: the newest events are kept;
    right: the oldest"""
    check_length: bool = False
    """Refuse rows that would be truncated"""
    sequences: Truncate | Crop | Pack = Truncate()
    """How rows become sequences of model.seq_len events. truncate: long rows are cut; crop: long rows
    are cut differently in different epochs; pack: several rows share one row of the batch"""
    layout: Literal["dense", "flat"] = "dense"
    """How ids are sent to the devices. dense: padded to model.seq_len on the host; flat: packed, and
    padded on the device, which needs less CPU time on the host"""
    cache: str | None = None
    """Directory for decoded, hashed and truncated stripes (Arrow IPC files). A stripe is written when
    it is read for the first time, and later read from there. Runs and hosts may share a directory.
    None: no cache"""
    on_error: Literal["stop", "skip_stripe"] = "stop"
    """What to do about stripes or files that cannot be read. stop: end the run; skip_stripe: give their
    rows no weight, list them in skipped.jsonl in train.output_dir, and count them as skipped_rows in
    the metrics"""
    new_files: Literal["refuse", "next_epoch"] = "refuse"
    """What a continued run does about files that were added since the checkpoint. refuse: it ends;
    next_epoch: it reads them from the next epoch on"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal transformer."""

    seq_len: int = 1024
    """Length of sequences, in events. Longer ones are truncated, shorter ones padded"""
    hidden_size: int = 1024
    """Width of the transformer"""
    num_layers: int = 8
    """Transformer layers"""
    nhead: int = 8
    """Attention heads. Must divide hidden_size"""
    layer: Literal["transformer", "hstu", "hstu_softmax"] = "transformer"
    """Kind of the layers. transformer: attention, then a feed-forward part; hstu: attention that
    weights values with the SiLU of their scores instead of a softmax, and whose output is multiplied by
    a gate, without a feed-forward part (Zhai et al., "Actions Speak Louder than Words", 2024);
    hstu_softmax: the same with a softmax. In the paper, HSTU has scores that depend on distances
    (distance_bias) and on time gaps (time_bias), and more and smaller layers than a transformer"""
    dim_feedforward: int = 1024
    """Width of the hidden layer of the feed-forward part"""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward part of a layer. gelu: linear, GELU, linear; swiglu: the hidden layer is the
    product of a linear layer and the SiLU of another one (Shazeer, "GLU variants improve transformer",
    2020). It has three matrices instead of two, so with two thirds of dim_feedforward it is as large as
    gelu"""
    norm: Literal["layer", "rms"] = "layer"
    """The norms of the transformer. layer: layer norm; rms: RMS norm, which does not subtract the mean
    and has no bias (Zhang & Sennrich, "Root mean square layer normalization", 2019)"""
    norm_placement: Literal["pre", "post"] = "pre"
    """Where a layer has its norms. pre: x + f(norm(x)), with another norm after the last layer; post:
    norm(x + f(x)), as in the first transformer (Vaswani et al., "Attention is all you need", 2017),
    which needs smaller learning rates and a warm-up (Xiong et al., "On layer normalization in the
    transformer architecture", 2020)"""
    qk_norm: bool = False
    """Divide queries and keys by their lengths. Their products are then cosines, and each head
    multiplies them by a learned number, which is log2(seq_len² - seq_len) at first, instead of dividing
    by the square root of the head's width (Henry et al., "Query-key normalization for transformers",
    2020)"""
    gated_residuals: bool = False
    """Multiply what a part of a layer adds to x by sigmoid(linear(x)), so that each number of x says
    how much it changes (Borisyuk et al., "From Features to Transformers: Redefining Ranking for
    Scalable Impact", 2025). The linear layers begin like all others, so the gates are near 1/2 at
    first"""
    dropout: float = 0.1
    """Dropout rate, applied after attention, after its output projection, and after the feed-forward
    layers. In layers of HSTU, it is applied once, before the output projection"""
    input_norm: bool = False
    """Apply a norm to events (after learned positions) before the first layer. Without it, as in
    the RecIS example, the projection's bias and the first layers overwhelm freshly initialized
    embeddings, and a model of few or rare events may take long to learn anything from them"""
    input_dropout: float = 0.0
    """Dropout rate of events (with their learned positions) before the first layer"""
    event_dropout: float = 0.0
    """Rate at which whole events become zeros before the first layer, in training. Predictions then
    rely less on single events, which helps on short histories and rare items. The events are still
    targets"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the dense part computes. Parameters, norms and the loss are always float32.
    auto: float32 on CPUs, bfloat16 otherwise"""
    position: Literal["none", "learned", "rope"] = "none"
    """How the transformer knows the order of events, apart from causality. none: it does not; learned:
    a trained vector for each position, counted from the start of the sequence; rope: queries and keys
    are rotated by angles that grow with the position. With learned and loss.pairing next, the vector of
    the last position is never trained, so evaluation and recommendation use only seq_len - 1 events"""
    distance_bias: bool = False
    """Add a learned number to the scores of attention, by head and distance, as T5 does (Raffel et al.,
    "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020). Each
    distance below 16 has its own number; longer ones share 16 numbers in ranges that grow, the last
    from 113 on. All are 0 at first, and each layer has its own. It goes with any position"""
    time_bias: TimeGaps | None = None
    """Whether scores of attention depend on time. gaps: on the gap between the times of the two events,
    as in HSTU (Zhai et al., "Actions Speak Louder than Words", 2024); none: they do not. Only the times
    of events that the model sees are used: nothing is known about when the next event will be. Histories
    must then have true times everywhere, also when they are served"""
    attention: Literal["auto", "blocked", "cudnn", "xla"] = "auto"
    """How attention is computed. blocked: plain JAX, block by block, skipping masked blocks (for
    CPUs); cudnn: fused (GPUs and bfloat16 only); xla: all scores at once. auto: blocked on CPUs, cudnn
    on GPUs if possible (not with distance_bias, time_bias or hstu), xla otherwise"""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass recomputes instead of keeping it in memory. none: nothing; attention: the
    attention of each layer; full: each whole layer. Recomputing takes less memory and more time"""
    unroll: int | Literal["auto"] = "auto"
    """Number of layers per iteration of the loop over layers; num_layers: no loop. More layers per
    iteration give faster code and longer compilation. auto: one layer per iteration if there are
    more than 16 layers, or with remat (which saves less memory without a loop); otherwise no loop"""

    @property
    def drops_out(self) -> bool:
        """Whether training needs random keys for dropout."""
        return max(self.dropout, self.input_dropout, self.event_dropout) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRConfig:
    """The optimizers: AdamW or Muon for the dense part, sparse-row AdamW for the tables."""

    dense_optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the dense part. muon: Muon for its matrices, whose updates are orthogonalized, and
    AdamW for biases, norms and learned positions. Its updates are as large as those of AdamW with the
    same learning rate"""
    dense_lr: float = 1e-3
    """Peak learning rate of the dense part"""
    layer_decay: float = 1.0
    """Learning rate of each layer of the transformer, relative to that of the layer after it. What is
    before the first layer counts as one more layer"""
    sparse_lr: float = 1e-3
    """Peak learning rate of the tables; see also tables.NAME.lr_ratio"""
    beta1: float = 0.9
    """Decay rate of the first moments"""
    beta2: float = 0.999
    """Decay rate of the second moments"""
    eps: float = 1e-8
    """Number added to the square root of the second moments"""
    weight_decay: float = 0.01
    """Decoupled weight decay. A table row only decays in the steps that use it"""
    warmup_steps: int = 0
    """Steps over which both learning rates rise linearly from 0. Learning rates follow the completed
    share of the run. So if a run continues with other devices, batch size or files, then the steps
    given here and for the decay are those of the original run"""
    decay: Constant | Linear | Cosine = Constant()
    """Shape of the learning rates after the warm-up. constant: they stay at their peaks; linear: they
    fall along a straight line; cosine: they fall along half a cosine wave"""
    clip_norm: float | None = None
    """Maximum global norm of the gradient, over the dense part and the table rows. None: no clipping"""
    average_decay: float | None = None
    """Decay rate of a moving average of all weights, such as 0.999: each step keeps this share of the
    average. Training goes on from the weights themselves, but evaluation, recommendation and export use
    the average. It takes a third more memory for tables, and one more copy of the dense part. None: no
    average"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How predictions are compared with the event that follows and with negatives."""

    objective: Literal["softmax", "gbce"] = "softmax"
    """What is minimized. softmax: the cross-entropy of the target among all candidates; gbce: the binary
    cross-entropy of the target and of each negative (Petrov and Macdonald, 2023), for negatives that are
    uniform or full"""
    calibration: float = 0.75
    """With gbce, from 0 to 1, how much the weight of the target is lowered because only a part of all
    items are negatives. 0: not at all, which is the binary cross-entropy of SASRec; 1: so that
    probabilities are as small as if all items were negatives"""
    pairing: Literal["next", "previous"] = "next"
    """The event that the prediction at a position is compared with. next: the event after it; previous:
    the event before it, as in the RecIS example, although attention has already seen it"""
    next_events: int = 1
    """Number of events after a position that its prediction is compared with, each by itself. More
    than 1 trains predictions of what a user will do soon, not only next. hit_rate is that of the next
    event"""
    later_weight: float = 0.5
    """With next_events above 1, the weight of each further event, relative to that of the event before
    it"""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How predictions and events are compared in the loss, in evaluation and in recommendation. cosine:
    by the cosine of their vectors; dot: by the dot product, whose size lets frequent items score higher
    for everyone"""
    temperature: float = 0.05
    """Number by which similarities are divided before the softmax. 1 works well with dot"""
    mask_padding: bool = True
    """Leave padding out of the loss: it predicts nothing, and is neither a target nor a negative"""
    mask_same_item: bool = True
    """Do not use other events with the item of the target as negatives"""
    negative_scope: Literal["global", "local"] = "global"
    """Which events are candidates. global: those of all devices, so that the loss does not depend on
    the number of devices; local: only those of the same device, as in data-parallel RecIS, which needs
    less communication"""
    negatives: Literal["in_batch", "mixed", "uniform", "full"] = "in_batch"
    """What the target competes with. in_batch: the other events of the batch; mixed: these and
    sampled items; uniform: only sampled items; full: all items (every step encodes all of them, so this
    is for catalogues of at most tens of thousands of items). Items are those of the log that training
    sees. Sampled items count as seen in growing tables"""
    catalogue: str | None = None
    """Parquet file written by `s2s catalogue`, for negatives or log_q that need the items. None: items
    are collected from the log before training starts"""
    num_negatives: int = 1024
    """Items that each device samples in each step for mixed and uniform. If there are no more items
    than this, each item is used once"""
    hard_negatives: int | None = None
    """Number of sampled items that a step keeps on each device: those most similar to any prediction, in
    the model's own ranking. With full, of all items. The others cost one comparison without gradients.
    None: all"""
    log_q: Literal["none", "catalogue", "stream"] = "none"
    """Correct for the frequency of negatives, by subtracting from a candidate's logit the logarithm of
    how often it is a negative. Without the correction, in_batch and mixed favor rare items, because
    frequent ones are negatives more often. none: no correction; catalogue: frequencies are the items'
    counts in the log that training sees; stream: frequencies are estimated from the batches so far,
    with a sketch of fixed size, so that in_batch needs no catalogue and frequencies follow a log that
    changes"""
    label_smoothing: float = 0.0
    """Part of the probability that the targets of the loss give evenly to all candidates of a position;
    the position's own target gets the rest. 0: the loss is the usual cross-entropy"""
    item_feature: str = "item_id"
    """The feature that says which item an event is about"""
    target_features: tuple[str, ...] | None = ("item_id", "cate_id")
    """Features of the events that are scored (targets and negatives). Their other features are set to
    zero, because they are unknown when recommending. None: all features"""

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
        """Whether log_q corrects logits."""
        return self.log_q != "none"

    @property
    def needs_catalogue(self) -> bool:
        """Whether training needs the items of the log before it starts."""
        return self.negatives != "in_batch" or self.catalogue_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run."""

    output_dir: str = "runs/default"
    """Directory of the run: config.json, metrics.jsonl, checkpoints/, tensorboard/. If it has
    checkpoints, training continues from the newest one. May be an address in a store, such as
    s3://bucket/run"""
    train_steps: int | None = None
    """Total number of optimizer steps. None: as many as train_epoch needs"""
    train_epoch: int | None = None
    """Number of passes over the data. None: as many as train_steps needs. If both are given, the run
    ends at the earlier one"""
    log_steps: int = 10
    """Steps between lines of metrics.jsonl. loss and hit_rate are means over these steps"""
    save_steps: int = 2000
    """Steps between checkpoints. The last step is always saved"""
    max_to_keep: int = 5
    """Number of newest checkpoints to keep. The best one is always kept"""
    gradient_accumulation_steps: int = 1
    """Forward passes (of io.batch_size rows per device) per optimizer step. The result is the same as
    with one pass over all these rows, including negatives; it takes the memory of a single pass, and
    the time of an additional forward pass"""
    dense_sharding: Literal["replicated", "fsdp"] = "replicated"
    """Where the dense part and its optimizer state are stored. replicated: completely on every device;
    fsdp: sharded over the devices, and gathered layer by layer when used, which takes less memory and
    more communication"""
    seed: int = 42
    """Seed of the initial weights and of dropout"""
    tensorboard: bool = True
    """Write TensorBoard event files"""
    profile_steps: tuple[int, int] | None = None
    """First and last step to profile; the profile is written to profile/ in output_dir. A run that
    starts or ends between them profiles only its own steps. None: no profile"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Ranking of held-out events among the items of the log."""

    split: LastEvents | ByTime | None = None
    """Which events are held out: training never sees them, and evaluation tests whether they are
    predicted. last_events: the last events of every row; by_time: all events from a time on; none: no
    events"""
    filter_seen: bool = True
    """Leave out items of the user's history, in evaluation (where a user who returns to one counts as a
    miss) and in recommendation"""
    untrained: Literal["keep", "last", "drop"] = "keep"
    """What evaluation and recommendation do with items whose id was never trained. keep: rank them like
    others, by their other features; last: rank them after all others; drop: leave them out, so that a
    user whose next item is one of them counts as a miss"""
    neighbours: float | Literal["auto"] = 0.0
    """Weight of counted neighbours (which items follow each other in the log) in evaluation and
    recommendation: log(1 + count / 0.05) times this is added to the model's logit. 0: the model alone;
    auto: each evaluation during training chooses the best of 0, 0.25, 0.5, 1, 2 and 4 by eval.metric,
    and the checkpoint is evaluated, and recommends, with the chosen weight"""
    batch_size: int = 256
    """Users per device that are ranked together. A device encodes at most as many positions at a time as
    batch_size histories of model.seq_len events have"""
    max_users: int | None = None
    """Maximum number of users to evaluate during training: the first ones of the log. None: all"""
    every_steps: int | Literal["auto"] | None = None
    """Steps between evaluations of the validation events during training. They are also evaluated at
    its end. auto: a tenth of the run; None: never. The checkpoint with the best evaluation is kept"""
    metric: str = "ndcg@10"
    """The metric that decides which checkpoint is best: hr, ndcg or recall @ 5, 10, 50, 100 or 200, or
    mrr"""
    patience: int | None = None
    """Number of evaluations in a row without a new best one, after which training ends. None: training
    does not end early"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a training job."""

    io: IOConfig = IOConfig()
    features: tuple[FeatureConfig, ...] = ()
    tables: tuple[TableConfig, ...] = ()
    """Settings of the tables that features use. Tables that are not given have the defaults"""
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
    def decoded_features(self) -> tuple[FeatureConfig, ...]:
        """What is decoded of a row: the features and then, if the model needs them, the times."""
        gaps = self.model.time_bias
        if gaps is None:
            return self.features
        return (*self.features, EventTime(column=gaps.column, time_unit=gaps.time_unit))

    @property
    def shown_len(self) -> int:
        """Number of newest events of a history that evaluation and recommendation give to the model.

        In training, the last learned position is never a query, since there is no event after it. So its
        vector is never trained and must not be used.
        """
        untrained = self.model.position == "learned" and self.loss.pairing == "next"
        return self.model.seq_len - untrained

    @property
    def known_of_next(self) -> tuple[str, ...]:
        """Names of the features about the next event; without any, evaluation is time-blind."""
        return tuple(f.name for f in self.features if f.of_next)

    @property
    def target_features(self) -> tuple[str, ...]:
        """Names of the target features, in the order of `features`."""
        names = [f.name for f in self.features]
        shown = self.loss.target_features
        return tuple(n for n in names if shown is None or n in shown)

    def to_json(self) -> str:
        """The resolved configuration as JSON text."""
        made_by = {"format": FORMAT, "s2s_jax": __version__}
        return json.dumps(made_by | to_dict(self), indent=2) + "\n"
