"""One key of a loaded recipe: its value, where that came from, and what the key does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.recipe import fields
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.origin import Origin, generic, parse_dotted


@dataclass(frozen=True)
class Explanation:
    """What there is to know about one key."""

    key: str
    value: Any
    """Plain value; of a section, the mapping of its keys."""
    origin: Origin
    help: str
    """The line under the field, or the section's docstring."""
    expected: str
    """What may be written, in words: "a number above 0"."""
    allowed: tuple[str, ...]
    """The words that may be written, or the keys of a section; empty where there is no such list."""
    default: Any
    """None where there is none."""
    required: bool

    def to_json(self) -> dict[str, Any]:
        """As a plain mapping for `--json`."""
        return {
            "key": self.key,
            "value": self.value,
            "origin": str(self.origin),
            "help": self.help,
            "expected": self.expected,
            "allowed": list(self.allowed),
            "default": self.default,
            "required": self.required,
        }


def explain(loaded: LoadedRecipe, key: str, derived: Mapping[str, Any] | None = None) -> Explanation:
    """Explain a dotted key, as training.learning_rate or data.train[0].path, or a section.

    Args:
        loaded: the recipe.
        key: the key.
        derived: computed values by dotted key, which replace those of the recipe.

    Raises:
        RecipeError: the recipe has no such key; the nearest is named.
    """
    derived = derived or {}
    value = derived[key] if key in derived else loaded.value(key)
    path = parse_dotted(key)
    origin = loaded.origin(key, derived)
    section = fields.sections().get(generic(path))
    if section is not None:
        help_text = " ".join((section.__doc__ or "").split())
        names = tuple(section.model_fields)
        return Explanation(key, value, origin, help_text, "a section with keys below it", names, None, False)
    while generic(path) not in fields.known_keys() and len(path) > 1:
        path = path[:-1]  # an item of a list, or a name under training.extra
    fact = fields.known_keys().get(generic(path))
    if fact is None:  # a derived value that no recipe can set
        return Explanation(key, value, origin, "Computed for the run; not a key of a recipe.", "", (), None, False)
    return Explanation(key, value, origin, fact.help, fact.expected, fact.choices, fact.default, fact.required)
