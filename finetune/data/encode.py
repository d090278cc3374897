"""Text and spans become token ids and trained ranges, so that the context's ids are those a server would send.

A server encodes the prompt alone; the model's answer begins at a token of its own. Encoding prompt and answer as one
text can merge across the border (a newline that ends the prompt with one that begins the answer). So a text is encoded
whole and in pieces cut at the borders: when both give the same ids, every border lies between tokens and the prompt's
ids are the served ones. When they differ, each turn is encoded as it is served, prompt and answer apart, and turns
whose ids then no longer agree become rows of their own.

No offsets are used, which tokenizers trim, so slow tokenizers take the same path. Trained ranges come from positions
alone: the pad token plays no part, whichever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from finetune.data.render import WHOLE, ChatTemplate, Rendering, Span
from finetune.errors import DataError
from finetune.formats.example import Fault, PromptCompletion, RowError, Text, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
UNTRAINED = -100


@dataclass(frozen=True)
class Tokens:
    """One row of tokens.

    Attributes:
        ids: token ids.
        trained: ranges [start, end) of ids that are trained, in order.
        turn: index of the last message that is trained, or WHOLE where the row is its only one.
    """

    ids: Ids
    trained: tuple[tuple[int, int], ...]
    turn: int = WHOLE


def encode(
    renderings: Sequence[Rendering], template: ChatTemplate, stop_ids: frozenset[int]
) -> list[list[Tokens] | RowError]:
    """Encode chats.

    Args:
        renderings: rows as text.
        template: what rendered them, with its tokenizer.
        stop_ids: tokens that end a turn. A trained span is cut after the last of them, so that the newline which
            ChatML writes after <|im_end|> is not trained: no server lets a model write it.

    Returns:
        For each rendering its rows (one, unless borders merge), or the error that a turn has no stop token.
    """
    cuts = [sorted({0, *(edge for span in r.spans for edge in (span.start, span.end))}) for r in renderings]
    pieces = [[r.text[a:b] for a, b in pairwise(edges)] for r, edges in zip(renderings, cuts, strict=True)]
    flat = iter(_ids(template.tokenizer, [*(r.text for r in renderings), *(p for group in pieces for p in group)]))
    wholes = [next(flat) for _ in renderings]
    found: list[list[Tokens] | RowError] = []
    for rendering, edges, whole in zip(renderings, cuts, wholes, strict=True):
        parts = [next(flat) for _ in edges[1:]]
        try:
            if [token for part in parts for token in part] == whole:
                at = {0: 0}
                for edge, part, before in zip(edges[1:], parts, edges, strict=False):
                    at[edge] = at[before] + len(part)
                ranges = [_cut(whole, at[s.start], at[s.end], s, template, stop_ids) for s in rendering.spans]
                found.append([Tokens(whole, tuple(ranges), rendering.spans[-1].turn)])
            else:
                found.append(_as_served(rendering, template, stop_ids))
        except RowError as error:
            found.append(error)
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Ids of each text, nothing added."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _cut(
    ids: Ids, start: int, end: int, span: Span, template: ChatTemplate, stop_ids: frozenset[int]
) -> tuple[int, int]:
    """The trained range of a span: up to and with its last stop token."""
    if span.turn == WHOLE:
        return start, end
    for position in range(end - 1, start - 1, -1):
        if ids[position] in stop_ids:
            return start, position + 1
    stops = ", ".join(f"{text} ({token})" for text, token in zip(template.stops, sorted(stop_ids), strict=False))
    found = f"no end-of-turn token in what the {template.name} writes for this turn"
    fix = "set data.chat_template to a template that ends turns with one: a model trained without would never stop"
    raise RowError([Fault(f"messages[{span.turn}]", found, f"one of {stops or 'none known'}", fix)])


def _as_served(rendering: Rendering, template: ChatTemplate, stop_ids: frozenset[int]) -> list[Tokens]:
    """Each turn with its prompt and answer encoded as in serving; turns that agree share a row."""
    rows: list[tuple[Ids, list[tuple[int, int]], int]] = []
    for span in reversed(rendering.spans):
        prompt_text, answer = rendering.text[: span.start], rendering.text[span.start : span.end]
        prompt, ids = joined_ids(template.tokenizer, prompt_text, answer)
        start, end = _cut(ids, len(prompt), len(ids), span, template, stop_ids)
        holder = next((ranges for row, ranges, _ in rows if row[:end] == ids[:end]), None)
        if holder is None:
            rows.append((ids, [(start, end)], span.turn))
        else:
            holder.insert(0, (start, end))
    return [Tokens(ids, tuple(ranges), turn) for ids, ranges, turn in reversed(rows)]


def joined_ids(tokenizer: PreTrainedTokenizerBase, prompt_text: str, answer: str) -> tuple[Ids, Ids]:
    """Ids of the prompt, and of prompt and answer such that they begin with the former.

    Raises:
        RowError: the two encoded apart do not decode to their text, as where a tokenizer puts a space before any text.
    """
    prompt, whole = _ids(tokenizer, [prompt_text, prompt_text + answer])
    if whole[: len(prompt)] == prompt:
        return prompt, whole
    apart = prompt + _ids(tokenizer, [answer])[0]
    if tokenizer.decode(apart, skip_special_tokens=False) != tokenizer.decode(whole, skip_special_tokens=False):
        found = f"text that this tokenizer cannot split between {shorten(prompt_text[-20:])} and {shorten(answer[:20])}"
        raise RowError([Fault("", found, "a border between tokens", "begin the answer with other characters")])
    return prompt, apart


def encode_plain(
    examples: Iterable[PromptCompletion | Text], tokenizer: PreTrainedTokenizerBase
) -> list[list[Tokens] | RowError]:
    """Encode plain texts: BOS where the tokenizer puts one by default, EOS exactly once, trained.

    Raises:
        DataError: the tokenizer has no EOS, so a model could not learn to stop.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos_token, which ends plain text; set eos_token in its "
            "tokenizer_config.json"
        )
    bos = tokenizer.bos_token_id
    lead = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []
    found: list[list[Tokens] | RowError] = []
    for example in examples:
        try:
            if isinstance(example, Text):
                start, ids = 0, _ids(tokenizer, [example.text])[0]
            else:
                prompt, ids = joined_ids(tokenizer, example.prompt, example.completion)
                start = len(prompt)
        except RowError as error:
            found.append(error)
            continue
        if lead and ids[:1] != lead:
            ids, start = lead + ids, start + 1 if start else 0
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        found.append([Tokens(ids, ((start, len(ids)),))])
    return found
