"""Single values of a launcher's configuration, which a file, JSON and variables give in different forms."""

from __future__ import annotations

import re
from typing import Any

from finetune.errors import RecipeError

YES = ("true", "1", "yes", "y", "on", "t")
NO = ("false", "0", "no", "n", "off", "f")


def is_yes(value: Any) -> bool:
    """Whether a value says yes, as accelerate reads it."""
    return str(value).lower() in YES


def whole(value: Any, where: str, most: int | None = None) -> int:
    """A whole number, as a file or a variable gives it.

    Raises:
        RecipeError: it is none, or above `most`.
    """
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]+", str(value)) or (most is not None and int(value) > most):
        limit = "" if most is None else f" from 0 to {most}"
        raise RecipeError(f"{where}: expected a whole number{limit}, not {value!r}")
    return int(value)


def one_of(value: Any, words: tuple[str, ...], where: str) -> str:
    """One of the words, whatever its case.

    Raises:
        RecipeError: it is none of them.
    """
    if found := next((word for word in words if word.lower() == str(value).lower()), None):
        return found
    raise RecipeError(f"{where}: expected {', '.join(words[:-1])} or {words[-1]}, not {value!r}")
