"""Plain text, all of it trained: continued pre-training.

Example row:
    {"text": "A lathe turns the work while the tool stands still."}
"""

from __future__ import annotations

from typing import Any

from finetune.formats.example import Fault, Format, RowError, Text, text_column


def recognises(row: dict[str, Any]) -> bool:
    """Whether the row has a `text` column."""
    return "text" in row


def to_example(row: dict[str, Any]) -> Text:
    """The row's text.

    Raises:
        RowError: `text` is missing, blank or not text.
    """
    faults: list[Fault] = []
    text = text_column(row, "text", faults)
    if faults:
        raise RowError(faults)
    return Text(text)


FORMAT = Format("text", "text", ("text",), recognises, to_example)
