"""Functions of data/ and training/ for tests, which take a configuration instead of its parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.config import Config
from s2s_jax.config.settings import (
    Decoding,
    Items,
    Logs,
    Negatives,
    Reading,
    ShownHistory,
    Split,
)
from s2s_jax.data.batching import batch_fill
from s2s_jax.data.batching.dataset import WHOLE, BatchDataset, HostSlice
from s2s_jax.data.batching.histories import HistoryReader
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.encoding import held_out, indexing
from s2s_jax.data.encoding.held_out import Cut, SplitPart, Targets
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.inspection import first_look as looks
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.training.item_source import ItemSource
from s2s_serve.encoding.arrow import Source
from s2s_serve.encoding.blocks import Block
from s2s_serve.encoding.item_numbers import ItemNumbers


def index(config: Config) -> FileIndex:
    return indexing.index_files(Logs.of(config), Decoding.of(config))


def check_kinds(files: Sequence[OrcFile], kinds: Mapping[str, str], config: Config) -> None:
    indexing.check_kinds(files, kinds, "as trained", config.features)


def decode(batch: pa.RecordBatch, file: Source, first_row: int, config: Config) -> Block:
    return decode_rows(batch, file, first_row, Decoding.of(config))


def reader(
    config: Config,
    batch_rows: int,
    host_slice: HostSlice = WHOLE,
    index: FileIndex | None = None,
) -> Reader:
    return Reader(Reading.of(config), batch_rows, host_slice, index=index)


def dataset(config: Config, batch_rows: int, index: FileIndex) -> BatchDataset:
    return BatchDataset(Reading.of(config), batch_rows, index)


def packing_notes(config: Config, index: FileIndex) -> list[str]:
    return batch_fill.packing_notes(Reading.of(config), index)


def training_cut(config: Config) -> Cut:
    return held_out.training_cut(Split.of(config))


def targets(config: Config, part: SplitPart) -> Targets:
    return held_out.targets(Split.of(config), part)


def collect(config: Config, cut: Cut | None = None) -> Catalogue:
    """Collects the items that are ranked, or the items before `cut`."""
    cut = held_out.catalogue_cut(Split.of(config)) if cut is None else cut
    return catalogues.collect(Items.of(config), Logs.of(config), index(config), cut)


def save(catalogue: Catalogue, path: Path, config: Config) -> None:
    catalogues.save(catalogue, path, Items.of(config), Split.of(config))


def load(path: Path, config: Config) -> Catalogue:
    return catalogues.load(path, Items.of(config), Split.of(config))


def catalogue_made_for(config: Config) -> dict[str, Any]:
    return catalogues._made_for(Items.of(config), Split.of(config))


def item_source(config: Config, mesh: Mesh) -> ItemSource:
    items = Items.of(config)
    catalogue = catalogues.items_of_training(
        items, Split.of(config), Logs.of(config), index(config), config.loss.catalogue
    )
    return ItemSource(items, Negatives.of(config), catalogue, mesh)


def numbers(catalogue: Catalogue, config: Config) -> ItemNumbers:
    return ItemNumbers(catalogue.ids[config.loss.item_feature])


def history_reader(
    config: Config, index: FileIndex, numbers: ItemNumbers, users: int
) -> HistoryReader:
    return HistoryReader(ShownHistory.of(config), Logs.of(config), index, numbers, users)


def first_look(config: Config) -> list[str]:
    return looks.first_look(Assumptions.of(config), index(config))
