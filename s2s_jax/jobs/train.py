"""Trains a configuration, and writes checkpoints and metrics to its run directory.

Training ends at `train.train_steps` or `train.train_epoch`, or when a stop is requested. It continues
from the newest checkpoint of the run directory, if there is one.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.cluster.ending import ending_together
from s2s_jax.cluster.mesh import make_mesh, peak_memory
from s2s_jax.config import Config, TrainConfig
from s2s_jax.config.settings import Reading, Sequences
from s2s_jax.data.batching.batch_fill import packing_notes, with_packing
from s2s_jax.data.batching.dataset import HostSlice
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.first_look import first_look
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.exporting.dry_run import problem_of_export
from s2s_jax.jobs.initial_items import initial_items
from s2s_jax.jobs.item_source import make_item_source
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.tally import below_neighbours
from s2s_jax.runs.checkpoints.compatibility import check_config
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.runs.place import place_of_run
from s2s_jax.runs.run_dir import locked, write_config
from s2s_jax.runs.shared_dir import check_shared
from s2s_jax.runs.writer import Writer
from s2s_jax.signals import Stop
from s2s_jax.storage.lock import StillOurs
from s2s_jax.training.evaluations import Evaluations
from s2s_jax.training.flops import time_at_peak
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.initial_items import with_item_rows
from s2s_jax.training.item_source import ItemSource
from s2s_jax.training.job import Job, Start
from s2s_jax.training.loop import Loop
from s2s_jax.training.meters import Meters
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.schedule import Clock, Position, check_decay, clock_of
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState
from s2s_jax.training.validator import Evaluate
from s2s_serve.storage.address import Place


def train(config: Config, mesh: Mesh | None = None, stop: Stop | None = None) -> bool:
    """Trains until the end of the run, or until a stop is requested, and saves the result.

    Changes no settings of the process; for example, the caller must handle signals.

    Args:
      config: the configuration of the run.
      mesh: the devices to train on; None: all.
      stop: the request to stop, which is checked between steps; None: training is never stopped.

    Returns:
      Whether training was stopped before its end.

    Raises:
      UserError: the log cannot be read, or the run in the directory cannot be continued; all completed
        steps are saved, or only those up to the newest checkpoint if other processes have no such error.
      NotFiniteError: the loss or the gradient is not finite; nothing is saved after the last good step.
      Stopped: a stop was requested before there was anything new to save.
    """
    run_dir = place_of_run(config.train.output_dir)
    stop = Stop() if stop is None else stop
    with ending_together():
        mesh = make_mesh() if mesh is None else mesh
        with (
            locked(run_dir, stop.check) as still_ours,
            contextlib.closing(_checkpoints(run_dir, config.train, still_ours)) as checkpoints,
            # Once more, inside: closing checkpoints waits for the other processes.
            ending_together(),
        ):
            return _run(config, mesh, checkpoints, stop)


def _checkpoints(run_dir: Place, settings: TrainConfig, still_ours: StillOurs) -> Checkpoints:
    check_shared(run_dir)
    return Checkpoints(run_dir, settings.max_to_keep, still_ours=still_ours)


def _run(config: Config, mesh: Mesh, checkpoints: Checkpoints, stop: Stop) -> bool:
    """See `train`."""
    with stop.at_once():
        job, notes = _prepare(config, mesh, checkpoints)
    with contextlib.closing(job.reader), _memory_errors_explained(job):
        with stop.at_once():
            start = _start_or_continue(config, job, stop)
            total_steps = start.clock.end_step
            write_config(place_of_run(config.train.output_dir), config)
            _describe(job, start, total_steps, notes)
            if start.done:
                return False
            _try_export(job, start)
            evaluate = _evaluation(config, mesh)
        with _make_writer(job, start, total_steps) as writer:
            stopped = Loop(job, start, total_steps, writer, stop, evaluate).run()
    if not stopped and start.evaluations.best_line is not None:
        settings = config.eval
        below = below_neighbours(
            start.evaluations.best_line, settings.metric, added=settings.neighbours != 0
        )
        if below is not None:
            hosts.say(below)
    return stopped


def _prepare(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[Job, list[str]]:
    """Reads what a run needs from its directory and its log.

    Returns:
      The job, and notes for the user, a sentence each.
    """
    if checkpoints.newest_step is not None:
        check_config(place_of_run(config.train.output_dir), config)
    reading = Reading.of(config)
    index = index_files(reading.logs, reading.decoding)
    # This comes before long work, and before work in which hosts wait for each other.
    hosts.check_same({"--config": config.to_json(), "io.data_paths": str(index.identity())})
    notes = [*packing_notes(reading, index), *first_look(Assumptions.of(config), index)]
    reading = with_packing(reading, index)
    items = make_item_source(config, reading.logs, index, mesh)
    hosts.check_same({"io.sequences.rows": str(reading.sequences.packing)})
    reader = _make_reader(config.train, reading, index, items, mesh)
    settings = StepSettings.of(config)
    return Job(settings, config.train, config.eval, mesh, reader, checkpoints, items), notes


def _make_reader(
    settings: TrainConfig, reading: Reading, index: FileIndex, items: ItemSource | None, mesh: Mesh
) -> Reader:
    """The reader of this host, which puts batches on the devices of `mesh`."""
    microbatches = settings.gradient_accumulation_steps

    def to_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        arrays = arrays if items is None else items.with_shares(arrays)
        return put_batch(arrays, microbatches, mesh)

    return Reader(
        reading,
        reading.sequences.device_rows * mesh.size * microbatches,
        HostSlice(jax.process_index(), jax.process_count()),
        to_device=to_device,
        index=index,
    )


def _make_writer(
    job: Job, start: Start, total_steps: int
) -> contextlib.AbstractContextManager[Writer | None]:
    """A writer of metrics in the first process, None in the others."""
    if not hosts.is_first():
        return contextlib.nullcontext()
    return Writer(
        place_of_run(job.train.output_dir),
        start.step,
        total_steps,
        job.train.tensorboard,
        start.unwritten,
        job.checkpoints.still_ours,
    )


def _evaluation(config: Config, mesh: Mesh) -> Evaluate | None:
    """Makes the function that evaluates on validation events; None if the run never evaluates.

    The items of the log are read here, before training: if that fails, no step is lost.
    """
    if config.eval.every_steps is None:
        return None
    evaluator = Evaluator(EvaluationSettings.of(config), mesh, config.eval.max_users)

    def evaluate(
        functions: StepFunctions, state: TrainState, in_lockstep: hosts.InLockstep
    ) -> dict[str, float]:
        return evaluator.evaluate(functions, state, "validation", in_lockstep).metrics

    return evaluate


def _start_or_continue(config: Config, job: Job, stop: Stop) -> Start:
    """Continues from the newest complete checkpoint, or starts if there is none."""
    items = 0 if job.items is None else job.items.items
    at_peak = time_at_peak(job.settings, Sequences.of(config), job.mesh.size, items)
    meters = Meters(at_peak, memory=lambda: peak_memory(job.mesh))
    plan = GrowthPlan(config.features, config.tables)
    # The number of steps of a run that had these settings from its start.
    all_steps = _end_step(job.train, job.reader, 0)
    step = job.checkpoints.newest_step
    if step is None:
        return _start(config, job, stop, meters, plan, all_steps)
    return _continue(config, job, step, meters, plan, all_steps)


def _start(
    config: Config, job: Job, stop: Stop, meters: Meters, plan: GrowthPlan, all_steps: int
) -> Start:
    clock = clock_of(job.train, Position(0, all_steps, all_steps, 0.0), None)
    check_decay(job.settings.lr, clock)
    items = initial_items(config)
    if items is not None:
        fitting = slice(plan.make_room(job.settings.items.item.table_name, len(items[0])))
    state = stop.unless_stopped(job.functions(plan).init)
    if state is None:
        # A signal has raised `Stopped` before, a caller has not.
        stop.check()
    assert state is not None, "nothing else stops it"
    if items is not None:
        ids, rows_ID = items[0][fitting], items[1][fitting]
        state = with_item_rows(job.settings, job.mesh, plan, state, ids, rows_ID)
    return Start(0, state, meters, plan, Evaluations(job.eval), clock)


def _continue(
    config: Config, job: Job, step: int, meters: Meters, plan: GrowthPlan, all_steps: int
) -> Start:
    """Restores the checkpoint of `step`, also into `meters`, `plan` and the reader."""
    saved = job.checkpoints.progress(step)
    _check_catalogue(config, job.items, saved)
    plan.set_state(saved["growth"])
    state = job.checkpoints.restore(step, job.functions(plan).abstract)
    plan.grow_at_least(step)
    # Imported weights come without a reading position, so training starts at the beginning of the log.
    if "reader" in saved:
        job.reader.set_state(saved["reader"])
    meters.set_state(saved["meters"])
    hosts.say(f"continuing from the checkpoint of step {step:,}")
    clock = _continued_clock(job, step, saved, all_steps)
    # Lines that could not be written to metrics.jsonl, for example because the disk was full.
    unwritten = saved["unwritten"] if "unwritten" in saved else []
    # Host 0 reads for all, because others may see an older copy of the file.
    written = hosts.from_first(lambda: read_lines(place_of_run(job.train.output_dir)))
    lines = [*written, *unwritten]
    before = [line for line in lines if line["step"] <= step]
    evaluations = Evaluations(job.eval, before)
    return Start(step, state, meters, plan, evaluations, clock, unwritten)


def _continued_clock(job: Job, step: int, saved: Mapping[str, Any], all_steps: int) -> Clock:
    """The clock from `step` on; reports a change of the run's last step."""
    end_step = _end_step(job.train, job.reader, step)
    # Older checkpoints have no clock.
    before = saved["clock"] if "clock" in saved else None
    clock = clock_of(job.train, Position(step, end_step, all_steps, job.reader.epochs_done), before)
    check_decay(job.settings.lr, clock)
    if before is not None and before["end_step"] != end_step:
        hosts.say(
            f"the run now ends at step {end_step:,} instead of {before['end_step']:,}; learning rates "
            f"follow the completed share of the run"
        )
    return clock


