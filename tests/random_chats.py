"""Random chats: roles, tools, calls, reasoning, blanks, scripts, and words that look like a tokenizer's own tokens.

Everything is drawn from one `random.Random`, so that hypothesis can drive it (`st.randoms()`) and so that ten thousand
chats are made in a second from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from finetune.formats.example import Conversation

WORDS = (
    "Hello", "yes", "no", "42", "3.14", "1234567", "def f(x):", "return x**2", "答え", "中文，标点。", "e\u0301",
    "🙂🙂", "👩\u200d👩\u200d👧", "naïve", "{{ x }}", "{% if %}", "assistant", "im_end", "<|im", "|>",
    "a\n\nb", "don't", "العربية", "\u00a0", "\u200b", "\t", "\r\n", "<s", "[INST", "<think", "<br>", "'", '"', "\\n",
)  # fmt: skip
BLANKS = ("", "", "", " ", "\n", "\n\n", "  \n", "\t", "\r\n", "\u00a0", "\u3000")
TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<think>\nHm.\n</think>\n\n",
    "<tool_response>x</tool_response>",
)
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Gives the {name}.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "where"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
    for name in ("weather", "time")
)


@dataclass(frozen=True)
class Kinds:
    """What chats may hold.

    Attributes:
        system, tools, reasoning: whether they may.
        tags: whether texts may hold tags of reasoning and of calls.
        tokens: look-alikes that texts may hold.
        alternating: users and assistants take turns, as some templates demand.
        tame: texts begin and end with letters, as nearly all do.
    """

    system: bool = True
    tools: bool = True
    reasoning: bool = True
    tags: bool = True
    tokens: Sequence[str] = ()
    alternating: bool = False
    tame: bool = False


def text(draw: Random, kinds: Kinds, *, filled: bool = False) -> str:
    """A text, often short, sometimes empty unless `filled`."""
    while True:
        pieces = []
        for _ in range(draw.choice((0, 1, 1, 2, 3, 5))):
            luck = draw.random()
            if kinds.tokens and luck < 0.04:
                pieces.append(draw.choice(list(kinds.tokens)))
            elif kinds.tags and luck < 0.07:
                pieces.append(draw.choice(TAGS))
            elif luck < 0.12:
                first, last = draw.choice(((32, 127), (0xA1, 0xD7FF), (0x1F600, 0x1F640)))
                pieces.append(chr(draw.randrange(first, last)))
            else:
                pieces.append(draw.choice(WORDS))
        edges = ("", "") if kinds.tame else (draw.choice(BLANKS), draw.choice(BLANKS))
        made = edges[0] + draw.choice((" ", " ", "", "\n")).join(pieces) + edges[1]
        if kinds.tame:
            made = f"So {made} it is"
        if made.strip() or not filled:
            return made


def chat(draw: Random, kinds: Kinds) -> Conversation:
    """A chat of one to four exchanges."""
    messages: list[dict[str, Any]] = []
    tools = TOOLS[: draw.choice((1, 2))] if kinds.tools and draw.random() < 0.3 else None
    if kinds.system and draw.random() < 0.4:
        messages.append({"role": "system", "content": text(draw, kinds)})
    for _ in range(draw.choice((1, 1, 2, 2, 3, 4))):
        messages.append({"role": "user", "content": text(draw, kinds)})
        if not kinds.alternating and draw.random() < 0.04:
            messages.append({"role": "user", "content": text(draw, kinds)})
        while tools and draw.random() < 0.5:
            messages.append(_answer(draw, kinds, calls=True))
            calls = messages[-1]["tool_calls"]
            messages += [{"role": "tool", "content": text(draw, kinds), "name": "weather"} for _ in calls]
        messages.append(_answer(draw, kinds))
        if not kinds.alternating and draw.random() < 0.04:
            messages.append(_answer(draw, kinds))
    return Conversation(tuple(messages), tools)


def _answer(draw: Random, kinds: Kinds, calls: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": text(draw, kinds, filled=not calls)}
    if kinds.reasoning and draw.random() < 0.3:
        made["reasoning_content"] = text(draw, kinds)
    if calls:
        if draw.random() < 0.6:
            made["content"] = ""
        made["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": {"place": text(draw, kinds), "days": draw.randrange(9)}},
            }
            for _ in range(draw.choice((1, 1, 2)))
        ]
    return made
