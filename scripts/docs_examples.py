"""Examples in docstrings (`>>>`) are code blocks in the documentation, wherever they stand."""

import re
from typing import Any

import griffe

# An example: a line with >>>, and all lines up to an empty one.
_EXAMPLE = re.compile(r"^( *)(>>> .*(?:\n\1\S.*|\n\1 +\S.*)*)", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts fences around examples before docstrings are read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with a fence before and after each example."""
    return _EXAMPLE.sub(r"\1```pycon\n\1\2\n\1```", text)
