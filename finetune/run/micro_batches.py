"""The micro-batches of a process: which rows each has, read and put into tensors with where the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.run.loss import trained_positions


class Schedule(Protocol):
    """Rows and their order: see finetune.data.order.Schedule."""

    @property
    def tokens(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def steps(self, batch: int) -> int: ...
    def documents(self, units: Sequence[int]) -> list[dict[str, Any]]: ...
    def micro_batches(self, epoch: int, rank: int, ranks: int, accumulation: int, most: int) -> Iterator[list[int]]: ...


class MicroBatches(Sampler[list[int]]):
    """The unit numbers of each micro-batch of this process; every process has equally many."""

    def __init__(self, schedule: Schedule, rank: int, ranks: int, accumulation: int, most: int) -> None:
        self.schedule = schedule
        self.shape = (rank, ranks, accumulation, most)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop, also through what it wraps around this to skip batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        _, ranks, accumulation, most = self.shape
        return self.schedule.steps(ranks * accumulation * most) * accumulation

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.schedule.micro_batches(self.epoch, *self.shape)


class Documents(Dataset[dict[str, Any]]):
    """Unit numbers become documents; a micro-batch without units has none."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitems__(self, units: list[int]) -> list[dict[str, Any]]:
        return self.schedule.documents(units)


class StepLoader(DataLoader[dict[str, Any]]):
    """A loader whose epoch the training loop sets."""

    def set_epoch(self, epoch: int) -> None:
        """Orders the units anew."""
        self.batch_sampler.set_epoch(epoch)


class RowCollator:
    """Batches documents: `collate` makes the tensors, this adds where the loss is and which rows are in it.

    The positions are found here, on the CPU, because finding them on an accelerator would make the host wait.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds to the batch: `positions` (N,), `targets` (N,), `origins` (a name per document), `tokens` (a count)."""
        batch: dict[str, Any] = self.collate(rows)
        batch["positions"], batch["targets"] = trained_positions(batch["labels"])
        batch["origins"] = [f"{row['source']} row {row['row']}" for row in rows]
        batch["tokens"] = sum(len(row["input_ids"]) for row in rows)
        return batch
