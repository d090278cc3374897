"""A recipe written out as YAML that reads back as the same values, with a note where each came from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.recipe import fields
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.origin import dotted, generic, parse_dotted
from finetune.recipe.yaml import resolve_plain

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+-]*")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def recipe_yaml(loaded: LoadedRecipe, derived: Mapping[str, Any] | None = None, origins: bool = False) -> str:
    """The resolved recipe as YAML text that `load_recipe` reads back.

    Args:
        loaded: the recipe.
        derived: computed values by dotted key. Those of recipe keys stand in place of the recipe's; the others, which
            no recipe can set, follow as comments.
        origins: write behind each value where it came from.

    Returns:
        YAML, ending in a newline.
    """
    derived = dict(derived or {})
    settable = {key: value for key, value in derived.items() if _is_key(key)}
    notes = {key: value for key, value in derived.items() if key not in settable}
    lines = []
    for line, key in _lines(loaded.resolved(settable), (), ""):
        comment = f"  # {loaded.origin(key, settable)}" if origins and key else ""
        lines.append(f"{line}{comment}")
    if notes:
        lines += ["", "# Derived when the run was made; not keys of a recipe:"]
        lines += [f"#   {key}: {scalar(value)}" for key, value in notes.items()]
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """A value on one line as YAML; mappings and lists in flow style.

    Raises:
        ValueError: a number that is not finite, which a recipe cannot hold.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a recipe cannot hold {value}")
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(str(name))}: {scalar(item)}' for name, item in value.items())}}}"
    return _text(str(value))


def _is_key(key: str) -> bool:
    return generic(parse_dotted(key)) in fields.known_keys()


def _text(value: str) -> str:
    """Text plain where it reads back as text, else in double quotes."""
    if _PLAIN.fullmatch(value) and len(value) <= 1000:
        try:
            if resolve_plain(value) == value:
                return value
        except ValueError:
            pass
    return '"' + "".join(_letter(letter) for letter in value) + '"'


def _letter(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _lines(value: Mapping[str, Any], path: tuple[str | int, ...], indent: str) -> Iterator[tuple[str, str]]:
    """Each line with the dotted key of the value on it, empty where only a mapping begins."""
    for name, item in value.items():
        way = (*path, name)
        if isinstance(item, dict) and item:
            yield f"{indent}{_text(name)}:", ""
            yield from _lines(item, way, f"{indent}  ")
        elif isinstance(item, list) and item and all(isinstance(part, dict) and part for part in item):
            yield f"{indent}{_text(name)}:", ""
            for index, part in enumerate(item):
                for number, (line, key) in enumerate(_lines(part, (*way, index), f"{indent}    ")):
                    yield (f"{indent}  - {line.lstrip()}" if number == 0 else line), key
        else:
            yield f"{indent}{_text(name)}: {scalar(item)}", dotted(way)
