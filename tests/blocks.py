"""Token rows made in the test: plain descriptions, blocks of them, and folders of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from finetune.data.rows import Block, Rows, RowsWriter, SourceRows


@dataclass(frozen=True)
class Made:
    """One token row in plain values."""

    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...] = ()
    row: int = 0
    turn: int = -1
    digest: tuple[int, int] = (0, 0)
    cut: bool = False

    @property
    def labels(self) -> list[int]:
        inside = {at for start, end in self.trained for at in range(start, end)} - {0}
        return [token if at in inside else -100 for at, token in enumerate(self.ids)]


def block(rows: Sequence[Made]) -> Block:
    """The rows as RowsWriter takes them."""
    return Block(
        ids=np.array([token for row in rows for token in row.ids], np.int32),
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        trained=np.array([edge for row in rows for pair in row.trained for edge in pair], np.int32),
        ranges=np.array([len(row.trained) for row in rows], np.int32),
        row=np.array([row.row for row in rows], np.int64),
        turn=np.array([row.turn for row in rows], np.int32),
        digest=np.array([row.digest for row in rows], np.uint64).reshape(-1, 2),
        cut=np.array([row.cut for row in rows], np.bool_),
    )


def source(folder: Path, blocks: Sequence[Sequence[Made]], name: str = "chats") -> SourceRows:
    """A folder of these blocks, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    with RowsWriter(folder) as writer:
        for rows in blocks:
            writer.add(block(rows))
    return SourceRows(folder, name)


def digest(text: str) -> tuple[int, int]:
    """A digest as good as a real one."""
    found = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:16], "little")


def edges(length: int) -> tuple[tuple[int, int], ...]:
    """All of a row trained but its first token."""
    return ((1, length),) if length > 1 else ()


def plain(folder: Path, lengths: Sequence[int], name: str = "chats", token_rows: int = 1) -> Rows:
    """Rows of these lengths, all different; every `token_rows` of them belong to one raw row."""
    rows = [
        Made(tuple(range(at, at + length)), edges(length), at // token_rows, -1, digest(f"{name} {at // token_rows}"))
        for at, length in enumerate(lengths)
    ]
    return Rows.of([source(folder, [rows], name)])


def together(*rows: Rows) -> Rows:
    """All rows of several, in order."""
    return Rows.of([part for one in rows for part in one.parts])


@st.composite
def made_rows(draw: st.DrawFn) -> Made:
    """Any token row a writer accepts."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    edges = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6, unique=True)))
    trained = tuple(zip(edges[::2], edges[1::2], strict=False))
    if trained and draw(st.booleans()):  # ranges that touch
        start, end = trained[-1]
        trained = (*trained[:-1], (start, end), *(((end, len(ids)),) if end < len(ids) else ()))
    word = st.integers(0, 2**64 - 1)
    return Made(
        tuple(ids), trained, draw(st.integers(0, 2**63 - 1)), draw(st.integers(-1, 2**31 - 1)),
        (draw(word), draw(word)), draw(st.booleans()),
    )  # fmt: skip


many_rows = st.lists(st.lists(made_rows(), max_size=5), max_size=5)
