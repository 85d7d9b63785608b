"""Loads a version of an export for the server."""

import dataclasses
from pathlib import Path

import s2s_serve
from s2s_serve.server.catalogue import Catalogue
from s2s_serve.server.protocol import Model


@dataclasses.dataclass(frozen=True)
class Served:
    """A version in memory.

    Attributes:
      model: answers.
      items: describes items.
    """

    model: Model
    items: Catalogue


def load(directory: Path) -> Served:
    """Loads the newest version of an export and asks it once, so that it is known to answer.

    Raises:
      UserError: there is no complete version.
    """
    model = s2s_serve.load(directory)
    model.recommend([{name: [None] for name in model.features}], k=1)
    return Served(model, Catalogue(model.items))