def _check_catalogue(config: Config, items: ItemSource | None, saved: Mapping[str, Any]) -> None:
    """Refuses a catalogue file that has changed, unless `io.new_files` allows the log to grow too.

    A catalogue collected from the log needs no check, because the files of the log are checked.
    """
    # Older checkpoints have no catalogue.
    before = saved["catalogue"] if "catalogue" in saved else None
    file = config.loss.catalogue
    if before is None or items is None or file is None:
        return
    if before != items.fingerprint and config.io.new_files == "refuse":
        raise UserError(
            f"loss.catalogue: the checkpoint was made with other items than {file} has; "
            f"restore that catalogue, set io.new_files to next_epoch to continue with this one, or give "
            f"another train.output_dir"
        )


@contextlib.contextmanager
def _memory_errors_explained(job: Job) -> Iterator[None]:
    """Explains what uses the memory when a device runs out of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        plan = GrowthPlan(job.settings.items.features, job.settings.tables)
        state = job.functions(plan).abstract
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        raise UserError(
            f"a device ran out of memory: parameters and optimizer state take {held / 1e9:,.1f} GB "
            f"(tables are shared by {job.mesh.size} device(s)), and activations need more; lower "
            f"features.N.hash_bucket_size or emb_dim, or io.batch_size with "
            f"train.gradient_accumulation_steps, or use more devices"
        ) from error


def _end_step(settings: TrainConfig, reader: Reader, step: int) -> int:
    """The step at which the run ends, if the reader is at its position after `step`."""
    ends = [settings.train_steps]
    if settings.train_epoch is not None:
        ends.append(step + reader.steps_until(settings.train_epoch))
    return min(end for end in ends if end is not None)


def _try_export(job: Job, start: Start) -> None:
    """Says at the start of a run if it could not be exported, while it can still be changed."""
    if start.step == 0 and hosts.is_first():
        problem = problem_of_export(job.settings, start.state.params["dense"])
        if problem is not None:
            hosts.say(f"note: s2s export will refuse this run: {problem}")


def _describe(job: Job, start: Start, total_steps: int, notes: Sequence[str]) -> None:
    """Prints the size of the run, and notes."""

    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    params = start.state.params
    hosts.say(
        f"{job.reader.rows_per_epoch:,} rows, {job.reader.steps_per_epoch:,} steps an epoch; "
        f"{count(params['dense']):,} dense and {count(params['tables']):,} table parameters on "
        f"{job.mesh.size} {job.mesh.devices.flat[0].platform} device(s); "
        f"{total_steps:,} steps into {job.train.output_dir}; reading keeps about "
        f"{job.reader.held_bytes / 1e6:,.0f} MB of decoded rows in memory"
    )
    if job.reader.packing is not None:
        hosts.say(f"{job.reader.packing:,} users fill a device's batch (io.sequences.rows)")
    for note in (*notes, *job.reader.notes):
        hosts.say(note)
