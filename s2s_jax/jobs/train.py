"""Training: from a configuration to a run directory with checkpoints and metrics.

Trains until `train.train_steps` or `train.train_epoch`, or until told to stop; continues from the
newest checkpoint of the run directory.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.cluster.ending import ending_together
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, TrainConfig
from s2s_jax.config.settings import Items, Meaning, Negatives, Reading, Split
from s2s_jax.data.batching.batch_fill import packing_notes, with_packing
from s2s_jax.data.batching.dataset import HostSlice
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.inspection.first_look import first_look
from s2s_jax.data.items.catalogue import items_of_training
from s2s_jax.errors import UserError
from s2s_jax.ranking.evaluation import Evaluator
from s2s_jax.runs.checkpoints import Checkpoints
from s2s_jax.runs.compatibility import check_config
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.runs.run_dir import locked, write_config
from s2s_jax.runs.writer import Writer
from s2s_jax.signals import Stop
from s2s_jax.training import validation
from s2s_jax.training.batches import put_batch
from s2s_jax.training.flops import time_at_peak
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.loop import Evaluate, Job, Loop, Progress
from s2s_jax.training.meters import Meters
from s2s_jax.training.negatives import ItemSource
from s2s_jax.training.schedule import Position, check_decay, clock_of
from s2s_jax.training.state import TrainState
from s2s_jax.training.step import StepFunctions


def train(config: Config, mesh: Mesh | None = None, stop: Stop | None = None) -> bool:
    """Trains `config`, and says whether it was told to stop before the end; what was trained is saved.

    Nothing of the process is changed for it: signals, for one, are the caller's.

    Args:
      config: the configuration.
      mesh: devices; None: all.
      stop: is looked at between steps.

    Raises:
      UserError: bad data or a directory that cannot be continued; what was trained is saved.
      NotFiniteError: loss or gradient not finite; nothing is saved after the last good step.
      Stopped: it was told to stop before there was anything new to save.
    """
    run_dir = Path(config.train.output_dir)
    with ending_together():
        mesh = make_mesh() if mesh is None else mesh
        with (
            locked(run_dir),
            contextlib.closing(Checkpoints(run_dir, config.train.max_to_keep)) as checkpoints,
            # Before checkpoints are closed on the way out, which waits for the others.
            ending_together(),
        ):
            return _run(config, mesh, checkpoints, Stop() if stop is None else stop)


def _run(config: Config, mesh: Mesh, checkpoints: Checkpoints, stop: Stop) -> bool:
    """Trains to the end, or until told to stop; returns whether it was told."""
    with stop.at_once():
        job, notes = _prepare(config, mesh, checkpoints)
    with contextlib.closing(job.reader), _memory_explained(job):
        with stop.at_once():
            progress = _start_or_continue(job, stop)
            total_steps = progress.clock.end_step
            write_config(Path(config.train.output_dir), config)
            _describe(job, progress, total_steps, notes)
            if progress.done:
                return False
            evaluate = _evaluation(job)
        with _make_writer(job.config, progress, total_steps) as writer:
            return Loop(job, progress, total_steps, writer, stop, evaluate).run()


def _prepare(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[Job, list[str]]:
    """Reads what a run needs of its directory and its log; with sentences that the user should see."""
    if checkpoints.newest_step is not None:
        check_config(Path(config.train.output_dir), config)
    reading = Reading.of(config)
    index = index_files(reading.logs, reading.decoding)
    # Before anything that takes long, or that hosts do together.
    hosts.check_same({"--config": config.to_json(), "io.data_paths": str(index.identity())})
    notes = [*packing_notes(reading, index), *first_look(Meaning.of(config), index)]
    reading = with_packing(reading, index)
    items = None
    if config.loss.needs_catalogue:
        catalogue = items_of_training(
            Items.of(config), Split.of(config), reading.logs, index, config.loss.catalogue
        )
        items = ItemSource(Items.of(config), Negatives.of(config), catalogue, mesh)
    hosts.check_same(
        {
            "io.sequences.rows": str(reading.sequences.packing),
            "the items of io.data_paths": "" if items is None else items.fingerprint,
        }
    )
    microbatches = config.train.gradient_accumulation_steps

    def to_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        arrays = arrays if items is None else items.with_shares(arrays)
        return put_batch(arrays, microbatches, mesh)

    reader = Reader(
        reading,
        reading.sequences.device_rows * mesh.size * microbatches,
        HostSlice(jax.process_index(), jax.process_count()),
        to_device=to_device,
        index=index,
    )
    return Job(config, mesh, reader, checkpoints, items), notes


def _make_writer(
    config: Config, progress: Progress, total_steps: int
) -> contextlib.AbstractContextManager[Writer | None]:
    """A writer in the first process, None in the others."""
    if not hosts.is_first():
        return contextlib.nullcontext()
    settings = config.train
    return Writer(
        Path(settings.output_dir),
        progress.step,
        total_steps,
        settings.tensorboard,
        progress.unwritten,
    )


def _evaluation(job: Job) -> Evaluate | None:
    """Ranks validation events; what that needs of the log is read now, while nothing can be lost."""
    if job.config.eval.every_steps is None:
        return None
    evaluator = Evaluator(job.config, job.mesh, job.config.eval.max_users)
    hosts.check_same({"the items of io.data_paths": evaluator.catalogue.fingerprint()})

    def evaluate(
        functions: StepFunctions, state: TrainState, in_step: hosts.InStep
    ) -> dict[str, float]:
        return evaluator.evaluate(functions, state, "validation", in_step).metrics

    return evaluate


def _start_or_continue(job: Job, stop: Stop) -> Progress:
    """Continues from the newest whole checkpoint if there is one, else starts."""
    items = 0 if job.items is None else job.items.items
    meters = Meters(time_at_peak(job.config, job.mesh.size, items))
    plan = GrowthPlan(job.config.features, job.config.tables)
    step = job.checkpoints.newest_step
    whole = _end_step(job.config.train, job.reader, 0)
    if step is None:
        clock = clock_of(job.config.train, Position(0, whole, whole, 0.0), None)
        check_decay(job.config.lr, clock)
        nothing = validation.Progress(job.config.eval)
        state = stop.unless_stopped(job.functions(plan).init)
        assert state is not None, "a signal would have been raised"
        return Progress(0, state, meters, plan, nothing, clock)
    saved = job.checkpoints.progress(step)
    _check_catalogue(job, saved)
    plan.set_state(saved["growth"])
    state = job.checkpoints.restore(step, job.functions(plan).abstract)
    plan.grow_at_least(step)
    job.reader.set_state(saved["reader"])
    meters.set_state(saved["meters"])
    hosts.say(f"continuing from the checkpoint of step {step:,}")
    # Lines that a full disk, say, kept from being written.
    unwritten = saved["unwritten"] if "unwritten" in saved else []
    lines = [*read_lines(Path(job.config.train.output_dir)), *unwritten]
    before = [line for line in lines if line["step"] <= step]
    end_step = _end_step(job.config.train, job.reader, step)
    now = Position(step, end_step, whole, job.reader.epochs_done)
    # Older checkpoints have no clock.
    clock_before = saved["clock"] if "clock" in saved else None
    clock = clock_of(job.config.train, now, clock_before)
    check_decay(job.config.lr, clock)
    if clock_before is not None and clock_before["end_step"] != end_step:
        hosts.say(
            f"the run ends at step {end_step:,}, no longer at {clock_before['end_step']:,}; learning "
            f"rates follow the share of it that is done"
        )
    evaluations = validation.Progress(job.config.eval, before)
    return Progress(step, state, meters, plan, evaluations, clock, unwritten)


def _check_catalogue(job: Job, saved: Mapping[str, Any]) -> None:
    """Refuses a catalogue file that is not what it was, unless the log, too, may have more."""
    # Older checkpoints say nothing of it; a catalogue of the log is as new as its files.
    before = saved["catalogue"] if "catalogue" in saved else None
    settings = job.config.loss
    if before is None or job.items is None or settings.catalogue is None:
        return
    if before != job.items.fingerprint and job.config.io.new_files == "refuse":
        raise UserError(
            f"loss.catalogue: the checkpoint was made with other items than {settings.catalogue} has; "
            f"bring that catalogue back, set io.new_files to next_epoch to go on with this one, or give "
            f"another train.output_dir"
        )


@contextlib.contextmanager
def _memory_explained(job: Job) -> Iterator[None]:
    """Says what takes the memory when a device has too little."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        state = job.functions(GrowthPlan(job.config.features, job.config.tables)).abstract
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        raise UserError(
            f"a device ran out of memory: parameters and optimizer state take {held / 1e9:,.1f} GB, "
            f"tables shared by {job.mesh.size} device(s), activations come on top; lower "
            f"features.N.hash_bucket_size or emb_dim, or io.batch_size with "
            f"train.gradient_accumulation_steps, or use more devices"
        ) from error


def _end_step(settings: TrainConfig, reader: Reader, step: int) -> int:
    """The step at which the run ends; the epochs' part of it depends on where the reader stands."""
    ends = [settings.train_steps]
    if settings.train_epoch is not None:
        ends.append(step + reader.steps_until(settings.train_epoch))
    return min(end for end in ends if end is not None)


def _describe(job: Job, progress: Progress, total_steps: int, notes: Sequence[str]) -> None:
    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    params = progress.state.params
    hosts.say(
        f"{job.reader.rows_per_epoch:,} rows, {job.reader.steps_per_epoch:,} steps an epoch; "
        f"{count(params['dense']):,} dense and {count(params['tables']):,} table parameters on "
        f"{job.mesh.size} {job.mesh.devices.flat[0].platform} device(s); "
        f"{total_steps:,} steps into {job.config.train.output_dir}; reading holds about "
        f"{job.reader.held_bytes / 1e6:,.0f} MB of decoded rows"
    )
    if job.reader.packing is not None:
        hosts.say(f"{job.reader.packing:,} users fill a device's batch (io.sequences.rows)")
    for note in (*notes, *job.reader.notes):
        hosts.say(note)
