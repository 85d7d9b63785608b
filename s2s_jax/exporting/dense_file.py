"""Writes the dense parameters of an export, for programs that have their own model.

Shapes: Y layers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from s2s_jax.training.step.params import Tree
from s2s_serve import tensor_file
from s2s_serve.tensor_file import Layout

NAME = "dense.safetensors"

# The parameters of all layers are stacked here.
_LAYERS = ("transformer", "layers")


def write_dense(dense: Tree, path: Path) -> None:
    """Writes every dense parameter under its path in the tree, joined by dots.

    Layers are written one by one: `transformer.layers.0.attn.qkv.kernel`.

    Args:
      dense: f32, the parameters, on the host.
      path: the file, which must not exist.

    Raises:
      OSError: the file cannot be written.
    """
    arrays = dict(named(dense))
    layouts = {name: Layout(x.dtype, x.shape) for name, x in arrays.items()}
    tensor_file.write(path, layouts, {name: [x] for name, x in arrays.items()})


def named(dense: Tree, place: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the values of each parameter below `place`.

    Examples:
      >>> tree = {"proj": {"bias": np.ones(2)}, "transformer": {"layers": {"w": np.ones((2, 3))}}}
      >>> [name for name, _ in named(tree)]
      ['proj.bias', 'transformer.layers.0.w', 'transformer.layers.1.w']
    """
    for key, part in dense.items():
        inside = (*place, key)
        if isinstance(part, Mapping):
            yield from named(part, inside)
        elif inside[: len(_LAYERS)] == _LAYERS:
            for layer, of_layer in enumerate(np.asarray(part)):
                yield ".".join((*_LAYERS, str(layer), *inside[len(_LAYERS) :])), of_layer
        else:
            yield ".".join(inside), np.asarray(part)
