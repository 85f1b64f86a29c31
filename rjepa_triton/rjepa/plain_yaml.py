"""YAML in which names are text: participant 010 is not 8, and a movie called no is not False.

YAML 1.1, which PyYAML reads, takes 010, 1_0, 12:30, no and 2026-01-02 for other things than text. Here the keys of a
mapping are always text, as they are written, and a mapping must not have one twice.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .. import _files


class _Text(yaml.SafeLoader):
    """Every value is text, too."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 # as PyYAML's

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)
        found: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            found.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


class _Numbers(_Text):
    """Plain decimal numbers, true, false and null are what they say; other values are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _name, _pattern in {
    "merge": r"<<",
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
}.items():
    _Numbers.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)


def read(path: str | Path) -> Any:
    """The content of a YAML file, with numbers. Raises ValueError, naming the file; OSError."""
    return _load(_files.read_text(path), path, _Numbers)


def read_texts(path: str | Path) -> Any:
    """The content of a YAML file, every value of which is text. Raises ValueError, naming the file; OSError."""
    return _load(_files.read_text(path), path, _Text)


def texts(written: str, source: str) -> Any:
    """What a YAML text says, every value as text. Raises ValueError, naming `source`."""
    return _load(written, source, _Text)


def value(written: str, source: str) -> Any:
    """What an override's value says: a list, mapping or quoted text as in YAML, all else the text as it is written.

    Raises ValueError, naming `source`.
    """
    return _load(written, source, _Text) if written.lstrip()[:1] in tuple("[{'\"") else written


def _load(written: str, source: object, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(written, loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{source}: not YAML that can be read: {where or type(error).__name__}") from error
