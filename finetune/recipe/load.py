"""From a file and the command line to a recipe: extends, overrides, provenance.

A file's values lie over those of the file it extends, and overrides lie over both. Mappings merge, lists and single
values replace. Each value remembers where it was written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune.recipe import fields
from finetune.recipe.check import Check, shown
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.origin import Origin, dotted, generic
from finetune.recipe.origin import Path as Way
from finetune.recipe.problems import Problem, RecipeProblems
from finetune.recipe.shipped import nearest_shipped
from finetune.recipe.unknown import is_secret
from finetune.recipe.yaml import MAX_BYTES, Document, decode, parse, resolve_plain

EXTENDS = "extends"
MAX_PARENTS = 16
"""Longest chain of files that extend one another."""
_KEY = re.compile(r"[^\s.=\[\]]+(\.[^\s.=\[\]]+)*")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, what it extends and the overrides.

    Args:
        path: a YAML file.
        overrides: `section.key=value` each; the value is read as in a file (`1e-4`, `true`, `[a, b]`, `null`).

    Returns:
        The frozen recipe with the origin of every value.

    Raises:
        RecipeProblems: everything that is wrong, in one error. No other error is raised for what a file may hold.
    """
    path = Path(path)
    documents = read_chain(path)
    whole = Origin("file", documents[0].source)
    merged = Document(documents[0].source, value={})
    for document in reversed(documents):
        _lay_over(merged, document)
    sources = [document.source for document in documents]
    sources += [_override(merged, number, text) for number, text in enumerate(overrides, start=1)]
    _spell_out_sources(merged)
    check = Check(merged.value, merged.keys, merged.values, merged.broken, whole)
    recipe = check.run()
    problems = [*merged.problems, *check.problems]
    if problems or recipe is None:
        raise RecipeProblems(problems, sources)
    origins, containers = _provenance(merged)
    return LoadedRecipe(
        path=path,
        files=tuple(Path(document.source) for document in documents),
        overrides=tuple(overrides),
        recipe=recipe,
        origins=origins,
        containers=containers,
    )


def read_chain(path: Path) -> list[Document]:
    """The recipe file and the files it extends, nearest first, each as it stands."""
    documents: list[Document] = []
    seen: list[Path] = []
    asked: Origin | None = None
    while True:
        if "\0" in str(path):
            _stop(asked or Origin("file", "recipe"), "a path cannot hold the character U+0000")
        real = Path(os.path.realpath(path))
        if real in seen:
            chain = " -> ".join([document.source for document in documents[seen.index(real) :]] + [str(path)])
            _stop(asked, f"files extend one another in a circle: {chain}")
        if len(seen) >= MAX_PARENTS:
            _stop(asked, f"more than {MAX_PARENTS} files extend one another")
        document = read_document(path, asked)
        documents.append(document)
        seen.append(real)
        if EXTENDS not in document.value:
            return documents
        parent = document.value.pop(EXTENDS)
        asked = document.values[(EXTENDS,)]
        if not isinstance(parent, str) or not parent.strip():
            _stop(asked, f"expected the path of a recipe, relative to this file, found {shown(parent)}")
        path = Path(os.path.normpath(path.parent / parent))


def read_document(path: Path, asked: Origin | None = None) -> Document:
    """One recipe file as plain values: always a mapping.

    Args:
        path: the file.
        asked: where it was named, when another file extends it.

    Raises:
        RecipeProblems: it cannot be read, is not YAML, or is not a mapping.
    """
    source = str(path)
    named = path.suffix.lower() in (".yaml", ".yml", ".json")
    content = _content(path, asked)
    try:
        document = parse(decode(content, source), source)
    except RecipeProblems as error:
        if named:
            raise
        first = error.problems[0]
        note = f"{first.message} (is {path.name} a recipe? Recipes are YAML files)"
        raise RecipeProblems([Problem(first.origin, first.key, note), *error.problems[1:]], [source]) from error
    if document.value is None and not document.problems:
        _stop(Origin("file", source), "the recipe is empty; `finetune recipe list` shows some to begin with")
    if not isinstance(document.value, dict):
        note = "" if named else f" (is {path.name} a recipe? Recipes are YAML files)"
        found = f"a recipe is a mapping of sections, found {shown(document.value)}{note}"
        raise RecipeProblems([*document.problems, Problem(Origin("file", source, 1, 1), "", found)], [source])
    return document


