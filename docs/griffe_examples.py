"""For mkdocstrings: `Example:` and `Example (inside a rank):` in docstrings are examples.

Its parser knows only `Examples:`, and would show doctests as prose.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^( *)Example(?: \(.*\))?:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Renames the heading in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)
