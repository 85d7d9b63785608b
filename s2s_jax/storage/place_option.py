"""The type of options whose files are on this machine or in a store."""

from pathlib import Path
from typing import Annotated

import tyro

from s2s_serve.storage.address import Place, StorePath, place_of

PlaceOption = Annotated[
    Place,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: place_of(words[0]),
        is_instance=lambda value: isinstance(value, Path | StorePath),
        str_from_instance=lambda place: [str(place)],
    ),
]
