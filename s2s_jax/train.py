"""The main job: `python -m s2s_jax.train --config configs/base.py [--section.key value …]`.

Trains until `train.train_steps` or `train.train_epoch`, or until told to stop; continues from the
newest checkpoint of the run directory. Exit codes: 0 done, 2 a mistake to mend, 3 loss or gradient not
finite, 75 stopped by SIGTERM or SIGINT and saved.
"""

import argparse
import contextlib
import math
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.config import Config, FeatureConfig, load, load_file, print_help
from s2s_jax.data.pipeline import Reader, Share
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, NotFiniteError, UserError, run_door
from s2s_jax.serving.evaluation import Evaluator
from s2s_jax.training import growth, hosts, validation
from s2s_jax.training.batches import put_batch
from s2s_jax.training.checkpoint import Checkpoints, locked
from s2s_jax.training.flops import peak_flops, step_flops
from s2s_jax.training.growth import Evictions, GrowthPlan
from s2s_jax.training.mesh import make_mesh
from s2s_jax.training.metrics import Meters, SkipLog, Writer, print_summary, read_lines
from s2s_jax.training.negatives import ItemSource
from s2s_jax.training.step import StepFunctions, TrainState, make_step_functions


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError, NotFiniteError: see `errors.run_door`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m s2s_jax.train", add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config")
    parser.add_argument("-h", "--help", action="store_true")
    try:
        arguments, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; give --config configs/base.py") from error
    if arguments.help:
        example = FeatureConfig(name="item_id", hash_bucket_size=1_000_000)
        default = Config(features=(example,))
        config = load_file(arguments.config) if arguments.config else default
        print_help(config, f"{parser.prog} --config {arguments.config or 'FILE'}")
        return EXIT_DONE
    if arguments.config is None:
        raise UserError("--config: expected a config file such as configs/base.py, found none")
    config = load(arguments.config, overrides)
    hosts.join()
    code = train(config)
    hosts.leave()
    return code


