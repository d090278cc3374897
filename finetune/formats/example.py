"""What a format makes of a row: an example, or faults that say what to mend."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import DataError

Gives = Literal["messages", "prompt_completion", "text"]


@dataclass(frozen=True)
class Conversation:
    """A chat, in the form chat templates take.

    Attributes:
        messages: each with `role`, `content` (text) and whatever else the row gave (tool_calls, reasoning_content).
        tools: JSON schemas of the functions the model may call, or None.
        context: indexes of assistant messages that are shown but never trained.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    context: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt that is shown and a completion that is trained, both plain text without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, all of it trained."""

    text: str


Example = Conversation | PromptCompletion | Text


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a row or a file.

    Attributes:
        field: where in the row, as `messages[2].content`; empty when it is the whole row or file.
        found: what stands there.
        expected: what should stand there.
        fix: what to do.
        place: file and line; empty until a reader fills it in.
    """

    field: str
    found: str
    expected: str
    fix: str
    place: str = ""

    def __str__(self) -> str:
        where = "".join(f"{part}: " for part in (self.place, self.field) if part)
        return f"{where}found {self.found}; expected {self.expected}; {self.fix}"


class RowError(DataError):
    """A row that cannot become an example; `faults` holds everything that is wrong with it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Format:
    """One way rows are written.

    Attributes:
        name: the key in FORMATS.
        gives: what its examples are; a training method declares which of them it takes.
        columns: the columns that tell this format from others.
        recognises: whether a row looks like this format, by its columns.
        to_example: converts a row; raises RowError with all faults of the row.
    """

    name: str
    gives: Gives
    columns: tuple[str, ...]
    recognises: Callable[[dict[str, Any]], bool]
    to_example: Callable[[dict[str, Any]], Example]


def describe(value: Any) -> str:
    """A value as a fault shows it: its kind, and the value itself where it is short."""
    match value:
        case None:
            return "null"
        case bool():
            return f"a boolean ({str(value).lower()})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return f"text ({shorten(value)})" if value else "empty text"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
        case dict():
            return f"an object with keys {', '.join(map(str, value))}" if value else "an empty object"
    return f"a value of type {type(value).__name__}"


def shorten(text: str, limit: int = 40) -> str:
    """`text` in quotes on one line, cut after `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def parsed(value: Any) -> Any:
    """A list or object that was stored as a JSON string, as CSV and Parquet files do; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def text_column(row: dict[str, Any], column: str, faults: list[Fault], *, blank: bool = False) -> str:
    """The text in `column`; a fault is added to `faults` when it is missing, not text, or (unless `blank`) empty."""
    if column not in row:
        faults.append(
            Fault(column, f"no such column among {', '.join(row) or 'none'}", "text", f"add {column!r} to the row")
        )
    elif not isinstance(row[column], str):
        faults.append(Fault(column, describe(row[column]), "text", "write it as a string"))
    elif not blank and not row[column].strip():
        faults.append(Fault(column, describe(row[column]), "text that is not blank", "fill it in or remove the row"))
    else:
        return str(row[column])
    return ""
