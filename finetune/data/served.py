"""Is every answer trained behind exactly what a server would send for it? Checked on the raw rows, the definitive way.

For each trained turn of a raw row the chat template renders the messages before it with the generation prompt, and the
reference tokenizer encodes that text; nothing of how the rows were made is used again. A trained range answers a turn
when the ids before it are that turn's prompt. The same comparison tells which message a range trains, so the counts per
role and per turn come from it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.encode import all_ids
from finetune.data.engine import Settings
from finetune.data.examples import Located, layout_of, refuse
from finetune.data.read import Piece, pieces
from finetune.data.render import WHOLE, Masking, trained_turns
from finetune.data.rows import SourceRows
from finetune.data.shield import shielded
from finetune.data.template import ChatTemplate, Control, chat_template, control_tokens
from finetune.formats.example import Conversation, Fault, Format, PromptCompletion, RowError
from finetune.recipe.sections import Source


@dataclass(frozen=True)
class Trained:
    """A trained range of a token row.

    Attributes:
        start, end: ids [start, end) of its row.
        turn: the message it trains, counted in the raw row; WHOLE where it is no single message.
        role: whose words it trains: a role of chats, `completion`, `text`, or `all`.
        same: whether the ids before it are those a server would send; None where no server asks for it.
    """

    start: int
    end: int
    turn: int
    role: str
    same: bool | None

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Explained:
    """The token rows of one raw row.

    Attributes:
        ranges: trained ranges of each token row.
        untrained: messages that should be trained, and are in none of the rows.
    """

    ranges: list[list[Trained]]
    untrained: tuple[int, ...] = ()


TokenRow = tuple[np.ndarray, list[tuple[int, int]], int]  # ids, trained ranges, last turn trained


class Server:
    """What a server would send, for any example."""

    def __init__(self, settings: Settings) -> None:
        """
        Args:
            settings: what the rows were prepared with.
        """
        self._settings = settings
        self._options = settings.options
        self._masking = Masking.of(settings.options)
        self._vocabulary = settings.vocabulary.without_fast()
        self._encoder = self._vocabulary.encoder
        self._template: ChatTemplate | None = None
        self._control = Control(())

    @property
    def template(self) -> ChatTemplate:
        """The chat template, looked for when the first chat needs it."""
        if self._template is None:
            settings = self._settings
            self._template = chat_template(self._vocabulary, settings.options.chat_template, settings.stop_ids)
            self._control = control_tokens(self._vocabulary, self._template)
        return self._template

    def explain(self, found: Sequence[tuple[Located, Sequence[TokenRow]]]) -> list[Explained]:
        """What the trained ranges of some raw rows are.

        Args:
            found: raw rows, each with its token rows.
        """
        texts: list[str] = []
        asked: list[list[tuple[int, int]]] = []  # turn, and number of its prompt's text
        for item, _ in found:
            asked.append(prompts := [])
            for turn, text in self._prompts(item):
                prompts.append((turn, len(texts)))
                texts.append(text)
        ids = [np.asarray(one, np.int32) for one in all_ids(self._encoder, texts)]
        explained = []
        for (item, rows), prompts in zip(found, asked, strict=True):
            if isinstance(item.example, Conversation) and self._masking.loss_on != "all":
                explained.append(self._chat(item.example, rows, [(turn, ids[at]) for turn, at in prompts]))
            else:
                explained.append(Explained([self._plain(item.example, row, ids, prompts) for row in rows]))
        return explained

    def _prompts(self, item: Located) -> Iterator[tuple[int, str]]:
        """Each turn that is trained, with what is sent to ask for it."""
        example = item.example
        if isinstance(example, PromptCompletion):
            yield WHOLE, example.prompt
        if not isinstance(example, Conversation) or self._masking.loss_on == "all":
            return
        template = self.template
        try:
            safe = shielded(example, self._control)
            for turn in trained_turns(example, self._masking.loss_on):
                yield turn, template.render(safe.messages[:turn], safe.tools, asking=True)
        except RowError:
            return  # what cannot be asked for now is told as differing

    def _plain(
        self, example: object, row: TokenRow, ids: Sequence[np.ndarray], prompts: Sequence[tuple[int, int]]
    ) -> list[Trained]:
        """The ranges of a plain text, of a completion, or of a chat that is trained whole."""
        whole, ranges, _ = row
        if isinstance(example, Conversation):
            return [Trained(start, end, WHOLE, "all", None) for start, end in ranges]
        if not isinstance(example, PromptCompletion):
            return [Trained(start, end, WHOLE, "text", None) for start, end in ranges]
        prompt = ids[prompts[0][1]]
        lead = self._vocabulary.bos_id if self._vocabulary.leads else None
        if lead is not None and prompt[:1].tolist() != [lead]:
            prompt = np.concatenate([np.array([lead], np.int32), prompt])
        return [
            Trained(start, end, WHOLE, "completion", np.array_equal(whole[:start], prompt)) for start, end in ranges
        ]

    def _chat(
        self, chat: Conversation, rows: Sequence[TokenRow], prompts: Sequence[tuple[int, np.ndarray]]
    ) -> Explained:
        """The ranges of a chat's rows."""
        if self._options.on_long_row == "split" and not all(
            any(_begins(ids, prompt) for ids, _, _ in rows) for _, prompt in prompts
        ):
            prompts = [*prompts, *self._later_starts(chat)]
        made = [self._row(row, prompts) for row in rows]
        answered = {one.turn for ranges in made for one in ranges if one.same}
        limit = self._options.max_length if self._options.on_long_row != "error" else None
        missing: tuple[int, ...] = ()
        if self._options.history != "last" and self._options.on_long_row in ("error", "truncate"):
            missing = tuple(
                turn for turn, prompt in prompts if turn not in answered and (limit is None or len(prompt) < limit)
            )
        unknown = any(one.same is False for ranges in made for one in ranges)  # which then may be the missing ones
        return Explained(made, () if unknown else missing)

    def _row(self, row: TokenRow, prompts: Sequence[tuple[int, np.ndarray]]) -> list[Trained]:
        """The ranges of one token row: each trains the turn whose prompt stands before it."""
        ids, ranges, last = row
        found: list[Trained] = []
        before = 0
        for number, (start, end) in enumerate(ranges):
            turn, length = max(
                ((turn, len(prompt)) for turn, prompt in prompts if len(prompt) <= start and _begins(ids, prompt)),
                key=lambda pair: pair[1],
                default=(WHOLE, -1),
            )
            # Without its reasoning a turn is trained from behind its prompt on.
            same = length == start or (not self._masking.thinking and before <= length)
            role = "assistant"
            if not same:
                turn = last if number == len(ranges) - 1 else WHOLE
                others = self._masking.others
                if others:
                    role = "/".join(sorted(others))
            found.append(Trained(start, end, turn, role, same if same or role == "assistant" else None))
            before = end
        return found

    def _later_starts(self, chat: Conversation) -> list[tuple[int, np.ndarray]]:
        """The prompts of turns whose chat was split: with the instructions before any later message of the user."""
        safe = shielded(chat, self._control)
        messages = safe.messages
        lead = next((at for at, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
        turns: list[int] = []
        texts: list[str] = []
        for cut in (at for at in range(lead + 1, len(messages)) if messages[at]["role"] == "user"):
            for turn in trained_turns(chat, self._masking.loss_on):
                if turn > cut:
                    texts.append(self.template.render((*messages[:lead], *messages[cut:turn]), safe.tools, asking=True))
                    turns.append(turn)
        return [
            (turn, np.asarray(ids, np.int32)) for turn, ids in zip(turns, all_ids(self._encoder, texts), strict=True)
        ]


def _begins(ids: np.ndarray, prompt: np.ndarray) -> bool:
    return len(prompt) <= len(ids) and bool((ids[: len(prompt)] == prompt).all())


def token_rows(rows: SourceRows, numbers: np.ndarray, index: int) -> list[TokenRow]:
    """The token rows of one raw row.

    Args:
        rows: all of its source.
        numbers: int64, `rows.row`, which ascends.
        index: the raw row.
    """
    first, last = np.searchsorted(numbers, [index, index + 1]).tolist()
    return [(rows.ids(at), rows.trained(at), rows.place(at)[1]) for at in range(first, last)]


def raw(source: Source) -> tuple[list[Piece], Format]:
    """The pieces of a source that was prepared, and its format, to read its raw rows again.

    Raises:
        DataError: they cannot be read any more.
    """
    work, layout = pieces(source), layout_of(source)
    refuse([found for found in (work, layout) if isinstance(found, Fault)])
    assert isinstance(work, list), "faults are refused"
    assert isinstance(layout, Format), "faults are refused"
    return work, layout
