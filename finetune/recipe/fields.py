"""The facts of every recipe key, taken from the sections: where it lives, what it accepts, what it does.

A key inside a list of sources is written with empty brackets: `data.train[].path`.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finetune.recipe.section import Section
from finetune.recipe.sections import Recipe


@dataclass(frozen=True)
class Key:
    """One key that a recipe may hold."""

    path: str
    section: str
    """The key of the section it belongs to; empty at the top level."""
    name: str
    help: str
    expected: str
    """What may be written, in words: "a number above 0"."""
    choices: tuple[str, ...]
    """The words that may be written, where only some may."""
    required: bool
    default: Any
    """Plain value as YAML writes it; None where there is none or where the key is required."""
    types: frozenset[str]
    """Of text, integer, number, boolean, null, texts, sources, mapping."""


def union_parts(annotation: Any) -> list[Any]:
    """The alternatives of a type, with nested unions and `Annotated` kept whole as one alternative each."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [part for item in typing.get_args(annotation) for part in union_parts(item)]
    return [annotation]


def source_type(annotation: Any) -> type[Section] | None:
    """The section that a field holds a list of, or None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and isinstance(arguments[0], type) and issubclass(arguments[0], Section):
        return arguments[0]
    return None


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Every section by its key; the empty key is the recipe itself."""
    found: dict[str, type[Section]] = {"": Recipe}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
            for inner, inner_field in field.annotation.model_fields.items():
                source = source_type(inner_field.annotation)
                if source is not None:
                    found[f"{name}.{inner}[]"] = source
    return found


@functools.cache
def known_keys() -> dict[str, Key]:
    """Every key of a recipe that holds a value, by its dotted name, in the order of the sections."""
    found: dict[str, Key] = {}
    for section, model in sections().items():
        for name, field in model.model_fields.items():
            path = f"{section}.{name}" if section else name
            if path not in sections():
                found[path] = _key(section, path, name, field)
    return found


def names(section: str) -> list[str]:
    """The keys that may stand directly in a section, sections included."""
    return list(sections()[section].model_fields)


def homes(name: str) -> list[str]:
    """The sections that have a key of this name, outermost first."""
    return [section for section, model in sections().items() if name in model.model_fields]


def plain(value: Any) -> Any:
    """A field's value as YAML holds it: tuples become lists, sections mappings."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _key(section: str, path: str, name: str, field: FieldInfo) -> Key:
    kinds: list[str] = []
    choices: list[str] = []
    words: list[str] = []
    for part in union_parts(field.annotation):
        kind, word, some = _alternative(part, field.metadata)
        kinds.append(kind)
        words.append(word)
        choices += some
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if choices:
        words = [word for word in words if word] + [_one_of(choices)]
    return Key(
        path=path,
        section=section,
        name=name,
        help=" ".join((field.description or "").split()),
        expected=", or ".join(word for word in words if word),
        choices=tuple(choices),
        required=field.is_required(),
        default=None if default is PydanticUndefined else plain(default),
        types=frozenset(kinds),
    )


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"


def _items(item: Any) -> str:
    """What stands in a list, in words."""
    if typing.get_origin(item) is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(item))
    kinds = {item, *typing.get_args(item)}
    if int in kinds:
        return "whole numbers and ranges" if str in kinds else "whole numbers"
    return "texts"


def _alternative(part: Any, metadata: list[Any]) -> tuple[str, str, list[str]]:
    """Kind, words and choices of one alternative of a type."""
    if typing.get_origin(part) is typing.Annotated:
        part, *inner = typing.get_args(part)
        metadata = [constraint for item in inner for constraint in getattr(item, "metadata", [item])]
    if typing.get_origin(part) is Literal:
        return "text", "", [str(choice) for choice in typing.get_args(part)]
    if source_type(part) is not None:
        return "sources", "a path, or a list of sources", []
    if typing.get_origin(part) is tuple:
        return "texts", f"a list of {_items(typing.get_args(part)[0])}", []
    if typing.get_origin(part) is dict:
        return "mapping", "a mapping of names to values", []
    if part is types.NoneType:
        return "null", "null", []
    if part is bool:
        return "boolean", "true or false", []
    if part is int:
        return "integer", f"a whole number{_bounds(metadata)}", []
    if part is float:
        return "number", f"a number{_bounds(metadata)}", []
    assert part is str, f"no words for the type {part!r}"
    pattern = next((item.pattern for item in metadata if getattr(item, "pattern", None)), None)
    if pattern:
        return "text", f"text of the form {pattern}", []
    if any(isinstance(item, annotated_types.MinLen) for item in metadata):
        return "text", "text, not empty", []
    return "text", "text", []


def _bounds(metadata: list[Any]) -> str:
    low = next((item.ge for item in metadata if isinstance(item, annotated_types.Ge)), None)
    high = next((item.le for item in metadata if isinstance(item, annotated_types.Le)), None)
    if low is not None and high is not None:
        return f" from {low} to {high:,}"
    words = []
    for item in metadata:
        match item:
            case annotated_types.Ge():
                words.append(f"of at least {item.ge}")
            case annotated_types.Gt():
                words.append(f"above {item.gt}")
            case annotated_types.Le():
                words.append(f"of at most {item.le}")
            case annotated_types.Lt():
                words.append(f"below {item.lt}")
    return f" {' and '.join(words)}" if words else ""
