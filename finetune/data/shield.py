"""What looks like a control token in a row's own words is kept from becoming one.

Such words are marked before the template renders them and encoded apart, as ordinary text, afterwards. The tokens that
the template writes itself are not marked. transformers does the same under `sanitize_control_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune.data.template import Control
from finetune.formats.example import Conversation, Fault, RowError

OPEN, CLOSE = "\ufdd2", "\ufdd3"  # noncharacters of Unicode, which no text may hold
MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")


def shielded(conversation: Conversation, control: Control) -> Conversation:
    """The chat with every look-alike in its texts marked; the same chat when there is none.

    Raises:
        RowError: a text holds the noncharacters that mark.
    """
    texts = list(_texts([conversation.messages, conversation.tools]))
    for text in texts:
        if not text.isascii() and (found := NONCHARACTERS.search(text)):
            what = f"the noncharacter U+{ord(found.group()):04X}"
            raise RowError([Fault("", what, "text", "remove it: Unicode reserves it")])
    if not any(map(control.within, texts)):
        return conversation
    messages = tuple({**_marked(message, control), "role": message["role"]} for message in conversation.messages)
    tools = tuple(_marked(tool, control) for tool in conversation.tools) if conversation.tools else conversation.tools
    return replace(conversation, messages=messages, tools=tools)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _marked(value: Any, control: Control) -> Any:
    if isinstance(value, str):
        return control.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", value)
    if isinstance(value, dict):
        return {key: _marked(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, control) for item in value]
    return value


def pieces(text: str) -> list[tuple[str, bool]]:
    """A rendered text in pieces: (text, whether control tokens in it are the template's)."""
    found: list[tuple[str, bool]] = []
    at = 0
    for match in MARKED.finditer(text):
        found.append((text[at : match.start()], True))
        if match.group(1):
            found.append((match.group(1), False))
        at = match.end()
    found.append((text[at:], True))
    return [(piece, free) for piece, free in found if piece]
