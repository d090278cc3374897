"""Generated multi-turn chats for benchmarks of the data engine: the same file from the same seed, anywhere.

    python benchmarks/chats.py OUTPUT.jsonl [--rows 50000] [--seed 0]

A row is a chat of 2 to 10 messages that ends with the assistant's; some begin with a system message. Row lengths are
lognormal with a long tail, 260 tokens a row on average with SmolLM2's tokenizer and chat template. Words follow Zipf's
law over a vocabulary of 40,000, most of them compounds or made of syllables, so that a tokenizer's caches are hit about
as often as by real text. Some messages hold code, Chinese or emoji. No text is taken from anywhere.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

VOCABULARY = 40_000  # words
MEDIAN_WORDS = 69.0  # of a row; with SPREAD this gives 260 tokens a row on average
SPREAD = 0.75  # standard deviation of the logarithm of a row's words
LONGEST = 900  # words of a row


def _words(text: str) -> list[str]:
    return text.split()


_COMMON = _words("""
the of and to a in is that it for was on are as with be by this at from or an have not which you can has but all one
their more will would about when there been who them some if other than its only time into could new then no may such
like these make over also our two even most after how first way because what any those where between each through
before must while should does good much need work use used using same different number part small large long next
point value result example question answer problem reason change order case line file name list set data model table
system process step start end open close read write send check find show give take keep call run test error message
user page text word code function method class type object field key index row column input output request response
server client service version update install build option default setting folder path user group account address
customer invoice product price delivery week month year day hour minute second today tomorrow please thank sorry help
""")
_ONSETS = _words(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sp st th tr"
)
_VOWELS = _words("a e i o u ai ea ee ie io oa oo ou")
_CODAS = ["", "", "", *_words("b ck d f g l ll m n nd ng nt p r rd rn rt s ss st t th x")]
_PREFIXES = ["", "", "re", "un", "over", "sub", "pre", "inter", "non", "multi", "out", "up", "auto", "cross", "mis"]
_ENDINGS = ["", "", "", "s", "ed", "ing", "er", "ly", "tion", "ment", "al", "ity", "ive", "able"]
_CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法"
    "所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政"
    "四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最"
)
_EMOJI = ["\N{GRINNING FACE}", "\N{THUMBS UP SIGN}", "\N{ROCKET}", "\N{PARTY POPPER}", "\N{THINKING FACE}",
          "\N{WHITE HEAVY CHECK MARK}", "\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}", "\N{SPARKLES}"]  # fmt: skip
_SYSTEM = "You are a careful assistant. Answer in the user's language, briefly and correctly."


class _Writer:
    """Draws messages; everything random comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.words = _vocabulary(random.Random(0))
        self.weights = list(accumulate(1 / (rank + 2.7) for rank in range(len(self.words))))

    def some(self, count: int) -> list[str]:
        return self.draw.choices(self.words, cum_weights=self.weights, k=count)

    def prose(self, count: int) -> str:
        """About `count` words in sentences and paragraphs."""
        words, draw, text = self.some(count), self.draw, []
        while words:
            size = draw.randint(4, 18)
            sentence, words = words[:size], words[size:]
            if len(sentence) > 8 and draw.random() < 0.6:
                sentence[draw.randrange(2, 6)] += ","
            if draw.random() < 0.08:
                sentence.append(str(draw.randrange(1, 20_000)))
            closing = draw.choices([". ", "? ", ".\n\n", ":\n- "], weights=[80, 8, 10, 2])[0]
            text.append(" ".join(sentence).capitalize() + closing)
        if draw.random() < 0.06:
            text.append(draw.choice(_EMOJI))
        return "".join(text).strip()

    def code(self, count: int) -> str:
        """A fenced block of code of about `count` words."""
        draw, names = self.draw, self.some(max(6, count // 2))
        lines = [f"def {names[0]}_{names[1]}({names[2]}, {names[3]}=None):"]
        for number in range(max(2, count // 8)):
            one, two, three = (draw.choice(names) for _ in range(3))
            shapes = (
                f"    {one} = {two}.{three}({names[2]}[{draw.randrange(99)}])",
                f"    if {one} is not None and {two} > {draw.randrange(1000)}:\n        return {three}",
                f'    print(f"{{{one}}}: {two} {three}")  # {number}',
                f"    for {one} in range(len({two})):\n        {three}[{one}] += {draw.random():.3f}",
            )
            lines.append(draw.choice(shapes))
        return "```python\n" + "\n".join([*lines, f"    return {names[-1]}"]) + "\n```"

    def chinese(self, count: int) -> str:
        """About as many tokens of Chinese as `count` words of English have."""
        draw, left, text = self.draw, max(4, count // 2), []
        while left > 0:
            size = draw.randint(4, 20)
            text.append("".join(draw.choices(_CHINESE, k=min(size, left))) + draw.choice("，。，。？"))
            left -= size
        return "".join(text)

    def message(self, count: int, language: str) -> str:
        if language == "chinese":
            return self.chinese(count)
        if language == "code" and count > 25:
            return self.prose(count // 3) + "\n\n" + self.code(count // 2)
        return self.prose(count)

    def chat(self) -> list[dict[str, str]]:
        draw = self.draw
        total = min(LONGEST, max(10, int(draw.lognormvariate(0, SPREAD) * MEDIAN_WORDS)))
        pairs = min(5, 1 + int(draw.expovariate(0.6)), max(1, total // 10))
        language = draw.choices(["english", "code", "chinese"], weights=[80, 12, 8])[0]
        messages = [{"role": "system", "content": _SYSTEM}] if draw.random() < 0.2 and pairs < 5 else []
        for _ in range(pairs):
            share = total / pairs * draw.uniform(0.5, 1.5)
            messages.append({"role": "user", "content": self.message(max(3, int(share * 0.3)), language)})
            messages.append({"role": "assistant", "content": self.message(max(3, int(share * 0.7)), language)})
        return messages


def _vocabulary(draw: random.Random) -> list[str]:
    """Words by falling frequency: the common ones, then compounds and made ones."""
    found = dict.fromkeys(_COMMON)
    while len(found) < VOCABULARY:
        if draw.random() < 0.6:
            second = draw.choice(_COMMON) if draw.random() < 0.3 else ""
            stem = draw.choice(_PREFIXES) + draw.choice(_COMMON) + second
        else:
            syllables = 1 + (len(found) > 2_000) + (len(found) > 20_000)
            stem = "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(syllables))
        word = stem + draw.choice(_ENDINGS)
        found[word.capitalize() if draw.random() < 0.05 else word] = None
    return list(found)


def chats(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in `messages` format."""
    writer = _Writer(seed)
    for _ in range(rows):
        yield {"messages": writer.chat()}


def write(path: Path, rows: int, seed: int = 0) -> Path:
    """Write `rows` chats as JSON lines; the same bytes from the same seed."""
    with open(path, "w", encoding="utf-8") as stream:
        for row in chats(rows, seed):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def main() -> None:
    """Write a file of chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(asked.output, asked.rows, asked.seed)


if __name__ == "__main__":
    main()
