"""Where the sentences of a prompt end."""

from __future__ import annotations

import re


def sentences(text: str, marks: str = ".!?;") -> list[str]:
    """The sentences of a text with their marks, single spaces inside; a mark before a space or the end ends one."""
    parts = re.split(rf"(?<=[{re.escape(marks)}])\s+", " ".join(text.split()))
    return [part for part in parts if part]
