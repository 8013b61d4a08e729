"""How deep JSON may be nested: in a row, and in whatever a row holds as a text of JSON."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100


def is_too_deep(value: Any, text: str | None = None) -> bool:
    """Whether a JSON value has more than `MAX_DEPTH` levels.

    Args:
        text: what it was read from, if that is known: one with few brackets can't be deep.
    """
    if text is not None and text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
