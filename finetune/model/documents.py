"""Which documents of a batch attention takes together: runs of equal or nearly equal length.

A call for a few short documents costs its overhead, padding them to one length costs scores that nobody needs; runs are
made so that the sum is small. Only neighbours are taken together, so batches should be sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Scores that may be computed in vain (over all heads) to spare a run's own calls, about 0.1 ms of a CPU core.
_SCORES_PER_RUN = 8192
_SCORES_AT_ONCE = 65_536  # of a run, so that it stays in a core's cache; one document may have more
_CACHED_ON = "_finetune_documents"


@dataclass(frozen=True)
class Run:
    """Neighbouring documents that are taken as one batch.

    Attributes:
        start: its first token within its section.
        tokens: how many it has.
        count: documents.
        length: of the longest, to which the others are filled up.
        lengths: of each document.
    """

    start: int
    tokens: int
    count: int
    length: int
    lengths: tuple[int, ...]
    _made: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def even(self) -> bool:
        """Whether all its documents have one length."""
        return self.tokens == self.count * self.length

    def once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once for all layers."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def places(self, device: torch.device) -> Tensor:
        """int64 (tokens,): where each token stands when all documents are filled up to one length."""

        def make() -> Tensor:
            found = [torch.arange(size) + at * self.length for at, size in enumerate(self.lengths)]
            return torch.cat(found).to(device)

        return self.once(device, make)


@dataclass(frozen=True)
class Section:
    """Neighbouring runs for one way of computing.

    Attributes:
        short: whether for the product; else the section is one run of documents of one length for torch's kernel.
        tokens: of all its runs.
        runs: in order.
    """

    short: bool
    tokens: int
    runs: tuple[Run, ...]


class Documents:
    """The documents of one batch, by their lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """
        Args:
            lengths: tokens of each document, in order.
        """
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self._sections: dict[tuple[int | None, int], list[Section]] = {}

    @classmethod
    def equal(cls, count: int, length: int) -> Documents:
        """`count` documents of one length."""
        return cls((length,) * count)

    @classmethod
    def of(cls, starts: Tensor) -> Documents:
        """From cu_seq_lens, int32 (D+1,); kept with the tensor, which all layers of a model are given."""
        known: Documents | None = getattr(starts, _CACHED_ON, None)
        if known is None:
            known = cls(torch.diff(starts).tolist())
            setattr(starts, _CACHED_ON, known)
        return known

    def sections(self, limit: int | None, heads: int) -> list[Section]:
        """The documents in order, cut where the way of computing changes.

        Args:
            limit: documents of more tokens are for torch's kernel; None gives all to the product.
            heads: query heads, which decide what padding costs.
        """
        wanted = (limit, heads)
        if wanted not in self._sections:
            self._sections[wanted] = self._cut(limit, heads)
        return self._sections[wanted]

    def _cut(self, limit: int | None, heads: int) -> list[Section]:
        found: list[Section] = []
        lengths = list(self.lengths)
        at = 0
        while at < len(lengths):
            short = limit is None or lengths[at] <= limit
            end = at + 1
            if short:
                while end < len(lengths) and (limit is None or lengths[end] <= limit):
                    end += 1
                runs = _runs(lengths[at:end], heads)
            else:
                while end < len(lengths) and lengths[end] == lengths[at]:
                    end += 1
                runs = [_run(0, lengths[at:end])]
            found.append(Section(short, sum(lengths[at:end]), tuple(runs)))
            at = end
        return found


def _run(start: int, lengths: Sequence[int]) -> Run:
    return Run(start, sum(lengths), len(lengths), max(lengths), tuple(lengths))


def _runs(lengths: Sequence[int], heads: int) -> list[Run]:
    """Cut a list of lengths where one more document would waste more scores than a run of its own costs."""
    found: list[Run] = []
    start = 0
    current: list[int] = []
    for size in lengths:
        if current:
            longest = current[0]
            wasted = heads * (longest**2 - size**2)
            fits = heads * (len(current) + 1) * longest**2 <= _SCORES_AT_ONCE
            if size > longest or wasted > _SCORES_PER_RUN or not fits:
                found.append(_run(start, current))
                start += sum(current)
                current = []
        current.append(size)
    found.append(_run(start, current))
    return found
