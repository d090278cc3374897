"""What preparing the data did, in numbers. Nothing that was changed or left out goes unsaid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class SourceReport:
    """Counts of one source.

    Attributes:
        name: the source's name, or its path.
        rows_read: raw rows.
        rows_kept: token rows given to training, after expansion, on_long_row and weight.
        tokens: tokens of the rows kept.
        trained_tokens: those of them that have a label.
        rows_expanded: raw rows that became several because the chat template rewrites history or borders merge.
        rows_added: how many more token rows that made.
        rows_over_length: token rows longer than max_length, before weight.
        longest: tokens of the longest of these; 0 when there are none.
        rows_dropped: token rows left out, before weight.
        rows_without_answer: those of them in which nothing trained was left.
        tokens_lost: tokens cut off or dropped, before weight.
        opening_turns: chats that begin with an assistant message, which answers nothing and is not trained.
        trailing_messages: messages after the last trained turn, which nothing trained could see, left out.
    """

    name: str
    rows_read: int = 0
    rows_kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    rows_expanded: int = 0
    rows_added: int = 0
    rows_over_length: int = 0
    longest: int = 0
    rows_dropped: int = 0
    rows_without_answer: int = 0
    tokens_lost: int = 0
    opening_turns: int = 0
    trailing_messages: int = 0


@dataclass(frozen=True)
class DataReport:
    """Counts of all sources."""

    sources: tuple[SourceReport, ...]
    max_length: int
    on_long_row: str

    def total(self, count: str) -> int:
        """The sum of one of SourceReport's counts over all sources."""
        return sum(getattr(source, count) for source in self.sources)

    @property
    def rows_read(self) -> int:
        """Raw rows."""
        return self.total("rows_read")

    @property
    def rows_kept(self) -> int:
        """Token rows given to training."""
        return self.total("rows_kept")

    @property
    def tokens(self) -> int:
        """Tokens of the rows kept."""
        return self.total("tokens")

    @property
    def trained_tokens(self) -> int:
        """Tokens that have a label."""
        return self.total("trained_tokens")

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all, from 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def lines(self) -> list[str]:
        """The report as sentences; only what happened is told."""
        said = [
            f"{self.rows_read:,} rows read, {self.rows_kept:,} kept; {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained ({self.trained_share:.0%})"
        ]
        if over := self.total("rows_over_length"):
            longest = max(source.longest for source in self.sources)
            said.append(
                f"{over:,} rows over max_length {self.max_length:,} (longest {longest:,}; on_long_row "
                f"{self.on_long_row}); {self.total('tokens_lost'):,} tokens lost"
            )
        if dropped := self.total("rows_dropped"):
            cut = self.total("rows_without_answer")
            said.append(f"{dropped:,} rows left out" + (f", {cut:,} of them with no trained token left" if cut else ""))
        if expanded := self.total("rows_expanded"):
            said.append(
                f"{expanded:,} chats became {self.total('rows_added'):,} more rows, because a server would send their "
                "turns with another history than one row holds"
            )
        if opening := self.total("opening_turns"):
            said.append(f"{opening:,} chats begin with an assistant message, which is context and not trained")
        if trailing := self.total("trailing_messages"):
            said.append(f"{trailing:,} messages after the last trained turn left out")
        said += [f"{source.name}: none of its rows is kept" for source in self.sources if not source.rows_kept]
        return said

    def as_dict(self) -> dict[str, Any]:
        """All counts, for a run's manifest."""
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": self.trained_share,
            "max_length": self.max_length,
            "on_long_row": self.on_long_row,
            "sources": [asdict(source) for source in self.sources],
        }
