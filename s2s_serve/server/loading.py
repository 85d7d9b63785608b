"""Loads a version of an export for the server."""

import dataclasses
import json
from pathlib import Path

import s2s_serve
from s2s_serve.server import catalogue
from s2s_serve.server.catalogue import Catalogue
from s2s_serve.server.protocol import Model


@dataclasses.dataclass(frozen=True)
class Served:
    """A version in memory.

    Attributes:
      model: answers.
      items: describes items.
      item_column: the column of a history that has the items.
      text_columns: the columns of a history that hold text.
    """

    model: Model
    items: Catalogue
    item_column: str
    text_columns: tuple[str, ...]


def load(directory: Path) -> Served:
    """Loads the newest version of an export and asks it once, so that it is known to answer.

    Raises:
      UserError: there is no complete version.
    """
    model = s2s_serve.load(directory)
    version = directory / "versions" / str(model.version)
    manifest = json.loads((version / "manifest.json").read_bytes())
    columns = {each["name"]: each["column"] or each["name"] for each in manifest["features"]}
    kinds = manifest["kinds"]
    text = tuple(columns[name] for name, kind in kinds.items() if kind == "text")
    model.recommend([{name: [None] for name in model.features}], k=1)
    items = catalogue.read(version / "items.parquet")
    return Served(model, items, columns[manifest["item_feature"]], text)
