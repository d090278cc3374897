"""The answer is a JSON object with the reference's fields, scored as a whole and field by field."""

from __future__ import annotations

import json
from typing import Any

from finetune.errors import DataError


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")  # Python reads NaN and Infinity, JSON has neither


def _same(found: Any, expected: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, and true is no number, as it is in Python."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[name], expected[name]) for name in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return bool(found == expected)


def score(answer: str, reference: str) -> dict[str, float]:
    """`exact_match` (same fields, same values, none more), `valid_json`, and each field of the reference as 1.0 or 0.0.

    A field that is itself called `exact_match` or `valid_json` counts in the whole and has no figure of its own.

    Raises:
        DataError: the reference itself is no JSON object.

    >>> score('{"a": 1, "b": 2}', '{"a":1,"b":2}')
    {'exact_match': 1.0, 'valid_json': 1.0, 'a': 1.0, 'b': 1.0}
    >>> score('{"a": 1, "b": 3}', '{"a":1,"b":2}')
    {'exact_match': 0.0, 'valid_json': 1.0, 'a': 1.0, 'b': 0.0}
    >>> score('a: 1', '{"a":1}')
    {'exact_match': 0.0, 'valid_json': 0.0, 'a': 0.0}
    >>> score('{}', '{"a":null}')
    {'exact_match': 0.0, 'valid_json': 1.0, 'a': 0.0}
    """
    expected = _object(reference)
    if expected is None:
        raise DataError(
            f"evaluate.scorer: json_fields needs answers that are JSON objects; found {reference[:60]!r}; "
            "use exact_match for such rows"
        )
    found = _object(answer)
    whole = {"exact_match": float(_same(found, expected)), "valid_json": float(found is not None)}
    fields = {
        name: float(found is not None and name in found and _same(found[name], value))
        for name, value in expected.items()
        if name not in whole
    }
    return {**whole, **fields}
