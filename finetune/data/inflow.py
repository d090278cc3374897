"""Token rows of all sources without end, made while they are trained: nothing is kept but what is on its way.

Every process reads the same rows in the same order. How a source is cut into chunks depends on the rows a step holds
and on nothing else, so a run that is continued meets the same rows as one that nothing disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from finetune.data import quarantine
from finetune.data.encode import UNTRAINED
from finetune.data.engine import Chunk, Engine, QuickDiffers, Settings
from finetune.data.examples import Located, examples, refuse
from finetune.data.order import Document
from finetune.data.prepare import CHUNK, too_long
from finetune.data.report import DataReport, SourceReport
from finetune.data.rows import Block, labels_of
from finetune.data.tokenizer import FastDiffers
from finetune.errors import DataError
from finetune.formats.example import Fault
from finetune.recipe.sections import DataOptions, Source

WINDOW_TOKENS = 2**23  # of the rows read at once; a token takes 8 bytes, its id and its label


class Maker:
    """Makes chunks of token rows, without a shortcut once it was wrong.

    Attributes:
        notes: what is to be said of that.
    """

    def __init__(self, settings: Settings) -> None:
        self._engine = Engine(settings)
        self.notes: tuple[str, ...] = ()

    def chunk(self, group: Sequence[Located | Fault]) -> Chunk:
        """The token rows of examples, and the faults, in the order of the rows.

        Raises:
            DataError: the template, or the tokenizer, cannot be used at all.
        """
        located = [item for item in group if isinstance(item, Located)]
        while True:
            settings = self._engine.settings
            try:
                chunk = self._engine.chunk(located)
                break
            except QuickDiffers as error:
                settings = replace(settings, quick=False)
                note = f"from {error} on every chat was rendered for itself: the quick way differs there; please report"
            except FastDiffers as error:
                settings = replace(settings, vocabulary=settings.vocabulary.without_fast())
                note = f"fastokens was put aside: it differs from the tokenizer on {str(error)[:40]!r}; please report"
            self._engine = Engine(settings)
            self.notes += (f"{note}; rows before may have been trained with that difference",)
        met = [item for item in group if isinstance(item, Fault)]
        chunk.faults = sorted([*met, *chunk.faults], key=lambda fault: fault.index)
        chunk.report.rows_read += len({fault.index for fault in met if fault.index >= 0})
        return chunk


def usable(chunk: Chunk, options: DataOptions) -> Chunk:
    """The chunk, when the recipe goes on in spite of what is wrong with it.

    Raises:
        DataError: a bad row, a long row or a source that cannot be read, where such are to stop the run.
    """
    refuse(chunk.faults if options.on_bad_row == "error" else [fault for fault in chunk.faults if fault.index < 0])
    if chunk.report.rows_over_length and options.on_long_row == "error":
        raise too_long(chunk.long_rows, chunk.report.rows_over_length, options.max_length)
    return chunk


def documents(block: Block, name: str) -> Iterator[Document]:
    """The token rows of a block as training takes them; see finetune.data.rows.Rows. Nothing of the block is kept."""
    start = edge = 0
    for i, (size, ranges) in enumerate(zip(block.lengths.tolist(), block.ranges.tolist(), strict=True)):
        ids = block.ids[start : start + size].copy()
        edges = block.trained[edge : edge + 2 * ranges].tolist()
        labels = labels_of(ids, list(zip(edges[::2], edges[1::2], strict=True)))
        place = {"source": name, "row": int(block.row[i]), "turn": int(block.turn[i])}
        yield {"input_ids": ids, "labels": labels, **place}
        start, edge = start + size, edge + 2 * ranges


class _Flow:
    """One source, pass after pass.

    Attributes:
        name: the source's name.
        rows: its token rows; None at the end of each pass.
        given: rows or tokens taken from it so far.
        passes: how often it has been read to its end.
        report: what was done to the rows of the first pass, as far as it was read.
        held_out: raw rows of the first pass that validation holds too.
    """

    def __init__(self, source: Source, inflow: Inflow, first: int, bad: Path | None) -> None:
        self.name = source.name or source.path
        self.given = self.passes = self.held_out = 0
        self.report = SourceReport(self.name)
        self._source, self._inflow, self._bad = source, inflow, bad
        self.rows = self._rows(first)

    def _rows(self, size: int) -> Iterator[Document | None]:
        while True:
            some = False
            with closing(examples(self._source, streaming=True)) as found:
                while group := list(islice(found, size)):
                    size = min(2 * size, CHUNK)
                    for document in self._made(group):
                        some = True
                        yield document
            if not some:
                raise DataError(f"{self.name}: no row is left to train on; mend the data, or remove the source")
            self.passes += 1
            yield None

    def _made(self, group: Sequence[Located | Fault]) -> Iterator[Document]:
        """The token rows of a chunk that training may see."""
        inflow = self._inflow
        chunk = usable(inflow.maker.chunk(group), inflow.options)
        if not self.passes:
            self.report.add(chunk.report)
            self.report.rows_quarantined += quarantine.append(self._bad, chunk.faults)
        if (block := chunk.block) is None:
            return
        held = np.fromiter((digest.tobytes() in inflow.held_out for digest in block.digest), bool, len(block))
        if not self.passes:
            self.held_out += len(np.unique(block.row[held]))
        leave = held & (not inflow.keeps_held_out)
        yield from (row for row, left in zip(documents(block, self.name), leave.tolist(), strict=True) if not left)


class Inflow:
    """Token rows of several sources, each by its weight: always of the one that is furthest behind its share.

    Attributes:
        options: the data section.
        maker: makes token rows.
        held_out: digests of the validation rows' examples.
        keeps_held_out: whether those are trained all the same.
        flows: the sources, since the last `begin`.
        rows, tokens, trained_tokens: of the steps since then, over all processes.
    """

    def __init__(self, settings: Settings, held_out: frozenset[bytes] = frozenset()) -> None:
        """
        Args:
            settings: tokenizer, stop tokens and the data section.
            held_out: digests (16 bytes) of examples that training must not see.
        """
        self.options = settings.options
        self.maker = Maker(settings)
        self.held_out = held_out
        self.keeps_held_out = bool(held_out) and settings.options.on_leak == "warn"
        sources = settings.options.train
        # Read before the first step, which refuses a recipe with keys that nothing has read.
        self._weights = [source.weight for source in sources] if len(sources) > 1 else [1.0]
        self._by_tokens = len(sources) > 1 and settings.options.weight_by == "tokens"
        self.flows: list[_Flow] = []
        self.rows = self.tokens = self.trained_tokens = 0
        self._settings = settings

    def begin(self, batch: int, bad: Path | None) -> None:
        """Begin all sources anew.

        Args:
            batch: about how many rows are wanted first.
            bad: where rows that cannot be used are written; None only counts them.
        """
        self.maker = Maker(self._settings)
        self.rows = self.tokens = self.trained_tokens = 0
        first = min(CHUNK, -(-batch // len(self.options.train)))
        self.flows = [_Flow(source, self, first, bad) for source in self.options.train]

    def window(self, wanted: int) -> Iterator[Document]:
        """The next rows: as many as wanted, or fewer where they are long or every source has come to its end.

        A source that has ended begins again, so only a pass over the longest one ends a window.

        Raises:
            FinetuneError: a row or a source cannot be used and the recipe does not go on without it.
        """
        taken = tokens = 0
        begun: set[int] = set()
        ended: set[int] = set()
        while taken < wanted and tokens < WINDOW_TOKENS and len(ended) < len(self.flows):
            number = min(range(len(self.flows)), key=self._behind)
            flow = self.flows[number]
            document = next(flow.rows)
            if document is None:
                ended |= begun & {number}
                continue
            begun.add(number)
            size = len(document["input_ids"])
            flow.given += size if self._by_tokens else 1
            taken, tokens = taken + 1, tokens + size
            yield document

    def count(self, step: Sequence[Document]) -> None:
        """Count the rows of a step."""
        self.rows += len(step)
        self.tokens += sum(len(row["labels"]) for row in step)
        self.trained_tokens += sum(int(np.count_nonzero(row["labels"] != UNTRAINED)) for row in step)

    def _behind(self, number: int) -> float:
        return self.flows[number].given / self._weights[number]

    def report(self) -> DataReport:
        """What was read of the first pass over each source, which is up to a window more than was trained."""
        reports = tuple(flow.report for flow in self.flows)
        kept, tokens, trained = (
            sum(getattr(one, count) for one in reports) for count in ("rows_kept", "tokens", "trained_tokens")
        )
        passes = [f"{flow.name}: read to its end {flow.passes} times" for flow in self.flows if flow.passes > 1]
        treated = "trained all the same" if self.keeps_held_out else "left out of training"
        held = [
            f"{flow.name}: {flow.held_out:,} rows that validation holds too were {treated}"
            for flow in self.flows
            if flow.held_out
        ]
        options = self.options
        notes = (*passes, *held, *self.maker.notes)
        return DataReport(reports, options.max_length, options.on_long_row, kept, tokens, trained, notes=notes)
