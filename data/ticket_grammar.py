"""From a grammar to support tickets with their answers: the engine that data/tickets and data/tickets-zh share.

A grammar (grammar.json beside each data set) lists products, complaints by category, cues of urgency, greetings,
closings and distractors in one language. A ticket is one complaint about one product, at most one cue, and whatever
surrounds them in real mail. Its answer follows from the text alone: the complaint decides category and summary, the cue
the priority.

Rows come in blocks: a block holds every complaint once and every priority equally often, in shuffled order, so any
prefix of a file is balanced. Training and held-out rows are kept apart by rule: a paraphrase together with a product
belongs to one of them only, so no held-out ticket asks a question that training has already shown in the same words.

Only the standard library is used, and a seed decides every row.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Row = dict[str, Any]

HELDOUT_EVERY = 7
"""Of the pairs of paraphrase and product, every seventh is held out."""


@dataclass(frozen=True)
class Paraphrase:
    """One wording of a complaint, with the answer's fields that it decides."""

    index: int
    text: str
    category: str
    summary: str


class Deck(Generic[Item]):
    """Draws items evenly: each comes once before any comes again, as far as the caller's condition permits."""

    def __init__(self, items: list[Item], chance: random.Random) -> None:
        self.items = items
        self.chance = chance
        self.left: list[Item] = []

    def draw(self, fits: Callable[[Item], bool] = lambda item: True) -> Item:
        """The next item for which `fits` holds."""
        for _ in range(2):
            for place, item in enumerate(self.left):
                if fits(item):
                    return self.left.pop(place)
            fresh = self.items[:]
            self.chance.shuffle(fresh)
            self.left += fresh
        raise ValueError("the grammar has no item that fits")


class TicketWriter:
    """Writes the rows of one part ("train" or "heldout") of a data set; `seen` holds the texts written so far."""

    def __init__(self, grammar: dict[str, Any], part: str, chance: random.Random, seen: set[str]) -> None:
        self.grammar = grammar
        self.seen = seen
        self.heldout = part == "heldout"
        self.chance = chance
        self.products = list(grammar["products"])
        self.product_deck = Deck(self.products, chance)
        self.paraphrase_decks = [Deck(found, chance) for found in complaints(grammar)]
        self.cue_decks = {name: Deck(cues, chance) for name, cues in grammar["priorities"].items()}

    def block(self) -> Iterator[Row]:
        """One row for every complaint, the priorities evenly among them."""
        names = list(self.grammar["priorities"])
        priorities = [names[place % len(names)] for place in range(len(self.paraphrase_decks))]
        order = self.paraphrase_decks[:]
        self.chance.shuffle(order)
        self.chance.shuffle(priorities)
        for deck, priority in zip(order, priorities, strict=True):
            yield self.row(deck.draw(), priority)

    def row(self, paraphrase: Paraphrase, priority: str) -> Row:
        """A chat of three messages: instruction, a ticket not written before, answer."""
        product = self.product_deck.draw(lambda name: self.allowed(paraphrase, name))
        answer = {
            "category": paraphrase.category,
            "priority": priority,
            "product": product,
            "summary": paraphrase.summary,
        }
        text = self.ticket(paraphrase, priority, product)
        # Short tickets can meet by chance: what surrounds the complaint is drawn again.
        while folded(text) in self.seen:
            text = self.ticket(paraphrase, priority, product)
        self.seen.add(folded(text))
        return {
            "messages": [
                {"role": "system", "content": self.grammar["system"]},
                {"role": "user", "content": text},
                {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False, separators=(",", ":"))},
            ]
        }

    def allowed(self, paraphrase: Paraphrase, product: str) -> bool:
        """Whether this pair belongs to the part that is being written."""
        pair = paraphrase.index + self.products.index(product)
        return (pair % HELDOUT_EVERY == 0) == self.heldout

    def ticket(self, paraphrase: Paraphrase, priority: str, product: str) -> str:
        """The user's text: complaint, cue and distractors in any order, a greeting before and a closing after them."""
        parts = [paraphrase.text]
        parts += self.chance.sample(self.grammar["distractors"], self.chance.choices((0, 1, 2), (60, 35, 5))[0])
        if self.chance.random() < 0.25:
            place = self.chance.randrange(len(parts))
            parts[place] = misspelt(parts[place], self.grammar["misspellings"], self.chance)
        if self.grammar["priorities"][priority]:
            parts.append(self.cue_decks[priority].draw())
        self.chance.shuffle(parts)
        if self.chance.random() < 0.45:
            parts.insert(0, self.chance.choice(self.grammar["greetings"]))
        if self.chance.random() < 0.35:
            parts.append(self.chance.choice(self.grammar["closings"]))
        text = self.filled(self.grammar["space"].join(parts), product)
        return text.lower() if self.chance.random() < 0.08 else text

    def filled(self, template: str, product: str) -> str:
        """`template` with its slots filled."""
        other = self.chance.choice([name for name in self.products if name != product])
        return template.format(
            product=self.chance.choice(self.grammar["products"][product]),
            other=self.grammar["products"][other][0],
            number=self.chance.randrange(1000, 10000),
            date=self.chance.choice(self.grammar["dates"]),
            year=self.chance.randrange(2015, 2026),
        )


def complaints(grammar: dict[str, Any]) -> list[list[Paraphrase]]:
    """The paraphrases of each complaint, numbered through the whole grammar."""
    found: list[list[Paraphrase]] = []
    index = 0
    for category, summaries in grammar["complaints"].items():
        for summary, texts in summaries.items():
            found.append([Paraphrase(index + place, text, category, summary) for place, text in enumerate(texts)])
            index += len(texts)
    return found


def misspelt(template: str, known: dict[str, str], chance: random.Random) -> str:
    """`template` with one slip of the pen: a misspelling that people make, or a letter lost, doubled or swapped.

    Slots stay as they are, so products, numbers and dates remain readable.
    """
    usual = [word for word in known if re.search(_whole(word), template)]
    words = list(re.finditer(r"(?<![{\w])[a-z]{5,}(?![}\w])", template))
    if usual and (not words or chance.random() < 0.6):
        word = chance.choice(usual)
        return re.sub(_whole(word), known[word], template, count=1)
    if not words:
        return template
    found = chance.choice(words)
    word, at = found.group(), chance.randrange(1, len(found.group()) - 1)
    slips = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
    slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return template[: found.start()] + chance.choice([slip for slip in slips if slip != word]) + template[found.end() :]


def _whole(word: str) -> str:
    """A pattern for `word`, not inside a longer Latin word and not a slot."""
    return rf"(?<![A-Za-z{{]){re.escape(word)}(?![A-Za-z}}])"


def folded(text: str) -> str:
    """`text` without case, spaces and punctuation: two tickets that fold alike are the same ticket."""
    return re.sub(r"[\W_]+", "", text.casefold())


def data_set(folder: Path, blocks: dict[str, int]) -> dict[str, str]:
    """File name to content; no ticket text occurs twice, in whichever file.

    Args:
        folder: holds grammar.json; its name is the seed.
        blocks: how many blocks each part ("train", "heldout") gets.
    """
    grammar = json.loads((folder / "grammar.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    content = {}
    for part, count in blocks.items():
        writer = TicketWriter(grammar, part, random.Random(f"{folder.name} {part}"), seen)
        rows = [row for _ in range(count) for row in writer.block()]
        content[f"{part}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return content
