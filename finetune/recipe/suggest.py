"""Which known key a misspelt one was meant to be.

A key is compared as letters (edit distance with transpositions) and as words (order, plurals, abbreviations, missing
or added words); the cheaper reading counts. No list of misspellings stands behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NEAR = 0.42
"""Highest cost at which a key is still offered; 0 is the same key, 1 has nothing in common."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_DOUBLED = re.compile(r"(.)\1+")
_FILLERS = frozenset({"the", "of", "for", "to", "a", "in", "is", "use", "enable", "my", "do"})


def nearest_keys(written: str, known: Iterable[str], count: int = 3, limit: float = NEAR) -> list[str]:
    """The known names that `written` may have been meant to be, best first; empty when none costs at most `limit`."""
    costs = sorted((cost(written, name), index, name) for index, name in enumerate(known))
    return [name for value, _, name in costs if value <= limit][:count]


def cost(written: str, known: str) -> float:
    """How unlike two names are, from 0 (the same but for case and separators) to 1."""
    a, b = words(written), words(known)
    letters_a, letters_b = "".join(a), "".join(b)
    if not a:
        return 1.0
    if a == b:
        return 0.0
    if letters_a == letters_b:
        return 0.01
    if sorted(a) == sorted(b):
        return 0.02
    if _DOUBLED.sub(r"\1", letters_a) == _DOUBLED.sub(r"\1", letters_b):
        return 0.03
    by_letters = distance(letters_a, letters_b) / max(len(letters_a), len(letters_b))
    by_words = _word_cost(a, b)
    by_initials = 0.25 if len(letters_a) > 1 and letters_a == "".join(word[0] for word in b) else 1.0
    by_start = 0.35 if len(a) == 1 and len(letters_a) >= 3 and letters_b.startswith(letters_a) else 1.0
    return min(by_letters, by_words, by_initials, by_start, _part_cost(a, b))


def words(name: str) -> list[str]:
    """learningRate, learning-rate and LEARNING_RATE are all [learning, rate]."""
    return [word.lower() for word in _WORD.findall(name)]


def distance(a: str, b: str) -> int:
    """Edit distance in letters: insertion, deletion, substitution and swap of neighbours cost 1 each."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]


def _word_cost(a: Sequence[str], b: Sequence[str]) -> float:
    """Pair the words of two names cheapest first; what stays alone costs, filler words hardly."""
    pairs = sorted((_one_word_cost(x, y), abs(i - j), i, j) for i, x in enumerate(a) for j, y in enumerate(b))
    left, right = set(range(len(a))), set(range(len(b)))
    total = weight = 0.0
    for value, _, i, j in pairs:
        if i in left and j in right and value < 0.5:
            left.discard(i)
            right.discard(j)
            size = max(len(a[i]), len(b[j]))
            total += value * size
            weight += size
    if not weight:
        return 1.0
    for alone, share in ((left, a), (right, b)):
        for index in alone:
            size = len(share[index])
            total += size * (0.1 if share[index] in _FILLERS else 0.75)
            weight += size
    return total / weight + 0.03


def _part_cost(a: Sequence[str], b: Sequence[str]) -> float:
    """A name that is some whole words of another, as decay of weight_decay: near, but behind every closer one."""
    rest = [_singular(word) for word in b]
    for word in map(_singular, a):
        if word not in rest:
            return 1.0
        rest.remove(word)
    length = sum(map(len, a))
    return 0.38 + 0.04 * (1 - length / max(length, sum(map(len, b)))) if length >= 4 else 1.0


def _one_word_cost(a: str, b: str) -> float:
    if a == b:
        return 0.0
    if _singular(a) == _singular(b):
        return 0.05
    short, long = sorted((a, b), key=len)
    result = distance(a, b) / len(long)
    if len(short) >= 2 and short[0] == long[0]:
        if long.startswith(short):
            result = min(result, 0.2)
        elif _is_subsequence(short, long):
            result = min(result, 0.3)
    return result


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and len(word) > 2 and not word.endswith("ss") else word


def _is_subsequence(short: str, long: str) -> bool:
    letters = iter(long)
    return all(letter in letters for letter in short)
