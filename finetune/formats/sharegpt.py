"""ShareGPT's chats: `conversations` of turns with `from` (human, gpt, system, tool…) and `value`.

A `system` column, where it is not empty, becomes the system message.

Example row:
    {"conversations": [{"from": "human", "value": "Is 7 prime?"}, {"from": "gpt", "value": "Yes."}]}
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune.formats.example import Conversation, Fault, Format, RowError, describe, parsed, text_column
from finetune.formats.messages import FOREIGN_ROLES, ROLES, chat, is_answer, no_answer, tool_schemas

KNOWN = (*FOREIGN_ROLES, *ROLES)


def _column(row: dict[str, Any]) -> str:
    return "conversation" if "conversations" not in row and "conversation" in row else "conversations"


def recognises(row: dict[str, Any]) -> bool:
    """Whether the row has `conversations` whose turns are not role-and-content messages."""
    if _column(row) not in row:
        return False
    turns = parsed(row[_column(row)])
    return not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0])


def to_example(row: dict[str, Any]) -> Conversation:
    """The row as a chat.

    Raises:
        RowError: a turn has no known speaker or no usable value, or no answer could be trained.
    """
    faults: list[Fault] = []
    column = _column(row)
    turns = parsed(row.get(column))
    if not isinstance(turns, list) or not turns:
        found = describe(turns) if column in row else f"no such column among {', '.join(row) or 'none'}"
        raise RowError([Fault(column, found, "a list of turns", "give it at least a human and a gpt turn")])
    messages: list[Any] = [_message(turn, f"{column}[{index}]", faults) for index, turn in enumerate(turns)]
    offset = 0
    if row.get("system") is not None and (system := text_column(row, "system", faults, blank=True)).strip():
        messages.insert(0, {"role": "system", "content": system})
        offset = 1
    if faults:
        raise RowError(faults)
    checked: list[Fault] = []
    conversation, context = chat(messages, column, checked)
    faults = [_in_turns(fault, column, offset) for fault in checked]
    tools = tool_schemas(row.get("tools"), faults)
    if not faults and not any(map(is_answer, conversation)):
        faults.append(no_answer(column, conversation))
    if faults:
        raise RowError(faults)
    return Conversation(tuple(conversation), tools, frozenset(context))


def _message(turn: Any, where: str, faults: list[Fault]) -> dict[str, Any]:
    """A turn under the names that messages use."""
    if not isinstance(turn, dict):
        faults.append(Fault(where, describe(turn), "an object with from and value", "write the turn as an object"))
        return {}
    speaker = turn.get("from")
    role = FOREIGN_ROLES.get(speaker, speaker) if isinstance(speaker, str) else None
    if role not in ROLES:
        found = "nothing" if speaker is None else describe(speaker)
        faults.append(Fault(f"{where}.from", found, f"one of {', '.join(KNOWN)}", "correct the speaker"))
    message: dict[str, Any] = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**message, "role": role, "content": turn.get("value")}


def _in_turns(fault: Fault, column: str, offset: int) -> Fault:
    """A fault about messages, told in this format's words and counted as the file counts."""
    field = fault.field.replace(".content", ".value").replace(".role", ".from")
    head, bracket, rest = field.partition("[")
    number, _, tail = rest.partition("]")
    if bracket and head == column:
        field = f"{column}[{int(number) - offset}]{tail}" if int(number) >= offset else f"system{tail}"
    return dataclasses.replace(fault, field=field)


FORMAT = Format("sharegpt", "messages", ("conversations",), recognises, to_example)
