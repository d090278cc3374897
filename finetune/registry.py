"""Open tables: a short name, or `package.module:attribute`, becomes an object.

Tables map names to strings, so listing one imports nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from finetune.errors import RecipeError


def nearest(name: str, known: list[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; empty when none is near."""
    return difflib.get_close_matches(name, known, n=count, cutoff=0.6)


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Import what `name` stands for.

    Args:
        kind: what the table holds, for the message ("format", "scorer").
        name: a key of `table`, or `package.module:attribute` from any installed package.
        table: short name to `package.module:attribute`.

    Raises:
        RecipeError: unknown name, or a path that cannot be imported.
    """
    target = table.get(name, name)
    if ":" not in target:
        near = nearest(name, sorted(table))
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"unknown {kind} {name!r}{hint} (known: {', '.join(sorted(table))}; or package.module:attribute)"
        )
    module_name, attribute = target.split(":", 1)
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise RecipeError(f"{kind} {name!r}: not of the form package.module:attribute")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        hint = "" if name in table else "; install its package, or put its folder on PYTHONPATH"
        raise RecipeError(f"{kind} {name!r}: cannot import {target!r}: {error}{hint}") from error