def _content(path: Path, asked: Origin | None) -> bytes:
    where = asked or Origin("file", str(path))
    key = f"{path}: " if asked else ""
    try:
        if path.is_dir():
            _stop(where, f"{key}is a folder; name a recipe file in it")
        if not path.exists():
            _stop(where, f"{key}no such file{_shipped_hint(path)}")
        if not path.is_file():
            _stop(where, f"{key}is not a regular file")
        with open(path, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _stop(where, f"{key}cannot be read: {reason or error}")


def _shipped_hint(path: Path) -> str:
    name = nearest_shipped(str(path))
    if name is None:
        return "; `finetune recipe list` shows the recipes that can be copied"
    return f"; a recipe {name} can be copied with `finetune recipe copy {name}`"


def _stop(where: Origin | None, message: str) -> NoReturn:
    assert where is not None
    raise RecipeProblems([Problem(where, EXTENDS if where.line else "", message)])


# Laying values over one another -------------------------------------------------------------------------------------


def _lay_over(below: Document, above: Document) -> None:
    """Merge `above` into `below`, values and places."""
    _merge_value(below, above, below.value, above.value, ())
    below.broken |= above.broken
    below.problems += above.problems


def _merge_value(below: Document, above: Document, old: dict[str, Any], new: dict[str, Any], path: Way) -> None:
    for name, value in new.items():
        way = (*path, name)
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            _move_place(below, above, way)
            _merge_value(below, above, before, value, way)
        elif value is None and isinstance(before, dict):
            continue  # a section whose keys are all commented out sets nothing
        else:
            _forget(below, before, way)
            old[name] = value
            for inner in _ways(value, way):
                _move_place(below, above, inner)


def _ways(value: Any, way: Way) -> Iterator[Way]:
    """The way to a value and to everything in it."""
    yield way
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _ways(item, (*way, name))


def _move_place(below: Document, above: Document, way: Way) -> None:
    for places, others in ((below.keys, above.keys), (below.values, above.values)):
        if way in others:
            places[way] = others[way]


def _forget(document: Document, value: Any, way: Way) -> None:
    """Remove the places of a value that is replaced."""
    for inner in _ways(value, way):
        document.keys.pop(inner, None)
        document.values.pop(inner, None)
    if document.broken:
        document.broken -= {inner for inner in document.broken if inner[: len(way)] == way}


def _override(document: Document, number: int, text: str) -> str:
    """Lay `section.key=value` over the document, where its problems go too; returns what places call it."""
    key, equals, written = text.partition("=")
    key, written = key.strip(), written.strip()
    place = Origin("override", f"override {number}: {_without_secret(key, text)}")
    if not equals or not _KEY.fullmatch(key):
        document.problems.append(Problem(place, "", "expected section.key=value, as training.learning_rate=1e-4"))
        return place.source
    way = tuple(key.split("."))
    if way[0] == EXTENDS:
        document.problems.append(Problem(place, EXTENDS, "can stand only in a file"))
        return place.source
    if not written:
        document.problems.append(Problem(place, key, "no value; write null for none, or '\"\"' for empty text"))
        return place.source
    # Only brackets and quotes need a parser; all else is one plain scalar, whatever characters it holds.
    quoted = written if written[0] in "[{\"'" else None
    layer = Document(place.source)
    try:
        if quoted is not None:
            value = parse(decode(quoted.encode("utf-8", "surrogateescape"), place.source), place.source, place, True)
        else:
            value = _scalar(written, place)
    except RecipeProblems as error:
        document.problems += [Problem(place, key, problem.message) for problem in error.problems]
        return place.source
    layer.problems = [Problem(place, key, problem.message) for problem in value.problems]
    layer.broken = {(*way, *inner) for inner in value.broken}
    above: list[Way] = [way[:length] for length in range(1, len(way))]
    layer.values = {outer: place for outer in above if outer not in document.values}
    layer.values[way] = place
    layer.values |= {(*way, *inner): place for inner in value.values}
    layer.keys = dict(layer.values)
    layer.value = value.value
    for part in reversed(way):
        layer.value = {part: layer.value}
    if layer.problems:
        document.problems += layer.problems
        document.broken.add(way)
        return place.source
    _lay_over(document, layer)
    return place.source


def _scalar(text: str, place: Origin) -> Document:
    """A plain scalar from the command line, by the rules of a file."""
    decode(text.encode("utf-8", "surrogateescape"), place.source)
    try:
        return Document(place.source, value=resolve_plain(text))
    except ValueError as error:
        raise RecipeProblems([Problem(place, "", f"{error}; put it in quotes if it is text")]) from error


def _without_secret(key: str, text: str) -> str:
    shown_text = f"{key}=..." if any(is_secret(part) for part in key.split(".")) else text
    shown_text = "".join(letter if letter.isprintable() else "?" for letter in shown_text)
    return shown_text if len(shown_text) <= 120 else f"{shown_text[:117]}..."


# One spelling for sources, and provenance ---------------------------------------------------------------------------


def _spell_out_sources(document: Document) -> None:
    """A path or a single mapping becomes a list of sources, so that every key has one name: data.train[0].path."""
    for key in fields.sections():
        if not key.endswith("[]"):
            continue
        section, name = key[:-2].split(".")
        holder = document.value.get(section)
        if not isinstance(holder, dict) or name not in holder:
            continue
        way: Way = (section, name)
        if isinstance(holder[name], dict):
            for places in (document.keys, document.values):
                inner = {found: place for found, place in places.items() if found[:2] == way and len(found) > 2}
                for found, place in inner.items():
                    del places[found]
                    places[(*way, 0, *found[2:])] = place
            document.broken = {
                (*way, 0, *found[2:]) if found[:2] == way and len(found) > 2 else found for found in document.broken
            }
        if isinstance(holder[name], str | dict):
            document.values[(*way, 0)] = document.values[way]
            holder[name] = [holder[name]]
        if isinstance(holder[name], list):
            for index, item in enumerate(holder[name]):
                if isinstance(item, str):
                    document.values[(*way, index, "path")] = document.values[(*way, index)]
                    holder[name][index] = {"path": item}


def _provenance(document: Document) -> tuple[dict[str, Origin], dict[str, Origin]]:
    """Origins of what holds a value, and of what contains such."""
    origins: dict[str, Origin] = {}
    containers: dict[str, Origin] = {}
    order = {key: index for index, key in enumerate(fields.known_keys())}

    def rank(way: Way) -> tuple[int, int]:
        index = way[2] if len(way) > 2 else -1
        return order.get(generic(way[:2]), -1), index if isinstance(index, int) else -1

    for way in sorted((way for way in document.values if way), key=rank):
        place = document.keys.get(way) or document.values[way]
        key = fields.known_keys().get(generic(way))
        holds_value = key is not None and not key.types & {"sources", "mapping"}
        if holds_value or (way[:2] == ("training", "extra") and len(way) == 3):
            origins[dotted(way)] = place
        else:
            containers[dotted(way)] = place
    return origins, containers
