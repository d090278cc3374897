"""The story of the data: sources in, token rows out, with everything that was changed or left out counted.

Runs before any process group exists; the trainer is given these rows and tokenizes nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from finetune.data.encode import UNTRAINED, Tokens, encode, encode_plain
from finetune.data.examples import SHOWN, Located, examples, refuse
from finetune.data.render import WHOLE, ChatTemplate, Rendering, chat_template, render, trained_turns
from finetune.data.report import DataReport, SourceReport
from finetune.errors import DataError
from finetune.formats.example import Conversation, Fault, RowError
from finetune.recipe.sections import DataOptions, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512


@dataclass(frozen=True)
class Prepared:
    """What training gets.

    Attributes:
        rows: `input_ids` (int32 list), `labels` (int32 list, -100 where untrained), `source` (its name), `row` (int32,
            0-based within the source), `turn` (int32, the last message trained; -1 where the whole row is one).
        report: what was read, kept, changed and left out.
        fingerprint: SHA-256 over ids and labels in order; equal fingerprints mean equal training data.
    """

    rows: datasets.Dataset
    report: DataReport
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        """Fingerprint and counts, for a run's manifest."""
        return {"fingerprint": self.fingerprint, **self.report.as_dict()}


@dataclass
class _Gathered:
    """Token rows as they are collected: parallel lists, ids and labels as int32 arrays."""

    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)


def prepare(
    options: DataOptions,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    seed: int = 42,
) -> Prepared:
    """Read, render, encode and mask the rows of `sources`; call it once for training and once for validation.

    The first token of a row is never predicted, so its label is -100 and the count of trained tokens is exact.

    Args:
        options: how rows are treated (max_length, on_long_row, loss_on, chat_template).
        sources: `options.train` or `options.validation`.
        tokenizer: the base model's.
        stop_ids: tokens that end a turn: its eos_token_id and those of the model's generation config.
        seed: chooses the rows of sources whose weight is not whole.

    Raises:
        DataError: any row or file is at fault (all are counted, ten shown), or nothing is left to train on.
        RecipeError: a format is unknown.
        EnvironmentFault: the hub cannot be reached.
    """
    faults: list[Fault] = []
    long_rows: list[tuple[int, str]] = []
    parts: list[tuple[str, _Gathered]] = []
    reports: list[SourceReport] = []
    template: ChatTemplate | None = None
    for number, source in enumerate(sources):
        report = SourceReport(name=source.name or source.path)
        gathered = _Gathered()
        found = examples(source)
        while chunk := list(islice(found, CHUNK)):
            faults += [item for item in chunk if isinstance(item, Fault)]
            good = [item for item in chunk if isinstance(item, Located)]
            if template is None and any(isinstance(item.example, Conversation) for item in good):
                template = chat_template(tokenizer, options.chat_template, stop_ids)
            for item, rows in _encoded(good, options, tokenizer, template, stop_ids, report):
                if isinstance(rows, RowError):
                    faults += [Fault(f.field, f.found, f.expected, f.fix, item.place) for f in rows.faults]
                else:
                    faults += _gather(rows, item, options, gathered, report, long_rows)
        reports.append(report)
        parts.append((report.name, _weighted(gathered, source.weight, random.Random(f"{seed}:{number}"))))
    refuse(faults)
    if long_rows and options.on_long_row == "error":
        raise DataError(_too_long(long_rows, options.max_length))
    for report, (_, gathered) in zip(reports, parts, strict=True):
        report.rows_kept = len(gathered.ids)
        report.tokens = sum(len(ids) for ids in gathered.ids)
        report.trained_tokens = sum(int((labels != UNTRAINED).sum()) for labels in gathered.labels)
    whole = DataReport(tuple(reports), options.max_length, options.on_long_row)
    if not whole.rows_kept:
        raise DataError(
            f"no row is left to train on: {'; '.join(whole.lines())}; raise data.max_length or mend the data"
        )
    return Prepared(_dataset(parts), whole, _fingerprint([gathered for _, gathered in parts]))


def _encoded(
    located: Sequence[Located],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    stop_ids: frozenset[int],
    report: SourceReport,
) -> Iterator[tuple[Located, list[Tokens] | RowError]]:
    """The token rows of each example, or its error, in order."""
    report.rows_read += len(located)
    plain = [item.example for item in located if not isinstance(item.example, Conversation)]
    plain_rows = iter(encode_plain(plain, tokenizer) if plain else [])
    rendered: list[list[Rendering] | RowError] = []
    for item in located:
        if isinstance(item.example, Conversation):
            assert template is not None, "a chunk with chats has a template"
            try:
                rendered.append(render(item.example, template, options.loss_on))
            except RowError as error:
                rendered.append(error)
            _count_turns(item.example, options, report)
    texts = [text for group in rendered if not isinstance(group, RowError) for text in group]
    chat_rows = iter(encode(texts, template, stop_ids) if template else [])
    groups = iter(rendered)
    for item in located:
        if not isinstance(item.example, Conversation):
            yield item, next(plain_rows)
            continue
        group = next(groups)
        if isinstance(group, RowError):
            yield item, group
            continue
        pieces = [next(chat_rows) for _ in group]
        errors = [piece for piece in pieces if isinstance(piece, RowError)]
        yield (
            item,
            errors[0] if errors else [row for piece in pieces if not isinstance(piece, RowError) for row in piece],
        )


