"""The answer is a JSON object with the reference's fields, scored as a whole and field by field."""

from __future__ import annotations

import json
from typing import Any

from finetune.errors import DataError


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def score(answer: str, reference: str) -> dict[str, float]:
    """`exact_match` (same fields, same values, none more), `valid_json`, and each field of the reference as 1.0 or 0.0.

    Raises:
        DataError: the reference itself is no JSON object.

    >>> score('{"a": 1, "b": 2}', '{"a":1,"b":2}')
    {'exact_match': 1.0, 'valid_json': 1.0, 'a': 1.0, 'b': 1.0}
    >>> score('{"a": 1, "b": 3}', '{"a":1,"b":2}')
    {'exact_match': 0.0, 'valid_json': 1.0, 'a': 1.0, 'b': 0.0}
    >>> score('a: 1', '{"a":1}')
    {'exact_match': 0.0, 'valid_json': 0.0, 'a': 0.0}
    """
    expected = _object(reference)
    if expected is None:
        raise DataError(
            f"evaluate.scorer: json_fields needs answers that are JSON objects; found {reference[:60]!r}; "
            "use exact_match for such rows"
        )
    found = _object(answer)
    fields = {name: float(found is not None and found.get(name) == value) for name, value in expected.items()}
    return {"exact_match": float(found == expected), "valid_json": float(found is not None), **fields}
