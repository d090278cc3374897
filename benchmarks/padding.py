"""How much computing goes into padding: ordinary chat rows, micro-batch 8, max_length 1,024.

    python benchmarks/padding.py                  # a few seconds

From lengths: 20,000 rows of lognormal length (mean about 260 tokens). A token costs 12 x 2048 units in the linear
layers of a model 2,048 wide, a row of n tokens n² units in attention. The share is what the padding of a batch costs
of all that the batch costs.
Measured: the positions without a token in what the model is given, over an epoch of the trainer's own micro-batches,
made by the collators that training uses, for the first 2,000 of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.data.collate import FlatCollator, PaddedCollator
from finetune.data.order import Schedule
from finetune.data.pack import singles

ROWS, MICRO_BATCH, MAX_LENGTH, WIDTH = 20_000, 8, 1_024, 12 * 2_048.0


class Rows:
    """Rows of given lengths; the tokens are all one."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: int) -> dict[str, Any]:
        ids = np.ones(self.lengths[at], np.int32)
        return {"input_ids": ids, "labels": ids, "source": "generated", "row": at}


def lengths(rows: int) -> np.ndarray:
    """Tokens of each row, int64."""
    drawn = np.exp(np.random.default_rng(1).normal(5.25, 0.8, rows))
    return np.clip(drawn, 16, MAX_LENGTH).astype(np.int64)


def cost(sizes: np.ndarray) -> float:
    """What rows of these sizes cost, in units."""
    return float((sizes * WIDTH + sizes**2).sum())


def share(batches: list[np.ndarray], padded: bool) -> tuple[float, float]:
    """The share of computing, and of tokens, that is padding."""
    needed = sum(cost(batch) for batch in batches)
    given = sum(cost(np.full(len(batch), batch.max())) for batch in batches) if padded else needed
    tokens = sum(len(batch) * batch.max() if padded else batch.sum() for batch in batches)
    return 1 - needed / given, 1 - sum(batch.sum() for batch in batches) / tokens


def measured(sizes: np.ndarray, collate: Any, alike: bool) -> float:
    """The share of positions given to a model that hold no token, over an epoch of the trainer's own micro-batches."""
    rows = Rows(sizes)
    schedule = Schedule(rows, singles(sizes), 42, WIDTH, alike)
    given = 0
    for units in schedule.micro_batches(0, 0, 1, 1, MICRO_BATCH):
        given += collate(schedule.documents(units))["input_ids"].numel()
    return 1 - float(sizes.sum()) / given


def main() -> None:
    """Print the table."""
    sizes = lengths(ROWS)
    order = Schedule(Rows(sizes), singles(sizes), 42, WIDTH)
    as_they_come = [sizes[units] for units in order.micro_batches(0, 0, 1, 1, MICRO_BATCH)]
    alike = Schedule(Rows(sizes), singles(sizes), 42, WIDTH, alike=True)
    grouped = [sizes[units] for units in alike.micro_batches(0, 0, 1, 1, MICRO_BATCH)]
    print(f"{ROWS:,} rows of {sizes.mean():.0f} tokens on average, micro-batch {MICRO_BATCH}, at most {MAX_LENGTH:,}")
    print(f"{'batches':<34}{'FLOPs on padding':>18}{'positions':>12}{'measured':>10}")
    few = sizes[:2_000]
    for name, (flops, tokens), found in (
        ("padded, as rows come", share(as_they_come, True), measured(few, PaddedCollator(0), False)),
        ("padded, of like length (fallback)", share(grouped, True), measured(few, PaddedCollator(0), True)),
        ("end to end (finetune)", share(as_they_come, False), measured(few, FlatCollator(), False)),
    ):
        print(f"{name:<34}{flops:>17.1%} {tokens:>11.1%} {found:>9.1%}")


if __name__ == "__main__":
    main()
