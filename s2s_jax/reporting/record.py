"""Reads a run directory without its checkpoints: lines of metrics and saved evaluations.

Shapes: P lines.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from s2s_jax.config import EvalConfig
from s2s_jax.errors import UserError
from s2s_jax.reporting.charts import Series
from s2s_jax.runs.checkpoints.files import checkpoint_fingerprint
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.training.evaluations import Evaluations
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath

Line = dict[str, float]


class SavedEvaluation(NamedTuple):
    """A file written by `s2s evaluate`.

    Attributes:
      name: the name of the file.
      step: the step of the checkpoint.
      split: "test" or "validation".
      metrics: the metrics of `ranking.tally.Evaluation`.
      intervals: the intervals of `ranking.tally.Evaluation`.
      checkpoint: the fingerprint of the checkpoint; None if unknown.
      conditions: what the metrics depend on, in words; where it differs from the run's configuration,
        that is said, too.
    """

    name: str
    step: int
    split: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    checkpoint: str | None = None
    conditions: tuple[str, ...] = ()


class Record(NamedTuple):
    """The contents of a run directory, apart from checkpoints.

    Attributes:
      run_dir: the run directory.
      metric: the metric that chooses the best checkpoint (`eval.metric`).
      training: the lines of metrics.jsonl that have a loss, sorted by step.
      evaluations: the lines of evaluations during training, sorted by step.
      best: the best of `evaluations` by `metric`; None if there are none.
      saved: the newest saved evaluation of each split.
      others: the names of the other evaluation files, including unreadable ones.
    """

    run_dir: Place
    metric: str
    training: list[Line]
    evaluations: list[Line]
    best: Line | None
    saved: list[SavedEvaluation]
    others: list[str]


def read_record(run_dir: Place, settings: EvalConfig) -> Record:
    """Reads the record of a run; missing files leave their attributes empty.

    Args:
      run_dir: the run directory.
      settings: the settings of the run's evaluations.

    Raises:
      UserError: metrics.jsonl exists but cannot be read.
    """
    try:
        lines = [_numbers(line) for line in read_lines(run_dir)]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir / 'metrics.jsonl'}: cannot be read ({error}); restore the file or move it away"
        ) from error
    lines = sorted((line for line in lines if "step" in line), key=lambda line: line["step"])
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    best_step = Evaluations(settings, evaluations).best_step
    name = f"eval/{settings.metric}"
    best = [line for line in evaluations if line["step"] == best_step and name in line]
    saved, others = _saved(run_dir, settings)
    training = [line for line in lines if "loss" in line]
    return Record(
        run_dir=run_dir,
        metric=settings.metric,
        training=training,
        evaluations=evaluations,
        best=best[0] if best else None,
        saved=saved,
        others=others,
    )


def curve(lines: list[Line], key: str, name: str) -> Series:
    """The values of `key` over the steps of the lines that have it.

    Args:
      lines: lines of metrics, sorted by step.
      key: a key of metrics.jsonl.
      name: name of the curve.
    """
    there = [line for line in lines if key in line]
    x_P = np.array([line["step"] for line in there], np.float64)
    return Series(name, x_P, np.array([line[key] for line in there], np.float64))


def _numbers(line: dict[str, Any]) -> Line:
    """The values of a line that are numbers; others occur only in damaged files."""
    return {key: value for key, value in line.items() if type(value) in (int, float)}


def _saved(run_dir: Place, settings: EvalConfig) -> tuple[list[SavedEvaluation], list[str]]:
    """`Record.saved` and `Record.others`."""
    newest: dict[str, SavedEvaluation] = {}
    others = []
    for path in sorted(run_dir.glob("evaluation_*.json"), key=_age, reverse=True):
        try:
            found = _parse(path, settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            others.append(f"{path.name} (cannot be read)")
            continue
        if _is_of_another_run(run_dir, found):
            others.append(f"{found.name} (of weights that are no longer there)")
        elif found.split in newest:
            others.append(found.name)
        else:
            newest[found.split] = found
    return [newest[split] for split in sorted(newest)], sorted(others)


def _age(path: Place) -> tuple[int, str]:
    """What sorts files by the time of their last change."""
    changed = (
        file_systems.changed_ns(path) if isinstance(path, StorePath) else path.stat().st_mtime_ns
    )
    return changed, path.name


def _is_of_another_run(run_dir: Place, found: SavedEvaluation) -> bool:
    """Whether the run now has another checkpoint for this step, for example after a new training."""
    there = (run_dir / "checkpoints" / str(found.step)).is_dir()
    if not there or found.checkpoint is None:
        return False
    return found.checkpoint != checkpoint_fingerprint(run_dir, found.step)


def _parse(path: Place, settings: EvalConfig) -> SavedEvaluation:
    content = json.loads(path.read_text())
    intervals = {
        str(name): (float(low), float(high))
        for name, (low, high) in content["intervals_95"].items()
    }
    metrics = {str(name): float(value) for name, value in content["metrics"].items()}
    # Older files have no fingerprint.
    checkpoint = content["checkpoint"] if "checkpoint" in content else None
    return SavedEvaluation(
        path.name,
        int(content["step"]),
        str(content["split"]),
        metrics,
        intervals,
        checkpoint,
        tuple(_conditions(content, settings)),
    )


def _conditions(content: Mapping[str, Any], settings: EvalConfig) -> Iterator[str]:
    """See `SavedEvaluation.conditions`; older files know less."""
    for name in ("filter_seen", "untrained", "neighbours"):
        if name in content:
            own = getattr(settings, name)
            differs = content[name] != own and own != "auto"
            note = f" (the configuration of the run has {own})" if differs else ""
            yield f"eval.{name} {content[name]}{note}"
    if "known_of_target" in content:
        known = ", ".join(map(str, content["known_of_target"]))
        yield f"time-aware ({known} of the target known)" if known else "time-blind"
    if content.get("true_time"):
        yield "true time of the history"
