"""Token rows as a reader can check them: every token's text, which of them are trained, and what each range trains.

Rows are shown as they were prepared, before packing, weights, splits and the removal of copies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from finetune.data.engine import Settings
from finetune.data.examples import Located, piece_examples
from finetune.data.prepare import PreparedSource
from finetune.data.render import WHOLE
from finetune.data.served import Server, Trained, raw
from finetune.errors import DataError
from finetune.formats.example import Fault

LONGEST_CHARACTER = 12  # tokens of which one character may be made
Kind = Literal["trained", "context", "special"]


@dataclass(frozen=True)
class Token:
    """A token, or the few that share a character.

    Attributes:
        text: what it stands for.
        ids: token ids.
        trained: whether it has a label.
        special: whether it is one of the tokenizer's added tokens, which no ordinary text becomes.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool

    @property
    def kind(self) -> Kind:
        """How it is shown where one word must do."""
        return "special" if self.special else "trained" if self.trained else "context"


@dataclass(frozen=True)
class PreviewedRow:
    """A token row.

    Attributes:
        source: the source's name.
        row: the raw row, from 0.
        turn: the last message trained, or -1.
        place: file and line of the raw row.
        number, of: which of the raw row's token rows it is, from 1.
        tokens: all of it.
        length: how many token ids it has.
        trained: what each trained range trains.
        stop_ids: tokens that end an answer.
        ends: of each trained range, whether its last token is one of these.
    """

    source: str
    row: int
    turn: int
    place: str
    number: int
    of: int
    tokens: tuple[Token, ...]
    length: int
    trained: tuple[Trained, ...]
    ends: tuple[bool, ...]

    @property
    def trained_tokens(self) -> int:
        return sum(one.tokens for one in self.trained)

    def said(self) -> list[str]:
        """What each trained range trains, in sentences."""
        return [_said(one, ended) for one, ended in zip(self.trained, self.ends, strict=True)]


def _said(one: Trained, ended: bool) -> str:
    what = f"messages[{one.turn}], {one.role}" if one.turn != WHOLE else one.role
    served = {True: "behind what a server sends", False: "NOT behind what a server sends", None: ""}[one.same]
    end = "ends with a stop token" if ended else "ends without a stop token"
    return "; ".join(part for part in (f"tokens {one.start} to {one.end - 1}: {what}", served, end) if part)


def places(
    sources: Sequence[PreparedSource], row: int | None, first: int | None
) -> Iterator[tuple[PreparedSource, int]]:
    """Which token rows are meant: source, and position in its rows.

    Args:
        sources: to choose from.
        row: one raw row of the first source; None for more.
        first: how many raw rows of the first source; None for all rows of all sources.

    Raises:
        DataError: there is no such raw row, or none of it was kept.
    """
    if row is None and first is None:
        for one in sources:
            for at in range(len(one.rows)):
                yield one, at
        return
    one = sources[0]
    numbers = one.rows.row
    if not len(numbers):
        raise DataError(f"no row of {one.rows.name} was kept; `finetune data prepare` says why")
    if row is None:
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))  # where each raw row's token rows begin
        end = int(begins[first]) if first is not None and first < len(begins) else len(numbers)
        yield from ((one, at) for at in range(end))
        return
    start, end = np.searchsorted(numbers, [row, row + 1]).tolist()
    if start == end:
        raise DataError(_no_row(one, row, numbers))
    yield from ((one, at) for at in range(start, end))


def _no_row(one: PreparedSource, row: int, numbers: np.ndarray) -> str:
    name = one.rows.name
    last = int(numbers[-1])
    if 0 <= row < last:
        aside = f"; {one.quarantine} holds rows that cannot be used" if one.quarantine is not None else ""
        return (
            f"--row {row}: this row of {name} was left out when the rows were prepared{aside}; others stand from "
            f"{int(numbers[0])} to {last}"
        )
    return f"--row {row}: {name} has rows {int(numbers[0])} to {last}, counted from 0"


