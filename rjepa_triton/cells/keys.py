"""A cell as a text, by which an operator of torch.library, whose arguments are tensors and plain values, is told of it.

A cell whose attributes are plain values has the name of its class and these values as its key, from which the cell can
be made again, in another process too. Another cell has a number, which has a meaning in this process alone, while the
cell lives.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import weakref
from typing import TYPE_CHECKING, Any

from .trace import attributes

if TYPE_CHECKING:
    from .two_point import Cell

__all__ = ["cell_of", "key_of"]

_MADE: dict[str, Cell] = {}  # by keys that say all of the cell
_NUMBERED: weakref.WeakValueDictionary[str, Cell] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def key_of(cell: Cell) -> str:
    """The cell's key. It is kept with the cell until one of its attributes changes."""
    key = cell.__dict__.get("_key")
    if key is None or ("#" in key and _NUMBERED.get(key) is not cell):
        kind, values = type(cell), attributes(cell)
        name = f"{kind.__module__}:{kind.__qualname__}"
        if values is None or "<locals>" in name or kind.__module__ == "__main__":
            key = f"{name}#{next(_numbers)}"
            _NUMBERED[key] = cell
        else:
            key = f"{name}?{json.dumps(dict(values))}"
            if key not in _MADE:
                _MADE[key] = copy.copy(cell)  # the cell itself may get other attributes
        cell.__dict__["_key"] = key
    return key


def cell_of(key: str) -> Cell:
    """The cell that has the key, or one that is equal to it. Raises ValueError if there is none in this process."""
    found = _MADE.get(key) or _NUMBERED.get(key)
    if found is not None:
        return found
    name, said, values = key.partition("?")
    if not said:
        raise ValueError(f"cell {key!r} doesn't live in this process")
    module, _, path = name.partition(":")
    try:
        kind: Any = importlib.import_module(module)
        for part in path.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cell {key!r} can't be made: {error}") from error
    cell: Cell = kind.__new__(kind)
    cell.__dict__.update({k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(values).items()})
    _MADE[key] = cell
    return cell
