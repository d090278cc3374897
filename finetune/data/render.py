"""A chat becomes text, with the places of what is trained, by asking the chat template what a server would ask it.

For assistant turn i a server renders the messages before it with the generation prompt, and the model writes the rest.
So that rendering is the turn's context, and what the rendering through turn i has beyond it is what is trained. The
places come from the lengths of these renderings; nothing is searched for in the text, so what messages contain, or
what the template's markers look like, plays no part.

Three kinds of template need more:

History rewritten: Qwen3 and others leave the reasoning of earlier turns out. Then a later turn's context does not begin
with what an earlier turn wrote, and no single text holds both as they are served. The chat becomes several rows, as few
as hold every turn in the context that a server would send.

A generation prompt that says more than the finished turn does: where it adds a closed block (such as an empty pair of
think tags), the row is that prompt and the answer, because that is what is served. Where it opens a block that the
finished turn does not have (DeepSeek-R1 opens <think> and drops the reasoning), no row could equal serving: refused.

No end-of-turn token of its own: GLM-4 ends a turn with the next turn's role token. What the template writes next is
looked at, and when it begins with a stop token, that token belongs to the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import DataError
from finetune.formats.example import Conversation, Fault, RowError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last_assistant", "all"]
WHOLE = -1
TAG = re.compile(r"<(/?)([A-Za-z_][\w-]*)>")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text, trained as message `turn`; WHOLE when they are no single message."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True)
class Rendering:
    """One row as text. Spans are in order, do not overlap, and the last one ends where the text ends."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or one from a file in its place.

    Attributes:
        tokenizer: what renders it.
        source: Jinja text, or None for the tokenizer's own.
        name: how errors call it.
        stops: the texts of the tokens that end a turn.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str | None
    name: str
    stops: tuple[str, ...]

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, *, asking: bool = False
    ) -> str:
        """The text of `messages`; with `asking`, followed by the generation prompt.

        Raises:
            RowError: the template refuses the messages or fails on them.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    chat_template=self.source,
                    add_generation_prompt=asking,
                    tokenize=False,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages) or "none"
            found = f"messages that the {self.name} refuses ({type(error).__name__}: {error}); roles {roles}"
            fix = "change the messages, or set data.chat_template to a template that takes them"
            raise RowError([Fault("messages", found, "messages the template takes", fix)]) from error


def chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None, stop_ids: frozenset[int]) -> ChatTemplate:
    """The template chats are rendered with.

    Args:
        tokenizer: the base model's.
        file: a Jinja file that replaces its template, or None.
        stop_ids: the tokens that end a turn.

    Raises:
        DataError: the file cannot be read, or there is no template at all.
    """
    stops = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(stop_ids)) if token)
    if file is not None:
        try:
            source = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"data.chat_template: {file}: cannot be read ({reason}); name a Jinja file") from error
        return ChatTemplate(tokenizer, source, f"chat template {file}", stops)
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {name} has no chat template, and the data holds chats; set data.chat_template to a "
            "Jinja file, name an instruction-tuned base model, or give prompt and completion as plain text"
        )
    return ChatTemplate(tokenizer, None, f"chat template of {name}", stops)


def trained_turns(conversation: Conversation, loss_on: LossOn) -> list[int]:
    """Indexes of the messages that are trained, `all` aside: assistant turns that answer something.

    An assistant message that opens a chat answers nothing, so no server could ask for it: it is context.
    """
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if index and message["role"] == "assistant" and index not in conversation.context
    ]
    return turns[-1:] if loss_on == "last_assistant" else turns


def render(conversation: Conversation, template: ChatTemplate, loss_on: LossOn) -> list[Rendering]:
    """The row or rows that a chat becomes, in order of their last turn.

    Messages after the last trained turn are left out, since nothing that is trained could see them.

    Raises:
        RowError: the template refuses the messages, or no turn is trained.
        DataError: the template's generation prompt cannot be reconciled with its finished turns.
    """
    if loss_on == "all":
        text = template.render(conversation.messages, conversation.tools)
        return [Rendering(text, (Span(0, len(text), WHOLE),))]
    turns = trained_turns(conversation, loss_on)
    if not turns:
        found, expected = "no assistant turn that is trained", "one after another message and without weight: 0"
        raise RowError([Fault("messages", found, expected, "add one or remove the row")])
    rows: list[tuple[str, list[Span]]] = []
    for turn in reversed(turns):
        prompt, whole = _turn(conversation, turn, template)
        span = Span(len(prompt), len(whole), turn)
        holder = next((spans for text, spans in rows if text.startswith(whole)), None)
        if holder is None:
            rows.append((whole, [span]))
        else:
            holder.insert(0, span)
    return [Rendering(text, tuple(spans)) for text, spans in reversed(rows)]


def _turn(conversation: Conversation, turn: int, template: ChatTemplate) -> tuple[str, str]:
    """What a server sends to ask for `turn`, and the same with the answer and its end."""
    messages, tools = conversation.messages, conversation.tools
    prompt = template.render(messages[:turn], tools, asking=True)
    through = template.render(messages[: turn + 1], tools)
    whole = through if through.startswith(prompt) else _joined(prompt, through, conversation, turn, template)
    if whole[len(prompt) :].rstrip().endswith(template.stops):
        return prompt, whole
    return prompt, whole + _next_turns_stop(through, conversation, turn, template)


def _joined(prompt: str, through: str, conversation: Conversation, turn: int, template: ChatTemplate) -> str:
    """The served prompt and the answer, where the finished turn does not begin with the prompt.

    Where the answer begins is found with two answers that share no first character: their renderings agree exactly up
    to it.
    """
    messages, tools = conversation.messages, conversation.tools
    probes = [
        template.render((*messages[:turn], {**messages[turn], "content": mark}), tools) for mark in ("0 0", "1 1")
    ]
    header = _shared_start(*probes)
    known = bool(messages[turn]["content"].strip()) and prompt.startswith(header) and through.startswith(header)
    added = prompt[len(_shared_start(prompt, through)) :]
    if known and _closed(prompt[len(header) :]):
        return prompt + through[len(header) :]
    raise DataError(
        f"the {template.name} asks for an answer with {shorten(added)}, which its finished turns do not have "
        f"(messages[{turn}]): no row could equal what a server sends. Set data.chat_template to a copy of the template "
        "whose generation prompt is how an assistant turn begins"
    )


def _shared_start(one: str, other: str) -> str:
    """What both texts begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _closed(text: str) -> bool:
    """Whether every tag that `text` opens is closed in it."""
    open_tags: list[str] = []
    for closing, name in TAG.findall(text):
        if not closing:
            open_tags.append(name)
        elif not open_tags or open_tags.pop() != name:
            return False
    return not open_tags


def _next_turns_stop(through: str, conversation: Conversation, turn: int, template: ChatTemplate) -> str:
    """The stop token with which whatever follows `turn` begins; empty when it begins with none."""
    rest = conversation.messages[turn + 1 : turn + 2]
    if not rest or rest[0]["role"] == "assistant":
        role = "tool" if conversation.messages[turn].get("tool_calls") else "user"
        rest = ({"role": role, "content": "0"},)
    try:
        longer = template.render((*conversation.messages[: turn + 1], *rest), conversation.tools)
    except RowError:
        return ""
    following = longer[len(through) :] if longer.startswith(through) else ""
    return max((stop for stop in template.stops if following.startswith(stop)), key=len, default="")
