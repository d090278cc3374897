"""One side of a row (its prompt, or one of its answers), which files write in five ways.

They are plain text, a message, a list of messages, and a ShareGPT turn or a list of them.
"""

from __future__ import annotations

from typing import Any

from finetune.formats.example import Fault, Messages, as_turns, parsed, text_column
from finetune.formats.messages import chat, is_answer
from finetune.formats.sharegpt import turns_as_messages


def side(row: dict[str, Any], column: str, faults: list[Fault]) -> Messages | str:
    """What stands in `column`: plain text, or checked messages.

    Args:
        row: the raw row.
        column: which side.
        faults: every fault found is added here; the result is only usable when none was.
    """
    value = parsed(row.get(column))
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list | tuple) and turns and all(isinstance(turn, dict) for turn in turns):
        if all("role" in turn for turn in turns):
            return tuple(chat(turns, column, faults)[0])
        if all("from" in turn for turn in turns):
            return tuple(turns_as_messages(list(turns), column, faults)[0])
    if isinstance(row.get(column), list | tuple | dict):
        return tuple(chat(turns, column, faults)[0])  # which says what is wrong with it
    return text_column(row, column, faults)


def answer(value: Messages | str, column: str, faults: list[Fault]) -> Messages:
    """An answer as messages, of which the first must be an assistant's."""
    messages = as_turns(value, "assistant")
    if messages and not is_answer(messages[0]):
        found = f"a {messages[0]['role']} message first"
        faults.append(Fault(column, found, "an assistant message", "move what is not the answer to the prompt"))
    return messages
