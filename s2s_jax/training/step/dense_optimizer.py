"""The optimizers of the dense part: AdamW or Muon, with a learning rate for each layer.

Shapes: Y layers, E model width.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from s2s_jax.config import LRConfig

# The mean size of AdamW's updates, relative to its learning rate.
_ADAMW_RMS = 0.2
# Matrices that are stored as one: queries, keys and values, in HSTU together with the gates.
_TOGETHER = {"qkv": 3, "uqkv": 4}
_LAYERS = ("transformer", "layers")
# Parts of the model before the first layer.
_BEFORE_LAYERS = (("proj",), ("transformer", "input_norm"), ("transformer", "positions"))


def dense_optimizer(config: LRConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer of the dense part.

    Args:
      config: the settings of the optimizer.
      rate: the learning rate of the last layer.
    """
    chosen = adamw(config, rate)
    if config.dense_optimizer == "muon":
        chosen = optax.partition({"muon": muon(config, rate), "adamw": chosen}, _labels)
    return chosen if config.layer_decay == 1 else _with_layer_decay(config.layer_decay, chosen)


def adamw(config: LRConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW with a learning rate."""
    return optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay
    )


def muon(config: LRConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024).

    The update is the momentum with all its singular values set to about 1. It is scaled to the mean size
    of AdamW's updates, so that the same learning rates fit both, and weights decay as with AdamW (Liu et
    al., "Muon is scalable for LLM training", 2025). The matrices of each layer are orthogonalized by
    themselves, and so are the three that compute queries, keys and values, although they are stored
    together.

    Args:
      config: the weight decay; the momentum has the usual decay rate of 0.95.
      rate: the learning rate.
    """
    return _of_single_matrices(
        optax.chain(
            contrib.scale_by_muon(weight_dimension_numbers=_axes),
            optax.stateless(_like_adamw),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    )


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _labels(params: optax.Params) -> optax.Params:
    """Return for each array which optimizer it has: matrices have Muon."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _names(path)[-1] == "kernel" else "adamw", params
    )


def _axes(params: optax.Params) -> optax.Params:
    """Return the axes of inputs and outputs of each matrix; the other axes count matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: contrib.MuonDimensionNumbers(_input_axis(path), -1), params
    )


def _input_axis(path: tuple) -> int:
    return -2 if _matrices_in(path) == 1 else -3


def _like_adamw(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Return updates with orthogonal rows or columns, scaled to the mean size of AdamW's updates."""
    del params

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        longer = max(update.shape[_input_axis(path)], update.shape[-1])
        return _ADAMW_RMS * longer**0.5 * update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _matrices_in(path: tuple) -> int:
    """Return how many matrices are stored as one, side by side."""
    of_layer, kind = _names(path)[-2:]
    return _TOGETHER[of_layer] if kind == "kernel" and of_layer in _TOGETHER else 1


def _of_single_matrices(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Return a transformation that sees `[Y, E, 3, E]` for queries, keys and values stored as one."""

    def split(params: optax.Params) -> optax.Params:
        def of_array(path: tuple, x: jax.Array) -> jax.Array:
            number = _matrices_in(path)
            return x if number == 1 else x.reshape(*x.shape[:-1], number, -1)

        return jax.tree_util.tree_map_with_path(of_array, params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        assert params is not None, "weights decay"
        changed, state = transformation.update(split(updates), state, split(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), changed, updates), state

    return optax.GradientTransformation(lambda params: transformation.init(split(params)), update)


def _with_layer_decay(
    decay: float, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return a transformation with a learning rate for each layer; its state stays the same."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = transformation.update(updates, state, params)
        layers = _number_of_layers(updates)
        scale = functools.partial(_scaled_by_layer, decay, layers)
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(transformation.init, update)


def _number_of_layers(params: optax.Params) -> int:
    arrays, _ = jax.tree_util.tree_flatten_with_path(params)
    return next(x.shape[0] for path, x in arrays if _is_in(path, _LAYERS))


def _is_in(path: tuple, names: Sequence[str]) -> bool:
    # The first name is the part of the parameters.
    return _names(path)[1 : 1 + len(names)] == tuple(names)


def _scaled_by_layer(decay: float, layers: int, path: tuple, update: jax.Array) -> jax.Array:
    if _is_in(path, _LAYERS):
        ratio_Y = decay ** jnp.arange(layers - 1, -1, -1, update.dtype)
        return update * ratio_Y.reshape(-1, *[1] * (update.ndim - 1))
    if any(_is_in(path, names) for names in _BEFORE_LAYERS):
        return update * decay**layers
    return update
