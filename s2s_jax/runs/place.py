"""Where a run is: on this machine or in a store."""

import os
from pathlib import Path

from s2s_jax.config import refuse_addresses
from s2s_serve.storage.address import Place, StorePath, is_address, place_of


def place_of_run(output_dir: str | os.PathLike[str] | StorePath) -> Place:
    """The place that `train.output_dir` stands for.

    Raises:
      UserError: it is an address of a store that is not known.
    """
    if isinstance(output_dir, StorePath):
        return output_dir
    text = os.fspath(output_dir)
    refuse_addresses("train.output_dir", text, of_stores=False)
    return place_of(text) if is_address(text) else Path(text)