def _count_turns(conversation: Conversation, options: DataOptions, report: SourceReport) -> None:
    """Count what a chat holds that is not trained although it might seem so."""
    if options.loss_on == "all":
        return
    turns = trained_turns(conversation, "assistant")
    report.opening_turns += conversation.messages[0]["role"] == "assistant"
    report.trailing_messages += len(conversation.messages) - 1 - turns[-1] if turns else 0


def _gather(
    rows: list[Tokens],
    item: Located,
    options: DataOptions,
    gathered: _Gathered,
    report: SourceReport,
    long_rows: list[tuple[int, str]],
) -> list[Fault]:
    """Add an example's token rows, shortened or left out as on_long_row says; a row with nothing trained is a fault."""
    faults = []
    report.rows_expanded += len(rows) > 1
    report.rows_added += len(rows) - 1
    for tokens in rows:
        ids = np.asarray(tokens.ids, dtype=np.int32)
        labels = np.full_like(ids, UNTRAINED)
        for start, end in tokens.trained:
            labels[start:end] = ids[start:end]
        labels[:1] = UNTRAINED
        if not (labels != UNTRAINED).any():
            found = f"a row of {len(ids)} tokens of which none is trained"
            faults.append(Fault("", found, "at least one", "remove the row", item.place))
            continue
        if len(ids) > options.max_length:
            report.rows_over_length += 1
            report.longest = max(report.longest, len(ids))
            long_rows.append((len(ids), item.place))
            if options.on_long_row == "drop":
                report.rows_dropped += 1
                report.tokens_lost += len(ids)
                continue
            report.tokens_lost += len(ids) - options.max_length
            ids, labels = ids[: options.max_length], labels[: options.max_length]
        if not (labels != UNTRAINED).any():
            report.rows_dropped += 1
            report.rows_without_answer += 1
            report.tokens_lost += len(ids)
            continue
        gathered.ids.append(ids)
        gathered.labels.append(labels)
        gathered.row.append(item.index)
        gathered.turn.append(tokens.turn if len(rows) > 1 else WHOLE)
    return faults


def _weighted(gathered: _Gathered, weight: float, draw: random.Random) -> _Gathered:
    """The rows as often as `weight` says: whole copies, and a seeded share of raw rows for the rest, in file order."""
    if weight == 1:
        return gathered
    raw = sorted(set(gathered.row))
    copies = int(weight)
    extra = set(draw.sample(raw, round((weight - copies) * len(raw))))
    chosen = [*range(len(gathered.ids))] * copies + [at for at, row in enumerate(gathered.row) if row in extra]
    return _Gathered(
        [gathered.ids[at] for at in chosen],
        [gathered.labels[at] for at in chosen],
        [gathered.row[at] for at in chosen],
        [gathered.turn[at] for at in chosen],
    )


def _too_long(long_rows: Sequence[tuple[int, str]], max_length: int) -> str:
    """The error of rows over max_length."""
    longest, place = max(long_rows, key=lambda entry: entry[0])
    shown = "\n".join(f"  {where}: {length:,} tokens" for length, where in long_rows[:SHOWN])
    more = f"\n  … and {len(long_rows) - SHOWN} more" if len(long_rows) > SHOWN else ""
    return (
        f"{len(long_rows):,} row{'s are' if len(long_rows) > 1 else ' is'} longer than data.max_length ({max_length:,} "
        f"tokens); the longest has {longest:,} ({place}); raise data.max_length, or set data.on_long_row to truncate "
        f"or drop:\n{shown}{more}"
    )


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    """Int32 arrays as one Arrow list array over a flat buffer."""
    lengths = np.fromiter((len(array) for array in arrays), dtype=np.int64, count=len(arrays))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    flat = pa.array(np.concatenate(arrays))
    if offsets[-1] <= np.iinfo(np.int32).max:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat)
    return pa.LargeListArray.from_arrays(pa.array(offsets), flat)


def _dataset(parts: Sequence[tuple[str, _Gathered]]) -> datasets.Dataset:
    """All rows in the order of their sources."""
    kept = [gathered for _, gathered in parts]
    table = pa.table(
        {
            "input_ids": _lists([ids for gathered in kept for ids in gathered.ids]),
            "labels": _lists([labels for gathered in kept for labels in gathered.labels]),
            "source": pa.array([name for name, gathered in parts for _ in gathered.ids], pa.string()),
            "row": pa.array([row for gathered in kept for row in gathered.row], pa.int32()),
            "turn": pa.array([turn for gathered in kept for turn in gathered.turn], pa.int32()),
        }
    )
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _fingerprint(parts: Sequence[_Gathered]) -> str:
    """SHA-256 over the length, ids and labels of each row, as little-endian integers."""
    digest = hashlib.sha256()
    for gathered in parts:
        for ids, labels in zip(gathered.ids, gathered.labels, strict=True):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()


def shared_rows(train: Prepared, validation: Prepared) -> list[tuple[str, int]]:
    """Validation rows whose tokens are also a training row: (source, row) of each. They make validation look better."""
    ids = train.rows.with_format("arrow")["input_ids"]
    seen = {hashlib.sha256(_bytes(value)).digest() for value in ids}
    found = [
        (source, row)
        for value, source, row in zip(
            validation.rows.with_format("arrow")["input_ids"],
            validation.rows["source"],
            validation.rows["row"],
            strict=True,
        )
        if hashlib.sha256(_bytes(value)).digest() in seen
    ]
    return list(dict.fromkeys(found))


def _bytes(value: pa.Scalar) -> bytes:
    return bytes(value.values.to_numpy().tobytes())
