"""Exports a checkpoint for serving without JAX: see `docs/reference/export_format.md`.

Tables are read from the checkpoint part by part: 64 MB of a table, or 1/256 of a growing table if
that is more.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import scipy.sparse

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, Split
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex, may_skip
from s2s_jax.embedding.tables import table_specs
from s2s_jax.errors import UserError
from s2s_jax.exporting import index_file, item_columns, item_files, version_dir
from s2s_jax.exporting.dense_file import NAME as DENSE
from s2s_jax.exporting.dense_file import write_dense
from s2s_jax.exporting.neighbour_file import write_neighbours
from s2s_jax.exporting.table_files import write_table
from s2s_jax.exporting.tower import Tower
from s2s_jax.exporting.tower_files import check_installed, write_tower
from s2s_jax.ranking.neighbour_bias import make_scorer
from s2s_jax.ranking.restored import Saved, find
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.params import Params
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.version import __version__
from s2s_serve import items as served
from s2s_serve import manifest as manifests
from s2s_serve import neighbours as served_neighbours
from s2s_serve.encoder import Encoder
from s2s_serve.encoding import features
from s2s_serve.encoding.item_numbers import ItemNumbers
from s2s_serve.manifest import IndexEntry, Manifest, TableEntry, TimesEntry
from s2s_serve.search import index as indexes
from s2s_serve.storage.address import Place
from s2s_serve.tables import Table
from s2s_serve.tower import Tower as ServedTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of `export`.

    Attributes:
      output: the directory of the export.
      checkpoint: the checkpoint to export: best (by `eval.metric`), newest, or a step.
      catalogue: the file of `s2s catalogue` with the items; None: the items of `io.data_paths`.
      titles: a file with titles of items, see `read_titles`; None: none.
      item_columns: a Parquet file with more columns of items; None: none.
      index: whether an index is built: yes, no, or auto: if there are many items.
    """

    output: Place
    checkpoint: str = "best"
    catalogue: str | None = None
    titles: Place | None = None
    item_columns: Place | None = None
    index: index_file.Wanted = "auto"


class Exported(NamedTuple):
    """A summary of what was exported.

    Attributes:
      directory: the directory of the version.
      manifest: its manifest.
      bytes: the size of all files.
    """

    directory: Place
    manifest: Manifest
    bytes: int


def export(config: Config, request: Request) -> Exported:
    """Exports a checkpoint as a new version in `request.output`.

    Args:
      config: the configuration of the run in `train.output_dir`.
      request: the settings of this job.

    Raises:
      UserError: the checkpoint, the log or a file cannot be read or written, or the extra `export` is
        not installed.
    """
    # Mistakes are found before the log is read and tables are written, which may take hours.
    check_installed()
    if request.index == "yes":
        indexes.check_installed()
    saved = find(config, request.checkpoint)
    config = saved.with_weight(config)
    files = item_columns.read_files(request.titles, request.item_columns)
    version_dir.check_output(request.output)
    items = _items(config, request.catalogue, files)
    if not saved.kinds and items.log is not None:
        # Imported weights do not say which kinds of ids they were trained with, but their log does.
        kinds = features.entry_kinds(items.log.files[0], config.decoded_features)
        saved = saved._replace(kinds=kinds)
    with_index = index_file.is_wanted(request.index, items.size)
    if with_index:
        indexes.check_installed()
    with version_dir.new_version(request.output) as new:
        path = new.path
        (path / "tables").mkdir()
        written = _write_tables(config, saved, path)
        _write_items(config, path, items, written)
        index = None
        if with_index:
            index = index_file.write_index(
                path, _some_users(config, saved, path, items, written), request.index
            )
        if items.neighbours is not None:
            write_neighbours(path / served_neighbours.NAME, items.neighbours)
        manifest = _manifest(config, saved, new.number, path, written.entries, items, index)
        final, manifest = version_dir.finish(request.output, new, manifest)
    size = sum(entry.bytes for entry in manifest.files.values())
    return Exported(final, manifest, size)


class _ExportedItems(NamedTuple):
    """The items of an export.

    Attributes:
      catalogue: the items.
      count_I: int64, the number of their events in training.
      columns: other columns.
      neighbours: weights of counted neighbours; None if the ranking has none.
      log: the index of the log of training; None if it was not read.
    """

    catalogue: Catalogue
    count_I: np.ndarray
    columns: Mapping[str, pa.Array]
    neighbours: scipy.sparse.csr_matrix | None
    log: FileIndex | None

    @property
    def size(self) -> int:
        """The number of items."""
        return len(self.catalogue.item)


def _items(config: Config, file: str | None, more: item_columns.Files) -> _ExportedItems:
    """Reads the items, from a file or from the log of training."""
    items, split, logs = Items.of(config), Split.of(config), Logs.of(config)
    weight = Ranking.of(config).weight
    catalogue = None if file is None else catalogues.load(file, items, split)
    log = index_files(logs, Decoding.of(config)) if catalogue is None or weight else None
    if catalogue is not None:
        count_I = catalogue.count_I
    else:
        assert log is not None, "it has the items"
        catalogue, count_I = catalogues.collect_for_evaluation(items, logs, log, split)
    item_columns.check_ids(catalogue.item, items.item.column_name)
    columns = item_columns.columns_of(more, catalogue.item)
    neighbours = None
    if weight:
        assert log is not None, "neighbours are counted in it"
        neighbours = make_scorer(items, split, logs, log, catalogue).matrix
    return _ExportedItems(catalogue, count_I, columns, neighbours, log)


