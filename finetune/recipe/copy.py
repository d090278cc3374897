"""Copying a shipped recipe out, to be changed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finetune.errors import RecipeError, RefusedError
from finetune.files import write_text
from finetune.recipe.load import EXTENDS, read_chain
from finetune.recipe.shipped import nearest_shipped, recipes_folder, shipped_recipes
from finetune.recipe.show import scalar
from finetune.recipe.yaml import Document

_SCHEMA_LINE = re.compile(r"^#\s*yaml-language-server:\s*\$schema=(\S+)\s*\n?", re.MULTILINE)


def copy_recipe(name: str, destination: Path | None = None, folder: Path | None = None) -> list[Path]:
    """Copy a shipped recipe, and the recipes it extends, beside one another.

    Args:
        name: a name of `shipped_recipes`.
        destination: the file to write, or a folder that exists; by default the recipe's own file name, here.
        folder: where the shipped recipes lie.

    Returns:
        The files written, the recipe first. `extends` lines name the copies; a relative schema line is left out.

    Raises:
        RecipeError: no shipped recipe of that name.
        RefusedError: one of the files exists already; nothing is written.
    """
    known = shipped_recipes(folder)
    if name not in known:
        near = nearest_shipped(name, folder)
        hint = f"; did you mean {near}?" if near else ""
        listed = ", ".join(known) or f"none; {folder or recipes_folder()} is missing"
        raise RecipeError(f"no shipped recipe is called {name!r}{hint} (there are: {listed})")
    documents = read_chain(known[name])
    destination = destination or Path(known[name].name)
    if destination.is_dir():
        destination = destination / known[name].name
    targets = [destination]
    for document in documents[1:]:
        target = destination.parent / Path(document.source).name
        while target in targets:
            target = target.with_name(f"{target.stem}-base{target.suffix}")
        targets.append(target)
    taken = [target for target in targets if os.path.lexists(target)]
    if taken:
        raise RefusedError(f"{', '.join(map(str, taken))} exists already; remove it or choose another destination")
    parents: list[Path | None] = [*targets[1:], None]
    texts = [_moved(document, parent) for document, parent in zip(documents, parents, strict=True)]
    for target, text in reversed(list(zip(targets, texts, strict=True))):  # a recipe appears after what it extends
        write_text(target, text)
    return targets


def _moved(document: Document, parent: Path | None) -> str:
    """The text of a recipe whose parent now lies beside it under another name."""
    text = Path(document.source).read_text(encoding="utf-8")
    if parent is not None:
        line = document.values[(EXTENDS,)].line
        assert line is not None, "a file's value without a line"
        lines = text.splitlines(keepends=True)
        assert lines[line - 1].startswith(f"{EXTENDS}:"), "a shipped recipe's extends does not stand on its own line"
        lines[line - 1] = f"{EXTENDS}: {scalar(parent.name)}\n"
        text = "".join(lines)
    return _SCHEMA_LINE.sub(lambda match: match.group() if "://" in match.group(1) else "", text)
