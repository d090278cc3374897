"""Where a value of a recipe came from, and the dotted names that values are known by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Path = tuple[str | int, ...]
"""The way to a value: mapping keys and list indices, as ("data", "train", 0, "path")."""

_INDEX = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Origin:
    """The place a value was written at, or the reason it has the value it has."""

    kind: Literal["file", "override", "default", "derived"]
    source: str = ""
    """The file, or the override as `override 2: adapter.r=32`; empty for a default."""
    line: int | None = None
    """Line in the file, from 1."""
    column: int | None = None
    """Column in characters, from 1."""

    def __str__(self) -> str:
        """As an editor or a terminal can follow it: file:line:column."""
        if self.kind in ("default", "derived"):
            return self.kind
        if self.line is None:
            return self.source
        return f"{self.source}:{self.line}:{self.column}"


DEFAULT = Origin("default")
DERIVED = Origin("derived")


def dotted(path: Path) -> str:
    """("data", "train", 0, "path") becomes data.train[0].path."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def parse_dotted(key: str) -> Path:
    """data.train[0].path becomes ("data", "train", 0, "path"); the inverse of `dotted` for keys without dots."""
    path: list[str | int] = []
    for part in key.split("."):
        name = _INDEX.sub("", part)
        if name:
            path.append(name)
        path += [int(index) for index in _INDEX.findall(part)]
    return tuple(path)


def generic(path: Path) -> str:
    """("data", "train", 0, "path") becomes data.train[].path: the key whatever the index."""
    return _INDEX.sub("[]", dotted(path))
