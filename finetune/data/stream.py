"""Training on rows that are made while it goes on, for sources larger than the disk or the memory (data.streaming).

Rows are read in windows, first of one step's rows and then of thousands. Those of a window are shuffled, packed where
packing is asked for, and cut into steps; what is left of a step waits for the next window. A step holds the same rows
however many processes share it. How many rows there are is not known, so training.max_steps says when to end, and what
a run asks of its rows before the first step is answered by the first rows of each source, the head.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.cache import Cache
from finetune.data.engine import Settings
from finetune.data.examples import examples
from finetune.data.feed import Feed, scheduled, units
from finetune.data.gates import refuse_beyond
from finetune.data.gather import Prepared, date_note, validation_alone
from finetune.data.inflow import Inflow, Maker, usable
from finetune.data.order import Document, Schedule, share, share_alike
from finetune.data.prepare import PreparedSource
from finetune.data.report import DataReport
from finetune.data.rows import Rows, RowsWriter, SourceRows
from finetune.data.source import LocalFiles, locate
from finetune.errors import DataError
from finetune.recipe.sections import AuditOptions, DataOptions, Source

HEAD = 256  # rows of each source
WINDOW = 8192  # rows of a window, once windows have grown


@dataclass(frozen=True)
class Length:
    """How long a stream is trained on.

    Attributes:
        steps: training.max_steps.
        batch: training.global_batch_size.
    """

    steps: int
    batch: int


class StreamSchedule:
    """Rows in their order, read as the steps need them; one epoch of `length.steps` steps."""

    def __init__(
        self, inflow: Inflow, length: Length, seed: int, width: float, alike: bool, bad: Path | None = None
    ) -> None:
        """
        Args:
            inflow: the rows.
            length: how many steps, of how many units.
            seed: of the order.
            width, alike: see finetune.data.order.Schedule.
            bad: where rank 0 writes rows that cannot be used.
        """
        self._inflow, self._length, self._bad = inflow, length, bad
        self._seed, self._width, self._alike = seed, width, alike
        self._base, self._window = 0, self._arranged([], 0)

    def __len__(self) -> int:
        return self._length.steps * self._length.batch

    @property
    def tokens(self) -> np.ndarray:
        """int64 (units,): tokens of each unit of the window that is being trained."""
        return self._window.tokens

    def steps(self, batch: int) -> int:
        """Optimizer steps, whatever the sources hold."""
        return self._length.steps

    def micro_batches(self, epoch: int, rank: int, ranks: int, accumulation: int, most: int) -> Iterator[list[int]]:
        """The unit numbers of each micro-batch of a rank; `accumulation` of them are a step.

        Documents are to be asked for before the next micro-batch is. Always begins with the first row: a run that is
        continued skips the steps it has made, and so meets the same rows.

        Raises:
            FinetuneError: a row or a source cannot be used, and the recipe does not go on without it.
        """
        assert epoch == 0, "all steps are one epoch"
        batch = ranks * accumulation * most
        left = self._length.steps
        for order in self._orders(batch, self._bad if rank == 0 else None):
            for start in range(0, len(order), batch):
                step = order[start : start + batch]
                tokens = self._window.tokens[step]
                if self._alike:
                    parts = share_alike(tokens.tolist(), ranks, accumulation)
                else:
                    costs = tokens * self._width + self._window.units.squares[step]
                    parts = share(costs.tolist(), ranks, accumulation, most)
                self._inflow.count(self._window.documents(step.tolist()))
                for part in parts[rank]:
                    yield (step[part] + self._base).tolist()
                left -= 1
                if not left:
                    return

    def documents(self, units: Sequence[int]) -> list[Document]:
        """The documents of units of the window that is being trained."""
        return self._window.documents([unit - self._base for unit in units])

    def _orders(self, batch: int, bad: Path | None) -> Iterator[np.ndarray]:
        """For each window the numbers of its units, as many whole steps as there are, in their order."""
        self._inflow.begin(batch, bad)
        wanted, number = batch, 0
        rest: list[Document] = []
        self._base, self._window = 0, self._arranged([], 0)
        while True:
            self._base += len(self._window)
            self._window = self._arranged([*rest, *self._inflow.window(wanted)], number)
            order = self._window.epoch(number, batch)
            whole = len(order) // batch * batch
            if self._ends_short():  # a stream of rows is cut at its end alone, so that bin waits for more of it
                order = np.append(order[order != len(order) - 1], len(order) - 1)
                whole = (len(order) - 1) // batch * batch
            yield order[:whole]
            rest = self._window.documents(order[whole:].tolist())
            wanted, number = max(batch, min(2 * wanted, WINDOW)), number + 1

    def _arranged(self, rows: list[Document], number: int) -> Schedule:
        """The rows of a window as units."""
        sizes = np.array([len(row["input_ids"]) for row in rows], np.int32)
        packed = units(sizes, self._inflow.options, (number << 32) + self._seed)
        return Schedule(rows, packed, self._seed, self._width, self._alike)

    def _ends_short(self) -> bool:
        options, tokens = self._inflow.options, self._window.tokens
        wraps = options.packing and options.packing_strategy == "wrapped"
        return bool(wraps and len(tokens) and tokens[-1] < options.max_length)


@dataclass(frozen=True)
class Head(Prepared):
    """The first rows of each source."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the head and the sizes of all files: what can be known of the rows before they are read, and is
        the same on every host, and wherever the files lie.
        """
        digest = hashlib.sha256(self.rows.fingerprint.encode())
        for one in self.sources:
            where = locate(one.source)
            sizes = [file.path.stat().st_size for file in where.files] if isinstance(where, LocalFiles) else []
            digest.update(json.dumps(sizes).encode())
        return digest.hexdigest()

    def states(self) -> dict[str, str]:
        """Of each source when its files changed last, or the revision of the hub's: rows beyond the head may be others
        in files of the same sizes.
        """
        return {f"data.train[{number}].state": _state(one.source) for number, one in enumerate(self.sources)}

    def facts(self) -> dict[str, object]:
        """For a run's manifest; the counts are those of the head."""
        return {"streaming": True, "rows_counted": f"the first {HEAD} of each source", **super().facts()}