class _WrittenTables(NamedTuple):
    """The tables that were written, and what depends on them.

    Attributes:
      entries: their entries in the manifest.
      touched: for the tables that say whether items were trained: whether a row was.
      tower: the dense part of the model.
    """

    entries: dict[str, TableEntry]
    touched: dict[str, np.ndarray]
    tower: Tower


def _write_tables(config: Config, saved: Saved, path: Path) -> _WrittenTables:
    """Writes the tower, its parameters and the tables."""
    settings = StepSettings.of(config)
    reader = SavedTables(saved.run_dir, saved.step)
    mesh = make_mesh(jax.local_devices()[:1])
    abstract = make_step_functions(settings, mesh, saved.capacities).abstract
    params: Params = {"dense": reader.dense(abstract.params["dense"]), "tables": {}}
    tower = Tower.of(settings, params)
    write_tower(tower, path)
    write_dense(tower.dense, path / DENSE)
    specs = table_specs(config.features, config.tables, saved.capacities)
    own = {feature.table_name for feature in item_files.own_features(settings.items)}
    entries, touched = {}, {}
    for name, spec in specs.items():
        entries[name], rows_R = write_table(reader, spec, path, name in own)
        if rows_R is not None:
            touched[name] = rows_R
    return _WrittenTables(entries, touched, tower)


def _write_items(
    config: Config, path: Path, items: _ExportedItems, written: _WrittenTables
) -> None:
    """Writes the items and their vectors, which are computed from the tables that were written."""
    of_items = Items.of(config)
    tables = {name: Table(path, entry) for name, entry in written.entries.items()}
    item_files.write_vectors(
        path / served.VECTORS,
        items.catalogue,
        of_items,
        tables,
        jax.jit(written.tower.item_vectors),
        config.model.hidden_size,
    )
    trained_I = item_files.items_trained(items.catalogue, of_items, tables, written.touched)
    if config.eval.untrained == "drop" and not trained_I.any():
        raise UserError(
            f"eval.untrained: expected keep or last, because none of the {len(trained_I):,} items of "
            f"the catalogue was ever trained, found drop; or give the catalogue of the training log"
        )
    item_files.write_items(
        path / served.NAME,
        items.catalogue,
        of_items.item,
        items.count_I,
        trained_I,
        items.columns,
    )


def _some_users(
    config: Config, saved: Saved, path: Path, items: _ExportedItems, written: _WrittenTables
) -> np.ndarray:
    """Return f32 `[U, E]`: the vectors of some users of the log; none if no stripe was read."""
    width = config.model.hidden_size
    if items.log is None:
        return np.zeros((0, width), np.float32)
    of_items = Items.of(config)
    tables = {name: Table(path, entry) for name, entry in written.entries.items()}
    encoder = Encoder(
        tables,
        ServedTower(path, width, threads=None),
        config.decoded_features,
        saved.kinds,
        of_items.item,
        config.shown_len,
        width,
    )
    numbers = ItemNumbers(items.catalogue.ids[of_items.item.name])
    logs, columns = Logs.of(config), features.column_names(config.decoded_features)
    for file, number, _ in items.log.stripes:
        try:
            rows = orc.read_stripe(file, number, columns)
            table = pa.Table.from_batches([rows.slice(0, index_file.few_rows(rows.num_rows))])
            encoded = encoder.encode(table, numbers)
        except UserError as error:
            if not may_skip(error, logs):
                raise
            # It was said when the items were collected.
            continue
        return encoded.users_NE[encoded.events_N > 0]
    return np.zeros((0, width), np.float32)


def _manifest(
    config: Config,
    saved: Saved,
    number: int,
    path: Path,
    tables: dict[str, TableEntry],
    items: _ExportedItems,
    index: IndexEntry | None,
) -> Manifest:
    ranking = Ranking.of(config)
    return Manifest(
        format=manifests.FORMAT,
        version=number,
        created=version_dir.now(),
        made_by=f"s2s_jax {__version__}",
        step=saved.step,
        evaluation=_evaluation(saved),
        features=config.features,
        kinds=saved.kinds,
        item_feature=config.loss.item_feature,
        target_features=config.target_features,
        seq_len=config.model.seq_len,
        shown_len=config.shown_len,
        width=config.model.hidden_size,
        similarity=config.loss.similarity,
        temperature=config.loss.temperature,
        items=items.size,
        filter_seen=ranking.filter_seen,
        untrained=ranking.untrained,
        neighbours=ranking.weight,
        tables=tables,
        index=index,
        times=_times(config),
        files=version_dir.file_entries(path),
    )


def _times(config: Config) -> TimesEntry | None:
    gaps = config.model.time_bias
    return None if gaps is None else TimesEntry(column=gaps.column, time_unit=gaps.time_unit)


def _evaluation(saved: Saved) -> dict[str, float]:
    """Return the figures of the evaluation at the step of the checkpoint; empty if there was none."""
    figures: dict[str, float] = {}
    for line in read_lines(saved.run_dir):
        if line["step"] == saved.step:
            figures |= {name: x for name, x in line.items() if name.startswith("eval/")}
    return figures
