"""The tensors of the RecIS example in PyTorch, and their places among our parameters.

The names are those of the example's `state_dict`, see `docs/recis.md`. Three things are different: a
linear layer has its weights as (out, in) there and as (in, out) here; layers are modules there and
stacked here; tables have one row for each bucket there, in order, and are laid out in segments here.

Shapes: R rows of a table, V its buckets, D its width, Y layers.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from s2s_jax.embedding.tables import TableSpec, table_specs
from s2s_jax.errors import UserError
from s2s_jax.training.step.params import Tree
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.table_layout import bucket_of_row, row_of_bucket

_LAYERS = "dense.trans.layers."
# The modules of a layer, in the order of the example: where their parameters are, and the keys of the
# configuration that their sizes come from.
_OF_LAYER = {
    "norm1": (("norm1",), "model.hidden_size"),
    "attn.attn": (("attn", "qkv"), "model.hidden_size"),
    "attn.proj": (("attn", "proj"), "model.hidden_size"),
    "norm2": (("norm2",), "model.hidden_size"),
    "ffn.net.0": (("ffn", "up"), "model.hidden_size, model.dim_feedforward"),
    "ffn.net.2": (("ffn", "down"), "model.hidden_size, model.dim_feedforward"),
}
# Options of the model that the example lacks: the value that stands for what it has, and what it lacks.
_LACKS = {
    "position": ("none", "positions"),
    "distance_bias": (False, "bias of distances"),
    "time_bias": (None, "bias of time gaps"),
    "input_norm": (False, "norm of events"),
    "layer": ("transformer", "other layer"),
    "feed_forward": ("gelu", "other feed-forward part"),
    "norm": ("layer", "other norm"),
    "norm_placement": ("pre", "norm after the sum"),
    "qk_norm": (False, "norm of queries and keys"),
    "gated_residuals": (False, "gates"),
}
# Our names of the parameters of a linear layer or a layer norm, and those of PyTorch.
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Approximate size of the part of a table that is put in order at once.
_PART_BYTES = 2**26


class Tensor(NamedTuple):
    """A tensor of the example.

    Attributes:
      shape: its shape.
      place: the path of its parameter below `dense`, or the name of its table.
      layer: the number of its layer; None outside of layers.
      keys: the keys of the configuration that its shape comes from.
    """

    shape: tuple[int, ...]
    place: tuple[str, ...]
    layer: int | None
    keys: str


def refuse_what_it_lacks(settings: StepSettings, remedy: str) -> None:
    """Refuses a model whose weights the example has no tensors for.

    Args:
      settings: the settings of the model.
      remedy: what the user can do, the end of the sentence.

    Raises:
      UserError: names the first key that the example lacks.
    """
    for feature in settings.items.features:
        if feature.grows:
            raise UserError(
                f"features.{feature.name}.hash_bucket_size: expected at least 1, because tables in "
                f"PyTorch have a fixed number of rows, found 0 (a growing table); {remedy}"
            )
    for key, (expected, lacks) in _LACKS.items():
        found = getattr(settings.model, key)
        if found != expected:
            raise UserError(
                f"model.{key}: expected {expected}, because the RecIS example has no {lacks}, found "
                f"{found}; {remedy}"
            )


def dense_tensors(dense: Tree) -> dict[str, Tensor]:
    """Return the tensors of the dense part, by name, in the order of the example.

    Args:
      dense: the dense parameters, or their shapes, of a model that the example can express.
    """
    # The outer modules, around the layers.
    first = _module(
        dense, "dense.proj", ("proj",), None, "features.NAME.emb_dim, model.hidden_size"
    )
    last = _module(
        dense,
        "dense.trans.final_layer_norm",
        ("transformer", "final_norm"),
        None,
        "model.hidden_size",
    )
    within = ("transformer", "layers")
    layers = _leaf(dense, (*within, "norm1", "scale")).shape[0]
    found = dict(first)
    for layer in range(layers):
        for name, (place, keys) in _OF_LAYER.items():
            module = f"{_LAYERS}{layer}.{name}"
            found |= _module(dense, module, (*within, *place), layer, keys)
    return found | last


def table_tensors(settings: StepSettings) -> dict[str, Tensor]:
    """Return the tensors of the tables, by name."""
    found = {}
    for name, spec in table_specs(settings.items.features, settings.tables).items():
        of = f"features.{spec.features[0]}"
        keys = f"{of}.hash_bucket_size, {of}.emb_dim"
        found[table_tensor(name)] = Tensor((spec.buckets, spec.emb_dim), (name,), None, keys)
    return found


def table_tensor(table: str) -> str:
    """Return the name of the tensor of a table."""
    return f"sparse.{table}.weight"


def check(place: str, found: Mapping[str, np.ndarray], expected: Mapping[str, Tensor]) -> None:
    """Checks that tensors are those of a model.

    Args:
      place: where they were found, for messages.
      found: the tensors that were found, by name.
      expected: the tensors of the model, by name.

    Raises:
      UserError: names the first tensor that is missing, not known, or of another shape or type.
    """
    _check_layers(place, found, expected)
    for name, tensor in expected.items():
        shape = _spelled(tensor.shape)
        if name not in found:
            others = ", ".join(list(found)[:3]) or "no tensors"
            raise UserError(
                f"{place}: {name}: expected a tensor of shape {shape}, found none of this name "
                f"(but {others}); rename the tensors to those of the RecIS example, or change the "
                f"configuration"
            )
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{place}: {name}: expected shape {shape} (from {tensor.keys}), found "
                f"{_spelled(found[name].shape)}; set these keys to the sizes of the file"
            )
        if found[name].dtype != np.float32:
            raise UserError(
                f"{place}: {name}: expected numbers of type float32, found {found[name].dtype}; "
                f"convert the tensor with float() before it is saved"
            )
    for name in found:
        if name not in expected:
            raise UserError(
                f"{place}: {name}: expected only tensors of the model, found this one of shape "
                f"{_spelled(found[name].shape)} as well; leave it out of the file, or change the "
                f"configuration so that the model has it"
            )


def to_dense(tensors: Mapping[str, Tensor], found: Mapping[str, np.ndarray]) -> Tree:
    """Return the dense parameters.

    Args:
      tensors: from `dense_tensors`.
      found: these tensors, checked.
    """
    layers: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        # Vectors stay as they are.
        layers.setdefault(tensor.place, []).append(found[name].T)
    stacked = {tensor.place: tensor.layer is not None for tensor in tensors.values()}
    tree: dict = {}
    for place, parts in layers.items():
        inside = tree
        for key in place[:-1]:
            inside = inside.setdefault(key, {})
        inside[place[-1]] = np.stack(parts) if stacked[place] else np.ascontiguousarray(parts[0])
    return tree


def of_dense(tensor: Tensor, dense: Tree) -> np.ndarray:
    """Return the values of a tensor of the dense part."""
    parameter = np.asarray(_leaf(dense, tensor.place))
    return (parameter if tensor.layer is None else parameter[tensor.layer]).T


def to_table(spec: TableSpec, values_VD: np.ndarray, begin: int, stop: int) -> np.ndarray:
    """Return rows `begin` to `stop - 1` of a table; rows without a bucket are zeros.

    Args:
      spec: the table.
      values_VD: f32, the vectors of its buckets.
      begin: the first row.
      stop: the row after the last.
    """
    bucket_R = bucket_of_row(np.arange(begin, stop), spec.segment_rows)
    rows_RD = np.zeros((stop - begin, spec.emb_dim), np.float32)
    is_used = bucket_R < spec.buckets
    rows_RD[is_used] = values_VD[bucket_R[is_used]]
    return rows_RD


def of_table(spec: TableSpec, values_RD: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the vectors of a table's buckets, in order, some buckets at a time."""
    at_once = max(_PART_BYTES // (4 * spec.emb_dim), 1)
    for begin in range(0, spec.buckets, at_once):
        bucket_V = np.arange(begin, min(begin + at_once, spec.buckets))
        yield values_RD[row_of_bucket(bucket_V, spec.segment_rows)]


def _check_layers(
    place: str, found: Mapping[str, np.ndarray], expected: Mapping[str, Tensor]
) -> None:
    """Refuses another number of layers, which would be many tensors too few or too many."""
    numbers = [
        {name.removeprefix(_LAYERS).split(".")[0] for name in names if name.startswith(_LAYERS)}
        for names in (found, expected)
    ]
    if numbers[0] and len(numbers[0]) != len(numbers[1]):
        raise UserError(
            f"{place}: expected {len(numbers[1])} layers (from model.num_layers), found "
            f"{len(numbers[0])}; set model.num_layers to {len(numbers[0])}"
        )


def _module(
    dense: Tree, name: str, place: tuple[str, ...], layer: int | None, keys: str
) -> dict[str, Tensor]:
    """Return the tensors of a linear layer or a layer norm, the weight before the bias."""
    module = _at(dense, place)
    assert isinstance(module, Mapping), f"{place} has a weight and a bias"
    tensors = {}
    for parameter in sorted(module, key=lambda each: each == "bias"):
        stacked = _leaf(dense, (*place, parameter)).shape
        shape = stacked if layer is None else stacked[1:]
        tensor = Tensor(tuple(shape[::-1]), (*place, parameter), layer, keys)
        tensors[f"{name}.{_PARAMETERS[parameter]}"] = tensor
    return tensors


def _leaf(tree: Tree, place: tuple[str, ...]) -> jax.Array:
    leaf = _at(tree, place)
    assert not isinstance(leaf, Mapping), f"{place} is a parameter"
    return leaf


def _at(tree: Tree, place: tuple[str, ...]) -> "jax.Array | Tree":
    found: jax.Array | Tree = tree
    for key in place:
        assert isinstance(found, Mapping), f"{place} is in the tree"
        found = found[key]
    return found


def _spelled(shape: tuple[int, ...]) -> str:
    return str(list(shape))
