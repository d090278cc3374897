"""Rows become examples: the format is found by content, and all faults of all sources are gathered. No torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from finetune.data.read import Row, read
from finetune.data.source import HubDataset, locate
from finetune.errors import DataError
from finetune.formats import FORMATS
from finetune.formats.example import (
    Conversation,
    Example,
    Fault,
    Format,
    Gives,
    PromptCompletion,
    RowError,
    Text,
)
from finetune.recipe.sections import DataOptions, Source
from finetune.registry import nearest, resolve

_KINDS: dict[type, Gives] = {Conversation: "messages", PromptCompletion: "prompt_completion", Text: "text"}
SAMPLE = 100
SHOWN = 10


@dataclass(frozen=True)
class Located:
    """An example and where it came from.

    Attributes:
        example: what the row means.
        index: 0-based row within its source.
        place: `file:line`.
    """

    example: Example
    index: int
    place: str


def examples(source: Source) -> Iterator[Located | Fault]:
    """Read `source` and convert its rows; a bad row yields its faults.

    Raises:
        RecipeError: the format is unknown.
        EnvironmentFault, DataError: a hub data set cannot be had.
    """
    rows = read(source)
    named = None if source.format == "auto" else resolve("format", source.format, FORMATS)
    sample: list[Row | Fault] = []
    good: list[Row] = []
    for row in rows:
        sample.append(row)
        if isinstance(row, Row):
            good.append(row)
        if named or len(good) == SAMPLE:
            break
    layout = named or detect(good, source.path)
    for row in chain(sample, rows):
        if isinstance(row, Fault):
            yield row
        elif isinstance(layout, Format):
            yield from _convert(row, layout)
    if isinstance(layout, Fault) and good:
        yield layout


def _convert(row: Row, layout: Format) -> Iterator[Located | Fault]:
    try:
        yield Located(layout.to_example(row.values), row.index, row.place)
    except RowError as error:
        for fault in error.faults:
            yield dataclasses.replace(fault, place=row.place)


def detect(rows: Sequence[Row], name: str) -> Format | Fault:
    """The format that most of `rows` look like, or a fault when none or more than one fits.

    Args:
        rows: the first rows of a source.
        name: the source's path, for the fault.
    """
    formats: list[Format] = [resolve("format", key, FORMATS) for key in FORMATS]
    votes = Counter(layout.name for row in rows for layout in formats if layout.recognises(row.values))
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    best = [layout for layout in formats if votes and votes[layout.name] == max(votes.values())]
    if len(best) == 1:
        return best[0]
    found = f"the columns {', '.join(columns)}"
    if best:
        names = [layout.name for layout in best]
        return Fault("", found, "one format", f"they fit {' and '.join(names)}: set format to one of them", name)
    known = "; ".join(f"{layout.name}: {', '.join(layout.columns)}" for layout in formats)
    if "chosen" in columns and "rejected" in columns:
        fix = "these are preference rows: to imitate the chosen answers, rename prompt and chosen to prompt, completion"
    else:
        wanted = [column for layout in formats for column in layout.columns]
        near = {column: match[0] for column in columns if (match := nearest(column, wanted, 1))}
        pairs = " and ".join(f"{match!r} for {column!r}" for column, match in near.items() if match != column)
        fix = f"did you mean {pairs}?" if pairs else "rename the columns, or write a format as package.module:attribute"
    return Fault("", found, f"those of a known format ({known})", fix, name)


def check_sources(options: DataOptions, needs: Sequence[Gives] | None = None) -> list[Fault]:
    """Everything wrong with the local sources of training and validation, without torch, tokenizer or network.

    Args:
        options: the data section.
        needs: the kinds of examples that the training method takes; None for all.

    Raises:
        RecipeError: a format is unknown.
    """
    faults: list[Fault] = []
    for source in dict.fromkeys((*options.train, *options.validation)):
        if isinstance(locate(source), HubDataset):
            continue
        kinds: set[Gives] = set()
        for found in examples(source):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                kinds.add(_KINDS[type(found.example)])
        for kind in sorted(kinds - set(needs or kinds)):
            fix = "name other rows, or another training.method"
            faults.append(Fault("", f"rows of the kind {kind}", " or ".join(needs or ()), fix, source.path))
    return faults


def refuse(faults: Sequence[Fault]) -> None:
    """Do nothing when there are no faults.

    Raises:
        DataError: there are; it tells how many, in how many places, and shows the first ten.
    """
    if not faults:
        return
    places = len({fault.place for fault in faults})
    head = f"{_counted(len(faults), 'fault')} in {_counted(places, 'place')} of the data"
    shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
    more = f"\n  … and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise DataError(f"{head}:\n{shown}{more}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
