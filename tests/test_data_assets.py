"""The data sets in data/: what their makers write, what their cards say, and that held-out rows are held out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

DATA = Path(__file__).resolve().parent.parent / "data"
TICKETS = ("tickets", "tickets-zh")
SIZES = {"tickets": (3008, 320), "tickets-zh": (1536, 192)}
KEYS = ["category", "priority", "product", "summary"]
COMPLAINTS = 64


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def grammar(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "grammar.json").read_text(encoding="utf-8"))


def tickets(name: str, part: str) -> list[tuple[str, dict[str, str]]]:
    """Ticket text and answer of every row."""
    found = [row["messages"] for row in rows(DATA / name / f"{part}.jsonl")]
    return [(messages[1]["content"], json.loads(messages[2]["content"])) for messages in found]


def bare(text: str) -> str:
    """The text without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", text.casefold())


@pytest.mark.parametrize("name", [*TICKETS, "corpus"])
def test_committed_files_equal_what_the_maker_writes(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(DATA / name / "make.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as generated") == (1 if name == "corpus" else 2)


def test_check_fails_for_a_changed_file_and_writes_nothing(tmp_path: Path) -> None:
    for part in ("maker.py", "corpus/make.py", "corpus/manual.json", "corpus/topics.json", "corpus/train.jsonl"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_bytes((DATA / part).read_bytes())
    changed = (tmp_path / "corpus/train.jsonl").read_text(encoding="utf-8").replace("router", "rooter", 1)
    (tmp_path / "corpus/train.jsonl").write_text(changed, encoding="utf-8")
    command = [sys.executable, "-S", str(tmp_path / "corpus/make.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "differs" in done.stdout
    assert (tmp_path / "corpus/train.jsonl").read_text(encoding="utf-8") == changed


@pytest.mark.parametrize("name", TICKETS)
def test_tickets_have_their_sizes_and_three_messages(name: str) -> None:
    instruction = grammar(name)["system"]
    for part, size in zip(("train", "heldout"), SIZES[name], strict=True):
        found = rows(DATA / name / f"{part}.jsonl")
        assert len(found) == size
        for row in found:
            assert list(row) == ["messages"]
            assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"] == instruction
            assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])


@pytest.mark.parametrize("name", TICKETS)
def test_answers_are_compact_json_of_known_values(name: str) -> None:
    words = grammar(name)
    summaries = {summary: category for category, found in words["complaints"].items() for summary in found}
    assert len(words["complaints"]) >= 4
    assert len(summaries) == COMPLAINTS
    assert len(words["products"]) >= 12
    assert len(words["priorities"]) == 4
    for part, size in zip(("train", "heldout"), SIZES[name], strict=True):
        answers = [row["messages"][2]["content"] for row in rows(DATA / name / f"{part}.jsonl")]
        assert len(answers) == size
        for answer in answers:
            parsed = json.loads(answer)
            assert list(parsed) == KEYS
            assert answer == json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))
            assert parsed["category"] == summaries[parsed["summary"]]
            assert parsed["priority"] in words["priorities"]
            assert parsed["product"] in words["products"]


@pytest.mark.parametrize("name", TICKETS)
def test_train_and_held_out_share_no_ticket_text(name: str) -> None:
    texts = [bare(text) for part in ("train", "heldout") for text, _ in tickets(name, part)]
    assert len(texts) == sum(SIZES[name])
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", TICKETS)
def test_no_wording_meets_the_same_product_in_train_and_held_out(name: str) -> None:
    """Seen through the rows themselves: pairs are found by matching the wording in the text."""
    words = grammar(name)
    wordings = {
        summary: [(text, re.compile(".+?".join(map(bare, text.split("{product}"))))) for text in texts]
        for found in words["complaints"].values()
        for summary, texts in found.items()
    }
    pairs: dict[str, set[tuple[str, str]]] = {}
    for part in ("train", "heldout"):
        pairs[part] = set()
        for text, answer in tickets(name, part):
            for wording, pattern in wordings[answer["summary"]]:
                if pattern.search(bare(text)):
                    pairs[part].add((wording, answer["product"]))
    # Misspelt complaints match no wording; all others must, or the test would prove nothing.
    assert len(pairs["train"]) > SIZES[name][0] * 0.4
    assert len(pairs["heldout"]) > SIZES[name][1] * 0.5
    assert not pairs["train"] & pairs["heldout"]


@pytest.mark.parametrize("name", TICKETS)
def test_product_and_priority_can_be_read_from_the_text(name: str) -> None:
    words = grammar(name)
    short = {product: names[-1].casefold() for product, names in words["products"].items()}
    (default,) = (priority for priority, found in words["priorities"].items() if not found)
    for part, size in zip(("train", "heldout"), SIZES[name], strict=True):
        found = tickets(name, part)
        assert len(found) == size
        for text, answer in found:
            assert short[answer["product"]] in text.casefold(), text
            cues = {p for p, known in words["priorities"].items() for cue in known if bare(cue) in bare(text)}
            assert cues == {answer["priority"]} - {default}, text


def test_summaries_are_short_phrases() -> None:
    english = [summary for found in grammar("tickets")["complaints"].values() for summary in found]
    chinese = [summary for found in grammar("tickets-zh")["complaints"].values() for summary in found]
    assert len(english) == len(chinese) == COMPLAINTS
    assert all(3 <= len(summary.split()) <= 6 for summary in english)
    assert all(4 <= len(summary) <= 9 for summary in chinese)


@pytest.mark.parametrize("name", TICKETS)
def test_any_prefix_of_whole_blocks_is_balanced(name: str) -> None:
    for part in ("train", "heldout"):
        answers = [answer for _, answer in tickets(name, part)]
        for start in range(0, len(answers), COMPLAINTS):
            block = answers[start : start + COMPLAINTS]
            assert len({answer["summary"] for answer in block}) == COMPLAINTS
            assert set(Counter(answer["priority"] for answer in block).values()) == {COMPLAINTS // 4}
        products = Counter(answer["product"] for answer in answers)
        assert len(products) >= 12
        assert max(products.values()) - min(products.values()) <= 0.5 * len(answers) / len(products)


def test_corpus_documents_are_whole_and_all_different() -> None:
    found = rows(DATA / "corpus" / "train.jsonl")
    assert len(found) == 308
    assert len({row["text"] for row in found}) == len(found)
    assert len({(row["product"], row["topic"]) for row in found}) == len(found)
    for row in found:
        assert 100 <= len(row["text"].split()) <= 400
        assert not re.search(r"[{}]|  |\.\.| ,", row["text"]), row["text"]
        assert row["text"].count("\n\n") >= 5
        assert all(re.match(r"[A-Z0-9]", paragraph) for paragraph in row["text"].split("\n\n"))


def test_corpus_speaks_of_the_products_of_the_tickets() -> None:
    sold = {product.casefold() for product in grammar("tickets")["products"]}
    described = {
        row["product"].casefold().replace("network drive", "drive") for row in rows(DATA / "corpus/train.jsonl")
    }
    assert len(sold) >= 12
    assert sold == described


@pytest.mark.parametrize("name", [*TICKETS, "corpus"])
def test_every_data_set_has_a_card_that_agrees_with_it(name: str) -> None:
    card = (DATA / name / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0"
    assert facts["language"] == ["zh" if name == "tickets-zh" else "en"]
    assert facts["task_categories"] == ["text-generation"]
    files = facts["configs"][0]["data_files"]
    assert len(files) >= 1
    for split in files:
        count = len(rows(DATA / name / split["path"]))
        assert f"{count:,}" in body, f"the card does not say that {split['path']} has {count:,} rows"
