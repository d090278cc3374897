"""The bounds of a recipe's audit section: cheap for any number of rows, so that every run is held to them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from finetune.data.duplicates import copies
from finetune.data.gather import Prepared
from finetune.data.pack import best_fit, density
from finetune.data.prepare import PreparedSource
from finetune.errors import DataError
from finetune.recipe.sections import AuditOptions, DataOptions

SHOWN = 5


def violated(train: Prepared, audit: AuditOptions, options: DataOptions) -> list[str]:
    """The bounds that the training rows do not keep, each with its figure, its source and the first rows at fault."""
    found = [line for source in train.sources for line in _source(source, audit)]
    if audit.max_duplicate_share < 1:
        repeated = copies(train.rows)
        read = max(1, sum(source.report.rows_read for source in train.sources))
        if len(repeated) / read > audit.max_duplicate_share:
            some = ", ".join(f"row {row} of {name}" for (name, row), _ in list(repeated.named())[:SHOWN])
            found.append(
                f"audit.max_duplicate_share: {len(repeated) / read:.1%} of the rows are copies of earlier ones, at "
                f"most {audit.max_duplicate_share:.1%} may be (rows from 0: {some}); set data.deduplicate to exact"
            )
    if options.packing and options.packing_strategy == "bfd" and audit.min_packing_density:
        reached = density(best_fit(train.rows.lengths, options.max_length), options.max_length)
        if reached < audit.min_packing_density:
            found.append(
                f"audit.min_packing_density: packed sequences are {reached:.1%} full, at least "
                f"{audit.min_packing_density:.1%} is asked for; choose another data.max_length"
            )
    return found


def refuse_beyond(train: Prepared, audit: AuditOptions, options: DataOptions) -> None:
    """Do nothing when every bound is kept.

    Raises:
        DataError: one or more are not.
    """
    if found := violated(train, audit, options):
        raise DataError("the training rows are not as the recipe's audit section wants them:\n" + "\n".join(found))


def _source(source: PreparedSource, audit: AuditOptions) -> Iterator[str]:
    report = source.report
    trained = report.trained_tokens / report.tokens if report.tokens else 0.0
    if report.tokens and trained < audit.min_trained_share:
        counts = source.rows.trained_counts / np.maximum(source.rows.lengths, 1)
        yield (
            f"audit.min_trained_share: {trained:.2%} of the tokens of {report.name} are trained, at least "
            f"{audit.min_trained_share:.2%} is asked for ({_rows(source, counts < audit.min_trained_share)}); see what "
            "is trained with `finetune data preview`, and check data.loss_on"
        )
    stopped = report.answers_stopped / report.answers if report.answers else 1.0
    if stopped < audit.min_stop_share:
        yield (
            f"audit.min_stop_share: {stopped:.2%} of the trained answers of {report.name} end with a stop token, at "
            f"least {audit.min_stop_share:.2%} is asked for ({_rows(source, source.rows.cut)}); raise data.max_length, "
            "or set data.on_long_row to drop"
        )
    rows = max(1, report.rows_kept + report.rows_dropped)
    if report.rows_cut / rows > audit.max_truncated_share:
        yield (
            f"audit.max_truncated_share: {report.rows_cut / rows:.2%} of the rows of {report.name} are cut, at most "
            f"{audit.max_truncated_share:.2%} may be ({_rows(source, source.rows.cut)}); raise data.max_length"
        )
    out = report.rows_dropped + report.rows_quarantined
    every = max(1, report.rows_kept + out)
    if out / every > audit.max_dropped_share:
        yield (
            f"audit.max_dropped_share: {out / every:.2%} of the rows of {report.name} are left out, at most "
            f"{audit.max_dropped_share:.2%} may be; raise data.max_length, or mend the rows in quarantine.jsonl"
        )


def _rows(source: PreparedSource, which: np.ndarray) -> str:
    rows = source.rows.row[np.flatnonzero(which)[:SHOWN]].tolist()
    return f"rows from 0: {', '.join(map(str, rows))}" if rows else "no single row stands out"
