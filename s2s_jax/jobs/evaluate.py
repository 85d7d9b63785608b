"""Evaluates a run: ranks every user's held-out event among the items of the log."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Logs, Ranking, Split
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.held_out import SplitPart
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import restore
from s2s_jax.ranking.tally import Evaluation

Intervals = dict[str, tuple[float, float]]


class Evaluated(NamedTuple):
    """The evaluation of a checkpoint.

    Attributes:
      step: the step of the checkpoint.
      checkpoint: the fingerprint of the checkpoint.
      split: the events that were ranked: "test" or "validation".
      neighbours: the weight of counted neighbours; that of the checkpoint if `eval.neighbours` is auto.
      index: the index of the log's files.
      evaluation: the metrics.
    """

    step: int
    checkpoint: str
    split: SplitPart
    neighbours: float
    index: FileIndex
    evaluation: Evaluation

    def as_json(self, config: Config, intervals: Intervals) -> dict[str, Any]:
        """The contents of the evaluation's file: metrics, and everything that they depend on.

        Args:
          config: the configuration of the run.
          intervals: the result of `evaluation.intervals()`.
        """
        split = Split.of(config)
        return {
            "step": self.step,
            "checkpoint": self.checkpoint,
            "split": self.split,
            "held_out": split.events,
            "split_at": split.at,
            "validation_at": split.validation_at,
            "filter_seen": config.eval.filter_seen,
            "untrained": config.eval.untrained,
            "neighbours": self.neighbours,
            "known_of_target": list(config.known_of_next),
            "true_time": config.model.time_bias is not None,
            "data_paths": config.io.data_paths,
            "metrics": self.evaluation.metrics,
            "intervals_95": {name: list(ends) for name, ends in intervals.items()},
        }


def evaluate(
    config: Config, checkpoint: str = "best", split: SplitPart = "test", mesh: Mesh | None = None
) -> Evaluated:
    """Ranks the events of `split` with a checkpoint of the run in `train.output_dir`.

    Args:
      config: the configuration of the run.
      checkpoint: the checkpoint to use: best (by `eval.metric`), newest, or a step.
      split: the held-out events to rank: test or validation.
      mesh: the devices to rank on; None: all.

    Raises:
      UserError: nothing is held out for `split`, or the checkpoint or the log cannot be read.
    """
    # Refuses an impossible split before anything is read.
    held_out.targets(Split.of(config), split)
    mesh = make_mesh() if mesh is None else mesh
    run = restore(config, mesh, checkpoint)
    config = run.with_weight(config)
    index = index_files(Logs.of(config), Decoding.of(config))
    check_kinds(index.files, run.kinds, "as the run was trained with", config.features)
    found = Evaluator(EvaluationSettings.of(config), mesh).evaluate(run.functions, run.state, split)
    return Evaluated(run.step, run.fingerprint, split, Ranking.of(config).weight, index, found)