@dataclass(frozen=True, kw_only=True)
class StreamFeed(Feed):
    """Rows that are made while they are trained; `train` is their head.

    Attributes:
        inflow: where they come from.
        length: how long they are trained on.
        bad: where rows that cannot be used are written.
    """

    inflow: Inflow
    length: Length
    bad: Path

    @property
    def longest(self) -> int:
        """Tokens that a row may have."""
        return self.options.max_length

    def schedules(self, width: float, alike: bool) -> tuple[Any, Schedule | None]:
        """Training and validation as the trainer takes them; see Feed."""
        validation = None
        if self.validation is not None:
            validation = scheduled(self.validation.rows, self.options, self.seed, width, alike)
        return StreamSchedule(self.inflow, self.length, self.seed, width, alike, self.bad), validation

    def lines(self) -> list[str]:
        """What is known of the rows, in sentences."""
        said = [
            f"streaming: rows are made while they are trained; figures are those of the first {HEAD} of each source"
        ]
        if len(self.options.train) > 1 and self.options.weight_by == "epochs":
            said.append("streaming: weights are shares of the rows, because how many a source has is not known")
        return [*said, *super().lines()]

    def counts(self) -> dict[str, Any]:
        """Counts of what was trained, for the model card."""
        inflow = self.inflow
        if not inflow.flows:  # continued from the checkpoint of the last step
            return dict.fromkeys(("rows_kept", "trained_tokens"), "streamed, and not counted again")
        return {"rows_kept": inflow.rows, "trained_tokens": inflow.trained_tokens}

    def closing(self) -> list[str]:
        """What was trained, and what was read for it: of each source once, up to a window more than was trained."""
        inflow = self.inflow
        if not inflow.flows:
            return []
        told = f"streamed {inflow.rows:,} rows into the steps: {inflow.tokens:,} tokens"
        return [f"{told}, {inflow.trained_tokens:,} trained", *inflow.report().lines()]


def stream_feed(
    settings: Settings,
    audit: AuditOptions,
    cache: Cache,
    seed: int,
    length: Length,
    bad: Path,
    say: Callable[[str], None] | None = None,
) -> StreamFeed:
    """Look at the first rows of each source, prepare those of validation, and refuse what is not as the recipe wants.

    Args:
        settings: tokenizer, stop tokens and the data section.
        audit: the audit section, to which the head is held.
        cache: where prepared validation rows are kept.
        seed: of the order.
        length: how long is trained.
        bad: where rows that cannot be used are written.
        say: told what takes time.

    Raises:
        FinetuneError: as `finetune.data.feed.feed`, of the head and of validation.
    """
    validation = validation_alone(settings, cache, seed, say)
    held_out = frozenset[bytes]()
    if validation is not None:
        held_out = frozenset(digest.tobytes() for digest in validation.rows.column("digest"))
    train = head(settings)
    refuse_beyond(train, audit, settings.options)
    inflow = Inflow(settings, held_out)
    facts = settings.facts()
    return StreamFeed(settings.options, train, validation, seed, cache, facts, inflow=inflow, length=length, bad=bad)


def head(settings: Settings) -> Head:
    """The first rows of each source of training, prepared.

    Raises:
        FinetuneError: one of them cannot be used, or none is left.
    """
    maker, options = Maker(settings), settings.options
    sources = tuple(_first(source, maker, options) for source in options.train)
    rows = Rows.of([one.rows for one in sources])
    if not len(rows):
        raise DataError(f"no row is left to train on among the first {HEAD} of each source; mend the data")
    reports = tuple(replace(one.report) for one in sources)
    counts = (len(rows), rows.tokens, rows.trained_tokens)
    notes = date_note(sources, settings)
    return Head(rows, DataReport(reports, options.max_length, options.on_long_row, *counts, notes=notes), sources)


def _state(source: Source) -> str:
    """What can be known of all rows of a source without reading them.

    Times are in whole seconds: a finer one is lost where a disk or a network keeps none.
    """
    where = locate(source)
    if not isinstance(where, LocalFiles):
        return f"{source.path}, split {source.split}, revision {source.revision or 'not pinned'}"
    found = [(state.st_size, int(state.st_mtime)) for state in (file.path.stat() for file in where.files)]
    last = datetime.fromtimestamp(max(changed for _, changed in found), UTC).isoformat(timespec="seconds")
    return f"{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]}, changed {last}"


def _first(source: Source, maker: Maker, options: DataOptions) -> PreparedSource:
    """The head of one source. Its file has no name any more: it lasts as long as it is looked at."""
    with closing(examples(source, streaming=True)) as found:
        chunk = usable(maker.chunk(list(islice(found, HEAD))), options)
    name = source.name or source.path
    bad = len({fault.index for fault in chunk.faults})
    report = replace(chunk.report, name=name, rows_quarantined=bad)
    with tempfile.TemporaryDirectory(prefix="finetune-head-") as folder:
        with RowsWriter(Path(folder)) as writer:
            if chunk.block is not None:
                writer.add(chunk.block)
        return PreparedSource(source, SourceRows(Path(folder), name), report, None, True)
