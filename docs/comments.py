"""For `make docs`: the comment beside a field of a dataclass is what the reference says of the field."""

from typing import Any

import griffe


class Comments(griffe.Extension):
    """Takes comments as docstrings of attributes that have none."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Look for the comment at the end of the attribute's own line."""
        comment = attr.source.partition("  # ")[2].strip() if attr.parent and attr.parent.is_class else ""
        if comment and attr.docstring is None:
            attr.docstring = griffe.Docstring(f"{comment[0].upper()}{comment[1:]}.", parent=attr)
