"""From prepared sources to the rows of an epoch: copies removed, validation held out, leaks found, sources mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.cache import Cache
from finetune.data.date import one_day
from finetune.data.duplicates import Copies, copies, leaks
from finetune.data.engine import Settings
from finetune.data.mix import mixed, split
from finetune.data.prepare import PreparedSource, prepare
from finetune.data.report import DataReport, counted
from finetune.data.rows import Rows
from finetune.data.template import chat_template
from finetune.errors import DataError
from finetune.recipe.sections import DataOptions

SHOWN = 10
NO_VALIDATION = "data.validation: no row is left to validate on; name other rows, or remove it"


@dataclass(frozen=True)
class Prepared:
    """What training, or validation, gets.

    Attributes:
        rows: token rows of an epoch, source by source.
        report: what was read, kept, changed and left out.
        sources: each source's own rows.
    """

    rows: Rows
    report: DataReport
    sources: tuple[PreparedSource, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the rows in order; equal fingerprints mean equal training data."""
        return self.rows.fingerprint

    def states(self) -> dict[str, str]:
        """What a run that goes on compares of each source beside the fingerprint, by a name; nothing where all rows
        are in that.
        """
        return {}

    def facts(self) -> dict[str, object]:
        """Fingerprint and counts, for a manifest; `epoch` are the token rows of each source that an epoch holds."""
        parts = self.rows.parts
        seen = np.bincount(self.rows.part, minlength=len(parts)).tolist()
        epoch = [{"source": part.name, "rows": count} for part, count in zip(parts, seen, strict=True)]
        return {"fingerprint": self.fingerprint, **self.report.as_dict(), "epoch": epoch}


def gather(
    settings: Settings, cache: Cache, seed: int, say: Callable[[str], None] | None = None
) -> tuple[Prepared, Prepared | None]:
    """Prepare all sources of a data section and make the rows of training and validation from them.

    Args:
        settings: tokenizer and options.
        cache: where prepared rows are kept.
        seed: chooses the rows of sources whose weight is not whole.
        say: told what takes time.

    Returns:
        Training, and validation where there is any.

    Raises:
        FinetuneError: as `prepare`; DataError also where validation rows are trained on (data.on_leak), and where
            nothing is left.
    """
    options = settings.options
    with one_day():
        found = prepare((*options.train, *options.validation), settings, cache, say)
        notes = list(date_note(found, settings))
    named = tuple(found[: len(options.train)])
    apart = tuple(found[len(options.train) :])
    rows = Rows.of([one.rows for one in named])
    removed = None
    if options.deduplicate != "none":
        removed = copies(rows, options.near_duplicate_threshold if options.deduplicate == "near" else None)
        rows = removed.without()
    held_out = Rows.of([])
    if options.validation_split:
        rows, held_out = split(rows, options.validation_split)
    weights = [one.source.weight for one in apart]
    validation = _together(held_out, mixed(Rows.of([one.rows for one in apart]), weights, seed=seed))
    if len(validation):
        validation = _without_leaks(rows, validation, options, notes)
    train = mixed(rows, [one.source.weight for one in named], options.weight_by, options.stopping_strategy, seed)
    notes += _unequal(named, rows, train)
    report = _report(train, named, options, removed, len(held_out), tuple(notes))
    if not len(train):
        raise DataError(
            f"no row is left to train on: {'; '.join(report.lines())}; raise data.max_length or mend the data"
        )
    if not len(validation):
        if options.validation:
            raise DataError(NO_VALIDATION)
        return Prepared(train, report, named), None
    return Prepared(train, report, named), Prepared(validation, _report(validation, apart, options, None, 0, ()), apart)


