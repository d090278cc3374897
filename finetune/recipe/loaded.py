"""A recipe as loaded: its sections, and where each value came from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError
from finetune.recipe import fields
from finetune.recipe.origin import DEFAULT, DERIVED, Origin, dotted, generic, parse_dotted
from finetune.recipe.section import Section
from finetune.recipe.sections import Recipe
from finetune.recipe.unknown import unknown_key


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe together with the provenance of its values. Made by `finetune.recipe.load.load_recipe`."""

    path: Path
    """The recipe file, as it was named."""
    files: tuple[Path, ...]
    """Every file that was read: the recipe, then what it extends, nearest first."""
    overrides: tuple[str, ...]
    """The command line's `section.key=value`, in order."""
    recipe: Recipe
    origins: Mapping[str, Origin]
    """Where each key that the user set was set; keys are dotted, as data.train[0].path."""
    containers: Mapping[str, Origin]
    """Where sections, lists and list items begin that the user wrote."""

    def origin(self, key: str, derived: Collection[str] = ()) -> Origin:
        """Where the value of a dotted key came from; `derived` names keys whose value was computed."""
        if key in derived:
            return DERIVED
        return self.origins.get(key) or self.containers.get(key) or DEFAULT

    def set_keys(self) -> tuple[str, ...]:
        """The dotted keys that hold a value and that a file or an override set, in the order of the sections."""
        return tuple(self.origins)

    def unread(self, sections: Collection[str] | None = None) -> tuple[str, ...]:
        """The keys the user set that nothing has read.

        Args:
            sections: look only at these top-level keys, because a verb that does not evaluate reads no `evaluate`.

        Returns:
            Dotted keys, empty when every one was read.
        """
        return tuple(
            key
            for key in self.origins
            if (sections is None or parse_dotted(key)[0] in sections) and not _was_read(self.recipe, key)
        )

    def is_default(self, key: str) -> bool:
        """Whether a dotted key has its default value, however it came to it."""
        known = fields.known_keys().get(generic(parse_dotted(key)))
        return known is not None and self.value(key) == known.default

    def resolved(self, derived: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every key with its value, as plain dict, list, str, int, float, bool and None.

        Args:
            derived: values for dotted keys that replace what the recipe says, such as what `auto` became. Only keys
                of a recipe can be given, so that the result can be loaded again.

        Raises:
            KeyError: a derived key that no recipe has; a defect of the caller.
        """
        values: dict[str, Any] = self.recipe.model_dump(mode="json")
        for key, value in (derived or {}).items():
            place, path = values, parse_dotted(key)
            if generic(path) not in fields.known_keys():
                raise KeyError(f"no recipe has the key {key!r}")
            for part in path[:-1]:
                place = place[part]  # type: ignore[index]
            place[path[-1]] = copy.deepcopy(value)  # type: ignore[index]
        return values

    def hash(self) -> str:
        """Hex SHA-256 of the resolved recipe: equal for recipes that say the same, however they are written."""
        text = json.dumps(self.resolved(), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def value(self, key: str) -> Any:
        """The value of a dotted key, plain as in `resolved`; of a section, the mapping of its keys.

        Raises:
            RecipeError: a key that this recipe does not have.
        """
        path = parse_dotted(key)
        value: Any = self.resolved()
        for depth, part in enumerate(path):
            named = isinstance(value, dict) and isinstance(part, str) and part in value
            counted = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not (named or counted):
                raise RecipeError(f"{self.path}: {key}: {_no_such(path[:depth], part, value)}")
            value = value[part]
        if not path:
            raise RecipeError(f"{self.path}: name a key, as training.learning_rate")
        return value


def _no_such(parent: tuple[str | int, ...], part: str | int, value: Any) -> str:
    if isinstance(value, list):
        items = f"{dotted(parent)}[0] to {dotted(parent)}[{len(value) - 1}]" if value else "none"
        return f"{dotted(parent)} is a list; its items are {items}"
    section = generic(parent)
    if section in fields.sections():
        return unknown_key(section, str(part)).message
    if isinstance(value, dict):
        return f"{dotted(parent)} holds {', '.join(map(str, value)) or 'nothing'}"
    return f"{dotted(parent)} holds a value and has no keys"


def _was_read(recipe: Recipe, key: str) -> bool:
    """Whether the field that a dotted key ends in was read; looks at `__dict__`, which marks nothing as read."""
    place: Any = recipe
    for part in parse_dotted(key):
        if isinstance(place, Section):
            value = place.__dict__[str(part)]
            nested = isinstance(value, Section) or (
                isinstance(value, tuple) and any(isinstance(item, Section) for item in value)
            )
            if not nested:
                return str(part) in place.reads()
            place = value
        elif isinstance(place, tuple) and isinstance(part, int):
            place = place[part]
    return True
