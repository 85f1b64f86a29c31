"""Docstrings are plain text; this makes Markdown of them, for the site alone.

Without it two things would be lost. Lines of columns, "states  names of the states of a unit", would run together; they
become lists. And Markdown would take brackets, stars and angle brackets of formulas for links, emphasis and HTML; they
are escaped.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"^( *)(\S.*?) {2,}(\S.*)$")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$")


class PlainDocstrings(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring's text as Markdown; indented formulas stay as they are, as blocks of code."""
    made: list[str] = []
    section = False  # within Args and the like, where indentation is not code
    item: int | None = None  # the indentation of the list's entry that goes on
    code = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            item = None
            made.append("")
            continue
        if indent == 0:
            section = bool(SECTION.match(line))
        if not section and indent >= 4 and (code or not made or not made[-1]) and item is None:
            code = True
            made.append(line)
            continue
        code = False
        found = COLUMNS.match(line)
        if item is not None and indent > item:
            made[-1] += " " + escaped(line.strip())
        elif found:
            if item is None and made and made[-1]:
                made.append("")
            item = indent
            name, *rest = re.split(r" {2,}", line.strip())
            made.append(f"{' ' * indent}- {as_code(name)}: {escaped(', '.join(rest))}")
        else:
            if item is not None:
                made.append("")
                item = None
            made.append(escaped(line))
    return "\n".join(made)


def as_code(name: str) -> str:
    """The first column, as code where it isn't yet."""
    return name if "`" in name else f"`{name}`"


def escaped(line: str) -> str:
    """A line without Markdown but for its `code`."""
    parts = line.split("`")
    if len(parts) % 2 == 0:  # code that goes on in the next line
        return line
    parts[::2] = [re.sub(r"([\[\]*])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