class Job(NamedTuple):
    """The parts of a run that stay.

    Attributes:
      config: the configuration.
      mesh: the devices.
      reader: batches.
      checkpoints: of the run directory.
      items: of the log, where the loss needs them.
    """

    config: Config
    mesh: Mesh
    reader: Reader
    checkpoints: Checkpoints
    items: ItemSource | None

    def functions(self, plan: GrowthPlan) -> StepFunctions:
        """Pure functions over the devices, for tables as large as they are now."""
        return make_step_functions(self.config, self.mesh, plan.capacities_now())


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      step: optimizer steps done.
      state: the devices' part.
      meters: running means.
      plan: of the growth of tables.
      evaluations: so far.
    """

    step: int
    state: TrainState
    meters: Meters
    plan: GrowthPlan
    evaluations: validation.Progress


def train(config: Config, mesh: Mesh | None = None) -> int:
    """Trains `config` on `mesh`, by default all devices, and returns the exit code.

    Raises:
      UserError: bad data or a directory that cannot be continued; what was trained is saved.
      NotFiniteError: loss or gradient not finite; nothing is saved after the last good step.
    """
    mesh = make_mesh() if mesh is None else mesh
    run_dir = Path(config.train.output_dir)
    microbatches = config.train.gradient_accumulation_steps
    with (
        locked(run_dir),
        contextlib.closing(Checkpoints(config)) as checkpoints,
        StopSignals() as stop,
    ):
        checkpoints.check_config()
        items = None
        if config.loss.negatives != "in_batch" or config.loss.log_q:
            items = ItemSource(config, mesh)

        def to_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
            arrays = arrays if items is None else items.with_shares(arrays)
            return put_batch(arrays, microbatches, mesh, stop.requested is not None)

        reader = Reader(
            config,
            config.io.device_rows * mesh.size * microbatches,
            Share(jax.process_index(), jax.process_count()),
            to_device=to_device,
        )
        hosts.check_same({"--config": config.to_json(), "io.data_paths": reader.identity})
        job = Job(config, mesh, reader, checkpoints, items)
        with contextlib.closing(reader), _memory_explained(job):
            progress = _start_or_continue(job)
            total_steps = _total_steps(job, progress)
            checkpoints.write_config()
            _describe(job, progress, total_steps)
            if progress.step < total_steps:
                with _make_writer(config, progress, total_steps) as writer, hosts.ending_together():
                    _run(job, progress, total_steps, writer, stop)
    if stop.now:
        hosts.say(f"stopped by {stop.requested}; start the same command again to continue")
        return EXIT_STOPPED
    if hosts.is_first():
        print_summary(run_dir)
    return EXIT_DONE


def _make_writer(
    config: Config, progress: Progress, total_steps: int
) -> contextlib.AbstractContextManager[Writer | None]:
    """A writer in the first process, None in the others."""
    if not hosts.is_first():
        return contextlib.nullcontext()
    settings = config.train
    return Writer(Path(settings.output_dir), progress.step, total_steps, settings.tensorboard)


def _run(
    job: Job, progress: Progress, total_steps: int, writer: Writer | None, stop: "StopSignals"
) -> None:
    """The loop. Step n is dispatched before the metrics of step n - 1 are read."""
    step, state, meters, plan, evaluations = progress
    saved_step = step
    evictions = Evictions(job.config, job.mesh)
    settings = job.config.train
    profile = _Profile(job.config)
    skips = SkipLog(Path(settings.output_dir), job.reader.skipped_files, host=jax.process_index())
    pending: tuple[int, Any, float] | None = None
    compiled = functions = None
    evaluator = None

    def read_pending() -> None:
        nonlocal pending
        if pending is None:
            return
        at, metrics, waited = pending
        pending = None
        values = jax.device_get(metrics)
        _check_finite(at, values, job.checkpoints)
        stop.hear(bool(values["stop"]))
        plan.hear(at, values)
        meters.add(values, waited)
        if writer is not None:
            writer.advance(at)
        if at % settings.log_steps == 0:
            line = meters.take_line(at)
            if writer is not None:
                writer.write(line)

    def evaluate() -> float:
        """Writes an evaluation of this step, and returns what the best is chosen by."""
        nonlocal evaluator
        assert functions is not None, "a step came before"
        read_pending()
        begun = time.perf_counter()
        with jax.transfer_guard("allow"):
            if evaluator is None:
                evaluator = Evaluator(job.config, job.mesh, job.config.eval.max_users)
            found = evaluator.evaluate(functions, state, "validation").metrics
        line = {"step": step} | found
        evaluations.hear(line)
        name = f"eval/{job.config.eval.metric}"
        if writer is not None:
            writer.write(line)
        hosts.say(
            f"step {step}: {name} {line[name]:.4f} of {line['eval/users']:,.0f} users, best at step "
            f"{evaluations.best_step}, {time.perf_counter() - begun:.1f} s"
        )
        meters.start_rates()
        return line[name]

    def save(metric: float | None = None) -> None:
        nonlocal saved_step
        read_pending()
        if step > saved_step:
            reached = {
                "reader": job.reader.get_state(),
                "meters": meters.get_state(),
                "growth": plan.get_state(),
            }
            job.checkpoints.save(step, state, reached, metric)
            saved_step = step

    # Hidden copies between host and device would be slow, so they fail instead.
    with jax.transfer_guard("disallow"):
        while step < total_steps and not stop.now and not evaluations.exhausted:
            if plan.full is not None:
                save()
                job.checkpoints.wait()
                raise UserError(plan.full)
            for name in plan.take(step + 1):
                hosts.say(f"step {step}: table {name} grows")
                with jax.transfer_guard("allow"):
                    state = growth.doubled(state, name, job.mesh)
                compiled = None
            state = evictions.before(step + 1, state)
            asked = time.perf_counter()
            try:
                batch = next(job.reader)
            except UserError:
                # Nothing trained is lost; the position is that of before the batch that failed. Of
                # several processes the others know nothing of it and could not save with this one.
                if jax.process_count() == 1:
                    save()
                raise
            waited = time.perf_counter() - asked
            skips.add(batch.skipped)
            arrays = batch.arrays
            if job.items is not None:
                arrays = arrays | job.items.draw(step + 1)
            if compiled is None:
                # Steps before are not part of what is timed anew.
                read_pending()
                functions = job.functions(plan)
                compiled = functions.train_step.lower(state, arrays).compile()
                # Rates leave out compilation and the first reading.
                meters.start_rates()
                waited = 0.0
            profile.before(step + 1)
            state, metrics = compiled(state, arrays)
            read_pending()
            step += 1
            pending = (step, metrics, waited)
            profile.after(step, state)
            if evaluations.due(step):
                save(evaluate())
            elif step % settings.save_steps == 0 or step == total_steps or stop.now:
                save()
    save()
    if evaluations.exhausted:
        hosts.say(
            f"stopped after step {step}: {job.config.eval.patience} evaluations in a row were no better "
            f"than that of step {evaluations.best_step}"
        )
    job.checkpoints.wait()


def _check_finite(step: int, values: dict[str, Any], checkpoints: Checkpoints) -> None:
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    checkpoints.wait()
    raise NotFiniteError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, expected finite "
        f"numbers; lower lr.dense_lr and lr.sparse_lr or set lr.clip_norm, and start again: the newest "
        f"checkpoint is {checkpoints.newest_step or 'none'}"
    )


def _start_or_continue(job: Job) -> Progress:
    """Continues from the newest whole checkpoint if there is one, else starts."""
    peak = peak_flops(job.config)
    at_peak = None if peak is None else step_flops(job.config, job.mesh.size) / peak
    meters, plan = Meters(at_peak), GrowthPlan(job.config)
    step = job.checkpoints.newest_step
    if step is None:
        nothing = validation.Progress(job.config.eval)
        return Progress(0, job.functions(plan).init(), meters, plan, nothing)
    saved = job.checkpoints.progress(step)
    plan.set_state(saved["growth"])
    state = job.checkpoints.restore(step, job.functions(plan).abstract)
    plan.grow_at_least(step)
    job.reader.set_state(saved["reader"])
    meters.set_state(saved["meters"])
    hosts.say(f"continuing from the checkpoint of step {step:,}")
    before = [x for x in read_lines(Path(job.config.train.output_dir)) if x["step"] <= step]
    return Progress(step, state, meters, plan, validation.Progress(job.config.eval, before))


@contextlib.contextmanager
def _memory_explained(job: Job) -> Iterator[None]:
    """Says what takes the memory when a device has too little."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        state = job.functions(GrowthPlan(job.config)).abstract
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        raise UserError(
            f"a device ran out of memory: parameters and optimizer state take {held / 1e9:,.1f} GB, "
            f"tables shared by {job.mesh.size} device(s), activations come on top; lower "
            f"features.N.hash_bucket_size or emb_dim, or io.batch_size with "
            f"train.gradient_accumulation_steps, or use more devices"
        ) from error