def date_note(found: Sequence[PreparedSource], settings: Settings) -> tuple[str, ...]:
    """What is to be said of the date in the rows, where there are chats and the template writes one."""
    chats = settings.options.loss_on == "all" or any(one.rows.turn.max(initial=-1) >= 0 for one in found)
    try:
        template = chat_template(settings.vocabulary, settings.options.chat_template, settings.stop_ids)
    except DataError:  # a base without a template, trained on plain text
        return ()
    return template.date_note() if chats else ()


def _unequal(named: Sequence[PreparedSource], rows: Rows, train: Rows) -> list[str]:
    """What is to be said of sources whose rows are not each seen once in an epoch."""
    if not len(train):
        return []
    notes = []
    own, seen = (np.bincount(some.part, minlength=len(named)).tolist() for some in (rows, train))
    for one, have, count in zip(named, own, seen, strict=True):
        if count and count != have:
            times = f"{count / have:.2f} times its {have:,}"
            notes.append(f"{one.report.name}: {counted(count, 'row')} in an epoch, which is {times}")
        elif not count and one.report.rows_kept:
            notes.append(f"{one.report.name}: none of its rows is seen in an epoch")
    return notes


def validation_alone(
    settings: Settings, cache: Cache, seed: int, say: Callable[[str], None] | None = None
) -> Prepared | None:
    """The rows of the sources named for validation, where training rows are not known beforehand; None without any.

    Arguments and errors are those of `gather`.
    """
    options = settings.options
    if not options.validation:
        return None
    found = tuple(prepare(options.validation, settings, cache, say))
    rows = mixed(Rows.of([one.rows for one in found]), [one.source.weight for one in found], seed=seed)
    if not len(rows):
        raise DataError(NO_VALIDATION)
    return Prepared(rows, _report(rows, found, options, None, 0, ()), found)


def _together(held_out: Rows, named: Rows) -> Rows:
    """Rows held out, then rows of sources named for validation."""
    if not len(named):
        return held_out
    if not len(held_out):
        return named
    parts = (*held_out.parts, *named.parts)
    return Rows(
        parts,
        np.concatenate([held_out.part, named.part + np.int32(len(held_out.parts))]),
        np.concatenate([held_out.at, named.at]),
    )


def _without_leaks(train: Rows, validation: Rows, options: DataOptions, notes: list[str]) -> Rows:
    """The validation rows, leaks treated as data.on_leak says.

    Raises:
        DataError: some are trained on, and on_leak is error.
    """
    near = options.near_duplicate_threshold if options.deduplicate == "near" else None
    treated = options.on_leak
    found = leaks(train, validation, near)
    if not len(found):
        return validation
    pairs = list(found.named())
    shown = "\n".join(
        f"  row {row} of {name} is row {other} of {trained}" for (name, row), (trained, other) in pairs[:SHOWN]
    )
    more = f"\n  … and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    count = f"{len(pairs):,} validation row{' is' if len(pairs) == 1 else 's are'} trained on too"
    if treated == "error":
        raise DataError(
            f"{count} (rows from 0):\n{shown}{more}\nthe validation loss would look better than it is; take them "
            "out, or set data.on_leak to drop, or to warn"
        )
    (name, row), (trained, other) = pairs[0]
    first = f"the first is row {row} of {name}, which is row {other} of {trained}, from 0"
    if treated == "warn":
        notes.append(f"warning: {count}; {first}")
        return validation
    notes.append(f"{len(pairs):,} validation rows left out because they are trained on; {first}")
    return found.without()


def _report(
    rows: Rows, sources: Sequence[PreparedSource], options: DataOptions, removed: Copies | None, held_out: int,
    notes: tuple[str, ...],
) -> DataReport:  # fmt: skip
    return DataReport(
        sources=tuple(replace(one.report) for one in sources),
        max_length=options.max_length,
        on_long_row=options.on_long_row,
        rows=len(rows),
        tokens=rows.tokens,
        trained_tokens=rows.trained_tokens,
        duplicates=len(removed) if removed is not None else 0,
        held_out=held_out,
        notes=notes,
    )
