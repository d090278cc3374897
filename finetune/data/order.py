"""In which order rows are trained, and which process and micro-batch takes which.

The order comes from the seed and the epoch alone, so a step holds the same rows however many processes share it. Within
a step the rows are shared out so that all processes have about the same to compute: a row's cost is that of its tokens
plus that of its attention, which grows with the square of its length. The last step of an epoch may be short; it is
shared out in the same way, and a process or micro-batch that gets nothing still takes its turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from finetune.data.encode import UNTRAINED
from finetune.data.pack import Units, shuffled

Document = dict[str, Any]

_WINDOW = 64  # steps whose rows are sorted by length together, where batches are padded


class TokenRows(Protocol):
    """What is trained: see finetune.data.rows.Rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def share(costs: Sequence[float], ranks: int, accumulation: int, most: int) -> list[list[list[int]]]:
    """Share out a step, the dearest first, always to who has least.

    Args:
        costs: of each unit of the step.
        ranks: processes.
        accumulation: micro-batches of each.
        most: units that a micro-batch holds.

    Returns:
        For each rank its micro-batches, each the positions in `costs` of its units; every position stands once.

    Raises:
        ValueError: the step has more units than its micro-batches hold.
    """
    if len(costs) > ranks * accumulation * most:
        raise ValueError(f"a step of {len(costs)} units for {ranks * accumulation} micro-batches of {most}")
    own = _deal(list(range(len(costs))), costs, ranks, accumulation * most)
    return [_deal(units, costs, accumulation, most) for units in own]


def _deal(units: Sequence[int], costs: Sequence[float], hands: int, most: int) -> list[list[int]]:
    """Deal units to hands that hold at most `most`, the dearest first, always to the hand that has least."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [(0.0, hand) for hand in range(hands)]
    for unit in sorted(units, key=lambda unit: (-costs[unit], unit)):
        load, hand = heapq.heappop(loads)
        dealt[hand].append(unit)
        if len(dealt[hand]) < most:
            heapq.heappush(loads, (load + costs[unit], hand))
    return dealt


def share_alike(lengths: Sequence[int], ranks: int, accumulation: int) -> list[list[list[int]]]:
    """Share out a step so that a micro-batch holds units of like length, for batches that are padded.

    Arguments and result are those of `share`; micro-batches hold as many units as each other, give or take one.
    """
    count = ranks * accumulation
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    cuts = [len(order) * number // count for number in range(count + 1)]
    batches = [order[start:end] for start, end in pairwise(cuts)]
    costs = [float(len(batch) * lengths[batch[0]]) if batch else 0.0 for batch in batches]
    dealt = _deal(list(range(count)), costs, ranks, accumulation)
    return [[batches[number] for number in own] for own in dealt]


@dataclass(eq=False)
class Schedule:
    """Rows and what becomes of them in an epoch.

    Attributes:
        rows: token rows.
        units: rows by themselves, or packed.
        seed: of the order.
        width: how many tokens a token must attend to before attention costs as much as the rest of the model.
        alike: whether micro-batches are of like length, because they are padded; may be set until an epoch begins, for
            a model in parts tells only once it is laid out whether it needs that.
    """

    rows: TokenRows
    units: Units
    seed: int
    width: float
    alike: bool = False

    def __len__(self) -> int:
        return len(self.units)

    @property
    def tokens(self) -> np.ndarray:
        """int64 (units,): tokens of each unit."""
        return self.units.tokens

    def steps(self, batch: int) -> int:
        """Optimizer steps of an epoch, each over `batch` units but for the last."""
        return -(-len(self) // batch)

    def epoch(self, number: int, batch: int) -> np.ndarray:
        """int64 (units,): the unit numbers in the order of an epoch, of which each `batch` are a step."""
        order = shuffled(len(self), self.seed, number)
        if not self.alike:
            return order
        whole = len(order) // batch * batch  # the short step keeps what chance gave it
        for start in range(0, whole, batch * _WINDOW):
            window = order[start : min(start + batch * _WINDOW, whole)]
            steps = window[np.argsort(-self.tokens[window], kind="stable")].reshape(-1, batch)
            order[start : start + len(window)] = steps[shuffled(len(steps), self.seed, number, start)].ravel()
        return order

    def micro_batches(self, epoch: int, rank: int, ranks: int, accumulation: int, most: int) -> Iterator[list[int]]:
        """The unit numbers of each micro-batch of a rank in an epoch; `accumulation` of them are a step.

        Args:
            epoch: from 0.
            rank: of this process.
            ranks: processes.
            accumulation: micro-batches of a step on each rank.
            most: units that a micro-batch holds.
        """
        batch = ranks * accumulation * most
        order = self.epoch(epoch, batch)
        for start in range(0, len(order), batch):
            step = order[start : start + batch]
            tokens = self.tokens[step]
            if self.alike:
                parts = share_alike(tokens.tolist(), ranks, accumulation)
            else:
                parts = share((tokens * self.width + self.units.squares[step]).tolist(), ranks, accumulation, most)
            for part in parts[rank]:
                yield step[part].tolist()

    def documents(self, units: Sequence[int]) -> list[Document]:
        """The documents of units: rows, or pieces of them whose first label is -100, as nothing stands before it."""
        found = []
        for unit in units:
            for row, start, end in self.units[unit]:
                document = self.rows[row]
                if start or end < len(document["input_ids"]):
                    ids, labels = (np.asarray(document[key])[start:end] for key in ("input_ids", "labels"))
                    labels = labels.copy()
                    labels[:1] = UNTRAINED
                    document = {**document, "input_ids": ids, "labels": labels}
                found.append(document)
        return found