class Previewer:
    """Makes rows readable."""

    def __init__(self, settings: Settings) -> None:
        """
        Args:
            settings: what the rows were prepared with.
        """
        self._settings = settings
        self._encoder = settings.vocabulary.without_fast().encoder
        self._added = frozenset(token.id for token in settings.vocabulary.added)
        self._server = Server(settings)
        self._read: _RawRows | None = None

    def rows(self, sources: Sequence[PreparedSource], row: int | None, first: int | None) -> Iterator[PreviewedRow]:
        """Token rows, as `places` chooses them.

        Raises:
            DataError: there is no such row, or the raw rows cannot be read any more.
        """

        def example(place: tuple[PreparedSource, int]) -> tuple[int, int]:
            return id(place[0]), place[0].rows.place(place[1])[0]

        for _, group in groupby(places(sources, row, first), key=example):
            (one, at), *rest = group
            yield from self._example(one, at, 1 + len(rest))

    def _example(self, one: PreparedSource, at: int, count: int) -> Iterator[PreviewedRow]:
        """All token rows of one raw row."""
        rows = one.rows
        index = rows.place(at)[0]
        item = self._raw(one, index)
        own = [(rows.ids(i), rows.trained(i), rows.place(i)[1]) for i in range(at, at + count)]
        ranges = self._server.explain([(item, own)])[0].ranges
        for number, ((ids, _, turn), trained) in enumerate(zip(own, ranges, strict=True), 1):
            yield PreviewedRow(
                source=rows.name,
                row=index,
                turn=turn,
                place=item.place,
                number=number,
                of=count,
                tokens=tuple(self.tokens(ids, trained)),
                length=len(ids),
                trained=tuple(trained),
                ends=tuple(int(ids[one.end - 1]) in self._settings.stop_ids for one in trained),
            )

    def tokens(self, ids: np.ndarray, trained: Sequence[Trained]) -> Iterator[Token]:
        """Each token with its text; those that make a character together come as one, unless their labels differ."""
        marks = np.zeros(len(ids), bool)
        for one in trained:
            marks[one.start : one.end] = True
        flat, at = ids.tolist(), 0
        while at < len(flat):
            end = at + 1
            if flat[at] not in self._added:
                while (
                    (text := self._text(flat, at, end)).endswith("\ufffd")
                    and end < len(flat)
                    and end - at < LONGEST_CHARACTER
                    and flat[end] not in self._added
                    and marks[end] == marks[at]
                ):
                    end += 1
                if text.endswith("\ufffd"):  # no character after all: a token by itself
                    end, text = at + 1, self._text(flat, at, at + 1)
            else:
                text = self._encoder.token(flat[at]) or self._text(flat, at, end)
            yield Token(text, tuple(flat[at:end]), bool(marks[at]), flat[at] in self._added)
            at = end

    def _text(self, ids: Sequence[int], start: int, end: int) -> str:
        """What some tokens add to the text before them; decoders drop the blank before the first word of a text."""
        before = self._encoder.decode(ids[max(0, start - 1) : start]) if start else ""
        whole = self._encoder.decode(ids[max(0, start - 1) : end])
        return whole[len(before) :] if whole.startswith(before) else self._encoder.decode(ids[start:end])

    def _raw(self, one: PreparedSource, index: int) -> Located:
        """The raw row, read again."""
        if self._read is None or self._read.one is not one:
            self._read = _RawRows(one)
        return self._read.row(index)


class _RawRows:
    """The raw rows of a source, found by number; rows that are asked for in order are read once."""

    def __init__(self, one: PreparedSource) -> None:
        self.one = one
        self._work, self._layout = raw(one.source)
        self._starts = [piece.index + piece.before for piece in self._work]
        self._open, self._last = -1, -1
        self._found: Iterator[Located | Fault] = iter(())

    def row(self, index: int) -> Located:
        """The example of a raw row that has token rows.

        Raises:
            DataError: it is not there any more.
        """
        number = bisect_right(self._starts, index) - 1
        if number != self._open or index <= self._last:
            self._open = number
            self._found = piece_examples(self._work[number], self.one.source, self._layout)
        for item in self._found:
            if isinstance(item, Located) and item.index == index:
                self._last = index
                return item
        raise DataError(f"{self.one.rows.name}: row {index} is not there any more; run the same command again")
