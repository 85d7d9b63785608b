"""Files with the tensors of a PyTorch model: `.safetensors`, and `.pt` if PyTorch is installed."""

import contextlib
import importlib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from s2s_jax.errors import UserError
from s2s_jax.writing import replacing
from s2s_serve import tensor_file
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch
from s2s_serve.tensor_file import Layout

_SAFETENSORS, _PT = ".safetensors", ".pt"


def check_kind(argument: str, path: Place) -> None:
    """Checks that files of this kind can be used, before anything takes time.

    Args:
      argument: the argument of the command, for messages.
      path: the file.

    Raises:
      UserError: the name ends in something else, or PyTorch is needed and not installed.
    """
    if path.suffix == _PT:
        _torch(argument, path)
    elif path.suffix != _SAFETENSORS:
        raise UserError(
            f"{argument}: expected a file whose name ends in {_SAFETENSORS} or {_PT}, found {path}; "
            f"rename it, or save the tensors as {_SAFETENSORS}"
        )


@contextlib.contextmanager
def on_disk(argument: str, path: Place) -> Iterator[Path]:
    """A file on this machine: itself or, if it is in a store, a copy of it.

    Args:
      argument: the argument of the command, for messages.
      path: the file.

    Raises:
      UserError: it cannot be copied.
    """
    if not isinstance(path, StorePath):
        yield path
        return
    scratch = Scratch()
    try:
        copy = scratch.path / path.name
        try:
            file_systems.download(path, copy)
        except FileNotFoundError as error:
            raise UserError(f"{argument}: {path} does not exist; give a file of tensors") from error
        yield copy
    finally:
        scratch.remove()


def read(argument: str, path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name; their values are read when they are used.

    No code in the file is run.

    Args:
      argument: the argument of the command, for messages.
      path: the file.

    Raises:
      UserError: it cannot be read, or has something else than tensors.
    """
    check_kind(argument, path)
    if not path.is_file():
        raise UserError(
            f"{argument}: {path} does not exist or is not a file; give a file of tensors"
        )
    if path.suffix == _SAFETENSORS:
        remedy = f"save a state_dict of float32 tensors as {_SAFETENSORS}"
        return tensor_file.read(path, remedy)
    torch = _torch(argument, path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise UserError(
            f"{path}: expected tensors that torch.save wrote, but they cannot be read ({reason}); save "
            f"the state_dict again, as {_SAFETENSORS} or with torch.save(model.state_dict(), …)"
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(
            f"{path}: expected a state_dict, found {type(found).__name__}; save model.state_dict()"
        )
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(
                f"{path}: {name}: expected a tensor of type float32, found {kind}; save only the "
                f"state_dict of the model, with float() tensors"
            )
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def write(
    argument: str,
    path: Place,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Iterable[np.ndarray]],
) -> None:
    """Writes f32 tensors, and replaces the file if it exists.

    Args:
      argument: the argument of the command, for messages.
      path: the file.
      shapes: the shape of each tensor, in the order of the file.
      parts: the parts of each tensor along its first axis.

    Raises:
      UserError: it cannot be written; an existing file stays unchanged.
    """
    check_kind(argument, path)
    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        if path.suffix == _SAFETENSORS:
            layouts = {name: Layout(np.dtype(np.float32), shape) for name, shape in shapes.items()}
            tensor_file.write(unfinished, layouts, parts)
            return
        torch = _torch(argument, path)
        # PyTorch writes whole tensors only.
        arrays = {name: np.concatenate(list(parts[name])) for name in shapes}
        torch.save({name: torch.from_numpy(x) for name, x in arrays.items()}, unfinished)


def _torch(argument: str, path: Place) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(
            f"{argument}: {path}: PyTorch, which reads and writes {_PT} files, is not installed; "
            f"pip install torch, or use a {_SAFETENSORS} file"
        ) from error
