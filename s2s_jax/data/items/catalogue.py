"""The items of a log: `s2s catalogue --config FILE --output catalogue.parquet`.

An item is an encoded id of `loss.item_feature`: a bucket, or a 64-bit id. The catalogue also has its id
in the log, the number of its events, and the ids of its target features (`loss.target_features`): the
most frequent combination of these, for ties the first in the log. (If an item has very many
combinations, rare ones are forgotten early, so a combination that becomes frequent late may be missed.)
All events count, including those that truncation drops in training, except held-out events
(`eval.split`).

The file is Parquet, with columns `item`, `count` and, for each feature, `ids/<name>`: lists of
`bag_size * id_words` int32 numbers, padded with -1. Items are sorted by descending count, then encoded
id.

Shapes: I items, K ids of a bag, W words of an id.
"""

import contextlib
import hashlib
import json
import os
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from s2s_jax.config import Config, FeatureConfig, identity, refuse_addresses
from s2s_jax.config.identity import Fingerprint
from s2s_jax.config.old.format import split_of_catalogue
from s2s_jax.config.settings import Items, Logs, Split
from s2s_jax.data.encoding.cache import DECODING_VERSION
from s2s_jax.data.encoding.held_out import Cut, catalogue_cut, training_cut
from s2s_jax.data.items.item_counts import code_words, count_items
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.writing import replacing
from s2s_serve.encoding import features
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath, place_of

_METADATA = b"s2s_jax.catalogue"
_REMEDY = "make it again with s2s catalogue"


class Catalogue(NamedTuple):
    """Distinct items, sorted by descending count, then by encoded id (as signed numbers).

    Attributes:
      item: ids in the log, as int64 or large_string (or as a type of times or bytes).
      count_I: int64, number of events of each item.
      ids: encoded ids, as in training, for each of `loss.target_features` and for `loss.item_feature`;
        `NO_ID` for missing ids: int32 `[I, K]`, or `[I, K, 2]` if the feature's table grows.
      collisions: number of ids in the log that are not separate items, because they are encoded like an
        earlier one.
      shared_events: number of events of items that stand for several ids; None if the catalogue was read
        from a file of an older version.
    """

    item: pa.Array
    count_I: np.ndarray
    ids: dict[str, np.ndarray]
    collisions: int
    shared_events: int | None = None

    def sharing(self) -> str | None:
        """Return a sentence about ids of the log that share a table row; None if no ids do."""
        if not self.collisions:
            return None
        text = f"{self.collisions:,} more ids of the log share a row of the table with an item"
        if self.shared_events is not None:
            share = self.shared_events / self.count_I.sum()
            text += f" and count as that one ({share:.1%} of the events are of such items)"
        return text

    def fingerprint(self) -> str:
        """Return a fingerprint of items, counts and ids; it does not depend on where they come from."""
        sink = pa.BufferOutputStream()
        batch = pa.record_batch({"item": self.item, "count": pa.array(self.count_I)})
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest = hashlib.sha256(sink.getvalue())
        for name in sorted(self.ids):
            digest.update(f"{name} {self.ids[name].shape}".encode())
            digest.update(np.ascontiguousarray(self.ids[name]).tobytes())
        return digest.hexdigest()[:16]


def collect(items: Items, logs: Logs, index: FileIndex, cut: Cut) -> Catalogue:
    """Collects the items of a log, with one stripe per thread in memory.

    Args:
      items: what an item is, and what it shows.
      logs: how the files are read.
      index: the index of the files.
      cut: events before this cut count.

    Raises:
      UserError: an event may have several items, or its item is not an id; see also `count_items`.
    """
    return _collect(items, logs, index, cut, cut)[0]


def items_of_training(
    items: Items, split: Split, logs: Logs, index: FileIndex, path: str | None
) -> Catalogue:
    """Collects the items that training sees, or reads them from a saved catalogue.

    Args:
      items: what an item is, and what it shows.
      split: which events are held out.
      logs: how the files are read.
      index: the index of the files.
      path: a saved catalogue to read instead of the logs; None: the logs are read.

    Raises:
      UserError: see `collect` and `load`.
    """
    if path is not None:
        return load(path, items, split)
    return collect(items, logs, index, training_cut(split))


def collect_for_evaluation(
    items: Items, logs: Logs, index: FileIndex, split: Split
) -> tuple[Catalogue, np.ndarray]:
    """Collects the items to rank and how often training sees them, in a single pass over the log.

    Args:
      items: what an item is, and what it shows.
      logs: how the files are read.
      index: the index of the files.
      split: which events are held out.

    Returns:
      The result of `collect`, and int64 `[I]`: the number of events of each item without held-out ones.

    Raises:
      UserError: see `collect`.
    """
    return _collect(items, logs, index, catalogue_cut(split), training_cut(split))


def _collect(
    items: Items, logs: Logs, index: FileIndex, cut: Cut, part: Cut
) -> tuple[Catalogue, np.ndarray]:
    check_item_feature(items)
    counts = count_items(items, logs, index, cut, part)
    order_I = np.lexsort((counts.code_I, -counts.count_I))
    columns = features.id_columns(items.item_side)
    item = items.item
    at = columns[item.name].start
    ids_IC = np.insert(
        counts.others_IC, [at] * item.id_words, code_words(counts.code_I, item), axis=1
    )[order_I]
    ids = {f.name: _shaped(ids_IC[:, columns[f.name]], f) for f in items.item_side}
    catalogue = Catalogue(
        counts.item.take(pa.array(order_I)),
        counts.count_I[order_I],
        ids,
        counts.collisions,
        counts.shared_events,
    )
    return catalogue, counts.part_I[order_I]


