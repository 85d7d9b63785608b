"""Writes the files of a tower.

Only this file of the package may be imported without the extra `export`.
"""

from pathlib import Path

import jax

from s2s_jax.errors import UserError
from s2s_jax.exporting.stablehlo import to_stablehlo
from s2s_jax.exporting.tower import Tower
from s2s_jax.writing import replacing

STABLEHLO, ONNX = "tower.stablehlo", "tower.onnx"

# Both formats hold less than 2 GiB in a file; operators take kilobytes per layer.
_MOST_BYTES = 2**31 - 2**24


def check_installed() -> None:
    """Checks that ONNX can be written, before anything takes time.

    Raises:
      UserError: the extra `export` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        raise UserError(
            f"{error.name}, with which {ONNX} is written, is not installed; "
            f"pip install 's2s-jax[export]'"
        ) from error


def write_tower(tower: Tower, directory: Path) -> None:
    """Writes `tower.stablehlo` and `tower.onnx`; see `to_stablehlo` and `to_onnx`.

    Args:
      tower: the tower to write.
      directory: an existing directory.

    Raises:
      UserError: the extra `export` is not installed, the parameters are too large, or a file cannot be
        written.
    """
    check_installed()
    check_size(tower)
    from s2s_jax.exporting.onnx_tower import to_onnx

    for name, data in ((STABLEHLO, to_stablehlo(tower)), (ONNX, to_onnx(tower))):
        with replacing(directory / name) as path:
            path.write_bytes(data)


def check_size(tower: Tower) -> None:
    """Checks that the files can hold a tower, whose parameters may be shapes.

    Raises:
      UserError: the parameters are too large.
    """
    parameters = jax.tree.leaves(tower.dense)
    size = sum(parameter.size * parameter.dtype.itemsize for parameter in parameters)
    if size > _MOST_BYTES:
        raise UserError(
            f"model: expected at most {_MOST_BYTES / 1e9:.1f} GB of parameters without tables, which "
            f"is what {ONNX} can hold, found {size / 1e9:.1f} GB; train a smaller model to export it"
        )