def _total_steps(job: Job, progress: Progress) -> int:
    """Steps at which the run ends; the epochs' part of it depends on where the reader stands."""
    settings = job.config.train
    ends = [settings.train_steps]
    if settings.train_epoch is not None:
        ends.append(progress.step + job.reader.steps_until(settings.train_epoch))
    return min(end for end in ends if end is not None)


def _describe(job: Job, progress: Progress, total_steps: int) -> None:
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
    for note in job.reader.notes:
        hosts.say(note)


class StopSignals:
    """Notes SIGTERM and SIGINT for the loop to see; a second one ends the process at once.

    Several processes must stop after the same step. So each sends with its batches whether it was told
    to, and all hear of it in the metrics of the same step.

    Attributes:
      requested: name of the signal that came, None if none did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def now(self) -> bool:
        """Whether to take no further step."""
        alone = jax.process_count() == 1
        return self._heard or (alone and self.requested is not None)

    def hear(self, told: bool) -> None:
        """Takes in whether any process was told to stop, as a step's metrics say."""
        self._heard = self._heard or told
        if told and self.requested is None:
            self.requested = "a signal to another host"

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


class _Profile:
    """Writes a trace of the steps `train.profile_steps` to `profile/` in the run directory."""

    def __init__(self, config: Config):
        self._steps = config.train.profile_steps
        self._dir = str(Path(config.train.output_dir) / "profile")

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._dir)

    def after(self, step: int, state: TrainState) -> None:
        if self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


if __name__ == "__main__":
    run_door(main)
