"""generation_config.json of an exported model: what a server stops at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, ModelError
from finetune.files import write_json

FILE = "generation_config.json"


def generation_of(folder: Path) -> dict[str, Any]:
    """generation_config.json as a mapping; empty where there is none.

    Raises:
        ModelError: it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read ({error}); download it again") from error


def stops_of(folder: Path) -> tuple[int, ...]:
    """The ids at which a server stops: generation_config.json's, or config.json's where that names none."""
    generation = generation_of(folder).get("eos_token_id")
    if generation is None and (folder / "config.json").is_file():
        generation = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    values = generation if isinstance(generation, list) else [generation]
    return tuple(number for number in values if type(number) is int)


def state_stops(folder: Path, ends: Iterable[int]) -> tuple[int, ...]:
    """Let generation_config.json of a folder name every id that trained answers end with; nothing else in it changes.

    Args:
        folder: an exported model.
        ends: from the stop contract.

    Returns:
        The ids that were added, the file read again.

    Raises:
        ExportError: the file does not say so afterwards.
    """
    ends = tuple(ends)
    before = stops_of(folder)
    missing = tuple(end for end in ends if end not in before)
    if not missing:
        return ()
    every = [*before, *missing]
    write_json(folder / FILE, {**generation_of(folder), "eos_token_id": every if len(every) > 1 else every[0]})
    if set(ends) - set(stops_of(folder)):
        raise ExportError(
            f"{folder / FILE}: does not name the stop tokens {sorted(ends)} that answers were trained with"
        )
    return missing
