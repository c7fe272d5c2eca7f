"""How docstrings are read for the API page."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Take a section ``Example:`` for what griffe calls ``Examples:``, and show it as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:", "\nExamples:")
