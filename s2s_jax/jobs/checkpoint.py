"""Converts checkpoints to and from weights of the RecIS example in PyTorch: see `docs/recis.md`.

Shapes: R rows, V buckets and D width of a table, M = 2 D.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, load_json
from s2s_jax.embedding.tables import TableSpec, table_specs
from s2s_jax.errors import UserError
from s2s_jax.pytorch import example, files
from s2s_jax.pytorch.example import Tensor
from s2s_jax.ranking.restored import find
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.place import place_of_run
from s2s_jax.runs.run_dir import config_path, locked, write_config
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.meters import Meters
from s2s_jax.training.step.functions import StepFunctions, make_step_functions
from s2s_jax.training.step.optimizer import table_moments, with_table_moments
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState
from s2s_serve.storage.address import Place

# The second moments of imported rows. Rows whose moments are zero count as never trained. This is much
# less than the square of `lr.eps`, and so small that adding the square of a gradient rounds it away.
_SECOND_MOMENT = 1e-30


class Converted(NamedTuple):
    """A summary of what was converted.

    Attributes:
      step: the step of the checkpoint.
      tensors: the number of tensors.
      parameters: the number of their values.
    """

    step: int
    tensors: int
    parameters: int


def to_torch(run_dir: Place, output: Place, checkpoint: str = "best") -> Converted:
    """Writes the weights of a checkpoint as tensors of the RecIS example.

    Holds one table at a time in memory (all of them for a `.pt` file).

    Args:
      run_dir: the directory of the run.
      output: the file, `.safetensors` or `.pt`; it is replaced if it exists.
      checkpoint: the checkpoint: best (by `eval.metric`), newest, or a step.

    Raises:
      UserError: the checkpoint cannot be read, the example cannot express the model, or the file cannot
        be written.
    """
    files.check_kind("--output", output)
    config = load_json(config_path(run_dir))
    settings = StepSettings.of(config)
    remedy = "s2s export writes the weights of any model, in its own format"
    example.refuse_what_it_lacks(settings, remedy)
    saved = find(config, checkpoint, run_dir)
    reader = SavedTables(run_dir, saved.step)
    mesh = make_mesh(jax.local_devices()[:1])
    dense = reader.dense(make_step_functions(settings, mesh).abstract.params["dense"])
    of_dense, of_tables = example.dense_tensors(dense), example.table_tensors(settings)
    specs = table_specs(config.features, config.tables)

    def values(name: str, tensor: Tensor) -> Iterable[np.ndarray]:
        if name in of_dense:
            yield example.of_dense(tensor, dense)
        else:
            (table,) = tensor.place
            yield from example.of_table(specs[table], reader.values(specs[table]))

    tensors = of_dense | of_tables
    files.write(
        "--output",
        output,
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: values(name, tensor) for name, tensor in tensors.items()},
    )
    return _converted(saved.step, tensors)


def from_torch(file: Place, config: Config, mesh: Mesh | None = None) -> Converted:
    """Makes a run in `train.output_dir`, with a checkpoint of step 0, from tensors of the example.

    The optimizer is new. All rows of tables count as trained. The log is not read.

    Args:
      file: the file, `.safetensors` or `.pt`.
      config: the configuration of the run.
      mesh: the devices; None: all. The run can be continued on others.

    Raises:
      UserError: the file cannot be read or does not fit the configuration, the example cannot express
        the model, or the directory has checkpoints or cannot be written.
    """
    files.check_kind("FILE", file)
    settings = StepSettings.of(config)
    example.refuse_what_it_lacks(settings, "set it so in --config")
    functions = make_step_functions(settings, make_mesh() if mesh is None else mesh)
    dense = example.dense_tensors(functions.abstract.params["dense"])
    tensors = dense | example.table_tensors(settings)
    with files.on_disk("FILE", file) as here:
        found = files.read("FILE", here)
        example.check(str(file), found, tensors)
        _make_run(config, lambda: _state(functions, settings, dense, found))
    return _converted(0, tensors)


def _make_run(config: Config, make_state: Callable[[], TrainState]) -> None:
    """Makes a run with a checkpoint of step 0."""
    run_dir = place_of_run(config.train.output_dir)
    with (
        locked(run_dir),
        contextlib.closing(Checkpoints(run_dir, config.train.max_to_keep)) as checkpoints,
    ):
        if checkpoints.newest_step is not None:
            raise UserError(
                f"--output: expected a directory without checkpoints, found one of step "
                f"{checkpoints.newest_step:,} in {run_dir}; give another directory"
            )
        state = make_state()
        write_config(run_dir, config)
        # Without a reading position: training starts at the beginning of the log.
        progress: dict[str, Any] = {
            "meters": Meters().get_state(),
            "growth": GrowthPlan(config.features, config.tables).get_state(),
        }
        checkpoints.save(0, state, progress)
        checkpoints.wait()


def _state(
    functions: StepFunctions,
    settings: StepSettings,
    dense: Mapping[str, Tensor],
    found: Mapping[str, np.ndarray],
) -> TrainState:
    """Return the state before the first step, with other weights."""
    state, shapes = functions.init(), functions.abstract.params
    weights = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        example.to_dense(dense, found),
        shapes["dense"],
    )
    tables, moments = dict(state.params["tables"]), dict(table_moments(state.opt_state))
    for name, spec in table_specs(settings.items.features, settings.tables).items():
        values_VD = found[example.table_tensor(name)]
        tables[name] = _table(spec, values_VD, shapes["tables"][name])
        moments[name] = _as_trained(moments[name], spec.emb_dim)
    params = state.params | {"dense": weights, "tables": tables}
    return state._replace(params=params, opt_state=with_table_moments(state.opt_state, moments))


def _table(spec: TableSpec, values_VD: np.ndarray, like: jax.Array) -> jax.Array:
    """Return a table on its devices, from the vectors of its buckets."""

    def rows(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "tables are sharded by rows"
        begin, stop, _ = index[0].indices(spec.rows)
        return example.to_table(spec, values_VD, begin, stop)

    return jax.make_array_from_callback(like.shape, like.sharding, rows)


def _as_trained(moments_RM: jax.Array, width: int) -> jax.Array:
    """Return moments of a new optimizer, with which rows count as trained."""
    make = jax.jit(
        lambda x_RM: x_RM.at[:, width:].set(_SECOND_MOMENT),
        donate_argnums=0,
        out_shardings=moments_RM.sharding,
    )
    return make(moments_RM)


def _converted(step: int, tensors: Mapping[str, Tensor]) -> Converted:
    parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    return Converted(step, len(tensors), parameters)
