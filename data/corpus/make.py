"""Write the manual that the corpus consists of, or verify it: `python data/corpus/make.py [--check]`.

Each document is one chapter (topics.json) about one product (manual.json): every paragraph of the chapter is taken in
one of its wordings, and its slots are filled with what is true of that product. Only the standard library is used.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from maker import main  # noqa: E402 - what the data sets share lies beside them, in no package


def sentence(text: str) -> str:
    """`text` as a sentence of its own: a capital first, a full stop last."""
    return text[0].upper() + text[1:] + "."


def document(name: str, facts: dict[str, str], topic: str, paragraphs: list[list[str]], chance: random.Random) -> str:
    """One chapter about one product: a title line, then a paragraph a line, with blank lines between."""
    slots = {
        **facts,
        "name": name,
        "dirt_sentence": sentence(f"what covers it is often {facts['dirt']}"),
        "tool_sentence": sentence(f"to remove it, take {facts['tool']}"),
    }
    chosen = [opened(chance.choice(wordings).format(**slots)) for wordings in paragraphs]
    return "\n\n".join([f"{name[0].upper()}{name[1:]}: {topic}", *chosen])


def opened(paragraph: str) -> str:
    """`paragraph` with a capital at its beginning, whatever slot it begins with."""
    return paragraph[0].upper() + paragraph[1:]


def corpus(folder: Path) -> str:
    """All documents as jsonl, shuffled: a row has `text`, and where it comes from in `product` and `topic`."""
    manual = json.loads((folder / "manual.json").read_text(encoding="utf-8"))
    topics = json.loads((folder / "topics.json").read_text(encoding="utf-8"))
    chance = random.Random("corpus")
    rows = [
        {"text": document(name, facts, topic, paragraphs, chance), "product": name, "topic": topic}
        for name, facts in manual["products"].items()
        for topic, paragraphs in topics.items()
    ]
    chance.shuffle(rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main(FOLDER, {"train.jsonl": corpus(FOLDER)}))
