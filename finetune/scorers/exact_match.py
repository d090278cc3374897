"""The answer equals the reference, white space at both ends aside."""

from __future__ import annotations


def score(answer: str, reference: str) -> dict[str, float]:
    """1.0 when equal, else 0.0.

    >>> score(" yes\\n", "yes")
    {'exact_match': 1.0}
    >>> score("Yes", "yes")
    {'exact_match': 0.0}
    """
    return {"exact_match": float(answer.strip() == reference.strip())}