def save(catalogue: Catalogue, path: str | Place, items: Items, split: Split) -> None:
    """Writes a catalogue that was collected for `items`, without the events held out by `split`.

    Raises:
      UserError: the file cannot be written.
    """
    path = place_of(path)
    columns: dict[str, pa.Array] = {"item": catalogue.item, "count": pa.array(catalogue.count_I)}
    for name, ids in catalogue.ids.items():
        values = np.ascontiguousarray(ids, np.int32).reshape(len(ids), -1)
        columns[f"ids/{name}"] = pa.FixedSizeListArray.from_arrays(
            pa.array(values.ravel()), values.shape[1]
        )
    metadata = {
        "made_for": _made_for(items, split),
        "collisions": catalogue.collisions,
        "shared_events": catalogue.shared_events,
    }
    table = pa.table(columns, metadata={_METADATA: json.dumps(metadata).encode()})
    if isinstance(path, StorePath):
        with replacing(path) as copied:
            pyarrow.parquet.write_table(table, str(copied))
        return
    # Moved into place when complete, so that readers never see a partial file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, str(unfinished))
        unfinished.replace(path)
    except (pa.ArrowException, OSError) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"{path}: the catalogue cannot be written ({error})") from error


def load(path: str | os.PathLike[str] | StorePath, items: Items, split: Split) -> Catalogue:
    """Reads a catalogue.

    Raises:
      UserError: the file cannot be read, is not a catalogue, or was made for other features.
    """
    if isinstance(path, str | os.PathLike):
        refuse_addresses("loss.catalogue", os.fspath(path), of_stores=False)
    path = place_of(path)
    try:
        with file_systems.opened(path) as source:
            table = pyarrow.parquet.read_table(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: the catalogue cannot be read ({reason}); {_REMEDY} --output {path}"
        ) from error
    metadata = table.schema.metadata or {}
    if _METADATA not in metadata:
        raise UserError(f"{path}: expected a catalogue, found another Parquet file; {_REMEDY}")
    saved = json.loads(metadata[_METADATA])
    _check_made_for(path, saved["made_for"], _made_for(items, split))
    ids = {}
    for feature in items.item_side:
        lists = pa.concat_arrays(table[f"ids/{feature.name}"].chunks)
        ids_IC = lists.flatten().to_numpy().reshape(-1, feature.bag_size * feature.id_words)
        ids[feature.name] = _shaped(ids_IC, feature)
    item = pa.concat_arrays(table["item"].chunks)
    # Files of older versions do not have it.
    shared = saved["shared_events"] if "shared_events" in saved else None
    return Catalogue(item, table["count"].to_numpy(), ids, saved["collisions"], shared)


def item_text(items: pa.Array, index: int) -> str:
    """Return an id of `Catalogue.item` as text."""
    try:
        item = items[index].as_py()
    except (ValueError, OverflowError):
        # Text that is not UTF-8, or a time outside Python's range.
        return items.slice(index, 1).to_string(skip_new_lines=True)[1:-1]
    return item.decode(errors="backslashreplace") if isinstance(item, bytes) else str(item)


def _shaped(ids_IC: np.ndarray, feature: FeatureConfig) -> np.ndarray:
    """Return a new array `[I, K]`, or `[I, K, 2]` if ids have two words."""
    shape = (len(ids_IC), feature.bag_size, feature.id_words)
    ids_IKW = np.array(ids_IC, np.int32).reshape(shape)
    return ids_IKW if feature.grows else ids_IKW[..., 0]


# ---------------------------------------------------------------------------------- settings


def check_item_feature(items: Items) -> None:
    """Refuses bags and bucketized numbers, which do not identify an item.

    Raises:
      UserError: the item feature has bags, or another op than id.
    """
    feature, name = items.item, items.item.name
    number = [each.name for each in items.features].index(name)
    for key, expected in (("op", "id"), ("bag_size", 1)):
        found = getattr(feature, key)
        if found != expected:
            raise UserError(
                f"features.{number}.{key}: expected {expected}, because {name} is loss.item_feature "
                f"and an item of a catalogue has one id, found {found}"
            )


def _made_for(items: Items, split: Split) -> Fingerprint:
    """Return everything that encoded ids and counts depend on, except the files."""
    return {"version": DECODING_VERSION, **items.fingerprint, "split": split.fingerprint}


def _check_made_for(path: Place, saved: dict[str, Any], now: dict[str, Any]) -> None:
    def refuse(what: str, saved: Any, now: Any) -> None:
        if saved != now:
            raise UserError(
                f"{what}: catalogue {path} was made with {saved} (now {now}); go back to that or "
                f"{_REMEDY}"
            )

    refuse("version of ids", saved["version"], now["version"])
    refuse("loss.item_feature", saved["loss.item_feature"], now["loss.item_feature"])
    # Older files without a split were made without one, or cover whole logs.
    split_before = identity.of_split(Config())
    if "split" in saved:
        split_before = split_of_catalogue(saved["split"])
    for key in dict.fromkeys([*now["split"], *split_before]):
        before = split_before[key] if key in split_before else None
        refuse(key, before, now["split"][key] if key in now["split"] else None)
    names = [", ".join(sorted(made["features"])) for made in (saved, now)]
    refuse("loss.target_features", *names)
    for name, settings in now["features"].items():
        try:
            # Keys that did not exist when the file was written have their defaults of that time.
            before = identity.of_entries(FeatureConfig(**saved["features"][name]))
        except TypeError as error:
            raise UserError(
                f"{path}: the catalogue was made by another version of s2s_jax ({error}); {_REMEDY}"
            ) from error
        for key, value in settings.items():
            refuse(f"{key} of feature {name}", before[key], value)
