"""Exported tables have the rows of the checkpoint, whatever the sizes of parts and shards."""

import jax
import numpy as np
import pytest
import small
from evaluations import evaluating

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.embedding import id_keys
from s2s_jax.embedding.tables import NUM_SEGMENTS, rows_of_buckets, table_specs
from s2s_jax.exporting import table_files
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import find
from s2s_jax.runs.checkpoints import store
from s2s_jax.runs.checkpoints.saved_array import SavedArray, keys_of_arrays
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_serve import tensor_file
from s2s_serve.tables import NO_ROW, Table


@pytest.fixture(
    scope="module", params=["buckets", pytest.param("growing on 4 devices", marks=pytest.mark.slow)]
)
def run(request, tmp_path_factory):
    """A run whose arrays are stored in chunks of a few rows."""
    log = tmp_path_factory.mktemp("log")
    small.write_log(log, 40)
    grows = request.param != "buckets"
    config = evaluating(log, tmp_path_factory.mktemp("run") / "run", grows=grows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_CHUNK_BYTES", 2**10)
        assert not train(config, make_mesh(jax.devices()[: 4 if grows else 1]))
    return config


def written(config, directory, shard_bytes):
    """The exported tables, with their specs and all values of the checkpoint."""
    (directory / "tables").mkdir()
    saved = find(config, "newest")
    reader = SavedTables(saved.run_dir, saved.step)
    for name, spec in table_specs(config.features, config.tables, saved.capacities).items():
        made = table_files.write_table(reader, spec, directory, True, shard_bytes)
        yield name, spec, reader, made


@pytest.mark.parametrize(("part_bytes", "shard_bytes"), [(1, 1), (2**12, 2**11), (2**26, 2**30)])
def test_rows_are_those_of_the_checkpoint(run, tmp_path, monkeypatch, part_bytes, shard_bytes):
    monkeypatch.setattr(table_files, "_PART_BYTES", part_bytes)
    for name, spec, reader, made in written(run, tmp_path, shard_bytes):
        state = reader.path / "state"
        chunks = SavedArray(state, ("params", "tables", name))._array.chunk_layout.read_chunk.shape
        assert chunks[0] * 4 * spec.emb_dim <= 2**10
        values_RD = reader.values(spec)
        table = Table(tmp_path, made.entry)
        assert (len(made.entry.shards) > 1) == (shard_bytes < 2**30)
        if spec.grows:
            keys_R2 = np.asarray(reader.id_map(spec).keys_R2)
            (used,) = np.nonzero((keys_R2 != id_keys.EMPTY).any(axis=1))
            words = np.stack(id_keys.ids_of(keys_R2[used, 0], keys_R2[used, 1]), axis=1)
            assert len(used) > 10
        else:
            words = np.arange(spec.buckets)[:, None].astype(np.uint32)
            used = np.asarray(rows_of_buckets(spec, words[:, 0].astype(np.int32)))
        (place,) = (k for k in keys_of_arrays(state) if k[-3:] == ("moments", "tables", name))
        moments_RM = SavedArray(state, place).read(0, spec.rows)
        trained = (moments_RM != 0).any(axis=1).sum()
        assert made.touched_R.sum() == trained > 0
        row_U = table.rows_of(words.view(np.int32))
        assert (row_U != NO_ROW).all()
        np.testing.assert_array_equal(table.read(row_U, row_U >= 0), values_RD[used])
        total = sum(len(tensor_file.read(tmp_path / shard)["rows"]) for shard in made.entry.shards)
        assert total == (len(used) if spec.grows else NUM_SEGMENTS * spec.segment_rows)


def test_parts_are_as_small_as_they_can_be(run, tmp_path, monkeypatch):
    """One row of a bucket table, and one segment of a growing one, which has to be sorted."""
    monkeypatch.setattr(table_files, "_PART_BYTES", 1)
    read, most = SavedArray.read, {}

    def counting(array, begin, stop):
        if len(array.shape) == 2:
            most[array.shape[0]] = max(most.get(array.shape[0], 0), stop - begin)
        return read(array, begin, stop)

    monkeypatch.setattr(SavedArray, "read", counting)
    expected = {}
    for _, spec, _, _ in written(run, tmp_path, 2**30):
        expected[spec.rows] = spec.segment_rows if spec.grows else 1
    assert most == expected


def test_ids_without_a_row_and_no_ids(run, tmp_path):
    for _, spec, _, made in written(run, tmp_path, 2**30):
        table = Table(tmp_path, made.entry)
        none = np.full((3, 2 if spec.grows else 1), -1, np.int32)
        assert (table.rows_of(none) == NO_ROW).all()
        assert not table.read(table.rows_of(none), np.zeros(3, bool)).any()
        if spec.grows:
            unknown = np.array([[123_456_789, 77], [0, -5]], np.int32)
            assert (table.rows_of(unknown) == NO_ROW).all()
