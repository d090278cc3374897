"""Sources become token rows; whatever was changed, cut or left out is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.prepare import Prepared, prepare, shared_rows
from finetune.errors import DataError
from finetune.recipe.sections import DataOptions

TOKENIZERS = Path(__file__).parent / "tokenizers"


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZERS / "chatml")


def row(question: str, *rest: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate((question, *rest))]}


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(value) + "\n" for value in rows))
    return name


def run(tokenizer: PreTrainedTokenizerBase, *sources: Any, seed: int = 42, **options: Any) -> Prepared:
    chosen = DataOptions(train=list(sources), **options)
    return prepare(chosen, chosen.train, tokenizer, frozenset({tokenizer.eos_token_id}), seed)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [row(f"question {n}", f"answer {draw.random()}") for n in range(count)]


def test_rows_carry_ids_labels_and_where_they_came_from(tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = write("a.jsonl", rows(3)), write("b.jsonl", [{"text": "plain text"}])
    prepared = run(tokenizer, a, {"path": b, "name": "corpus"})
    assert prepared.rows["source"][:] == ["a.jsonl"] * 3 + ["corpus"]
    assert prepared.rows["row"][:] == [0, 1, 2, 0]
    assert prepared.rows["turn"][:] == [-1] * 4
    assert len(prepared.rows) == 4
    for value in prepared.rows:
        assert len(value["input_ids"]) == len(value["labels"])
        assert value["labels"][0] == -100
        trained = [token for token in value["labels"] if token != -100]
        assert trained == value["input_ids"][-len(trained) - (value["source"] == "a.jsonl") :][: len(trained)]
        assert trained[-1] == tokenizer.eos_token_id
    report = prepared.report
    assert (report.rows_read, report.rows_kept) == (4, 4)
    assert report.tokens == sum(map(len, prepared.rows["input_ids"]))
    assert report.trained_tokens == sum(token != -100 for labels in prepared.rows["labels"] for token in labels)
    assert 0 < report.trained_share < 1
    assert [source.rows_kept for source in report.sources] == [3, 1]
    assert report.as_dict()["sources"][1]["name"] == "corpus"
    assert len(report.lines()) == 1


def test_fingerprint_tells_order_and_content_but_not_names(tokenizer: PreTrainedTokenizerBase) -> None:
    values = rows(4)
    first = run(tokenizer, write("a.jsonl", values)).fingerprint
    assert run(tokenizer, write("b.jsonl", values)).fingerprint == first
    assert run(tokenizer, write("c.jsonl", values[:2]), write("d.jsonl", values[2:])).fingerprint == first
    assert run(tokenizer, write("b.jsonl", values[::-1])).fingerprint != first
    assert run(tokenizer, "a.jsonl", loss_on="all").fingerprint != first
    assert len(first) == 64


def test_long_rows_are_refused_with_count_longest_and_places(tokenizer: PreTrainedTokenizerBase) -> None:
    long = [row("q", "x" * (100 + n)) for n in range(12)]
    write("a.jsonl", [*rows(2), *long])
    with pytest.raises(DataError) as caught:
        run(tokenizer, "a.jsonl", max_length=60)
    message = str(caught.value).splitlines()
    assert message[0].startswith("12 rows are longer than data.max_length (60 tokens); the longest has ")
    assert "(a.jsonl:14)" in message[0]
    assert len(message) == 12
    assert message[1].startswith("  a.jsonl:3: ")
    assert message[11] == "  … and 2 more"


def test_truncation_keeps_the_start_and_drops_rows_without_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    write("a.jsonl", [row("short", "yes"), row("q", "x" * 200), row("y" * 200, "no")])
    whole, cut = run(tokenizer, "a.jsonl"), run(tokenizer, "a.jsonl", max_length=60, on_long_row="truncate")
    assert cut.rows["row"][:] == [0, 1]
    assert cut.rows[1]["input_ids"] == whole.rows[1]["input_ids"][:60]
    assert cut.rows[1]["labels"] == whole.rows[1]["labels"][:60]
    report = cut.report
    assert (report.total("rows_over_length"), report.total("rows_dropped"), report.total("rows_without_answer")) == (
        2,
        1,
        1,
    )
    assert report.total("tokens_lost") == whole.report.tokens - report.tokens
    assert report.total("longest") == max(map(len, whole.rows["input_ids"]))
    assert any("rows over max_length 60" in line for line in report.lines())


def test_dropping_leaves_long_rows_out_and_counts_their_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    write("a.jsonl", [row("short", "yes"), row("q", "x" * 200)])
    whole, kept = run(tokenizer, "a.jsonl"), run(tokenizer, "a.jsonl", max_length=60, on_long_row="drop")
    assert kept.rows["row"][:] == [0]
    assert kept.report.total("tokens_lost") == len(whole.rows[1]["input_ids"])
    with pytest.raises(DataError, match="no row is left to train on: 2 rows read, 0 kept"):
        run(tokenizer, "a.jsonl", max_length=5, on_long_row="drop")


def test_weight_repeats_rows_and_draws_a_seeded_share(tokenizer: PreTrainedTokenizerBase) -> None:
    write("a.jsonl", rows(10))

    def drawn(weight: float, seed: int = 42) -> list[int]:
        return run(tokenizer, {"path": "a.jsonl", "weight": weight}, seed=seed).rows["row"][:]

    assert drawn(2.0) == [*range(10), *range(10)]
    assert drawn(0.5) == drawn(0.5)
    assert drawn(0.5) != drawn(0.5, seed=7)
    assert len(set(drawn(0.5))) == len(drawn(0.5)) == 5
    assert drawn(1.3)[:10] == list(range(10))
    assert len(drawn(1.3)) == 13
    report = run(tokenizer, "a.jsonl", {"path": "a.jsonl", "name": "rare", "weight": 0.01}).report
    assert report.lines()[1:] == ["rare: none of its rows is kept"]


def test_faults_of_template_and_rows_are_told_together(tokenizer: PreTrainedTokenizerBase) -> None:
    Path("strict.jinja").write_text(
        "{{ raise_exception('too many') if messages|length > 2 else '' }}" + str(tokenizer.chat_template)
    )
    write("a.jsonl", [row("a", "b"), row("a", "b", "c", "d"), row("a"), row("a", "")])
    with pytest.raises(DataError) as caught:
        run(tokenizer, "a.jsonl", chat_template="strict.jinja")
    message = str(caught.value)
    assert message.startswith("3 faults in 3 places of the data:")
    for expected in (
        "a.jsonl:2: messages: found messages that the chat template strict.jinja",
        "a.jsonl:3:",
        "a.jsonl:4:",
    ):
        assert expected in message


def test_broken_file_leaves_no_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"1 fault in 1 place of the data:\n  none\.jsonl: found no file"):
        run(tokenizer, "none.jsonl")


def test_rewritten_history_is_counted_and_names_its_turn() -> None:
    thinking = AutoTokenizer.from_pretrained(TOKENIZERS / "thinking")
    write("a.jsonl", [row("a", "b", "c", "d"), row("a", "b")])
    prepared = run(thinking, "a.jsonl")
    assert prepared.rows["turn"][:] == [1, 3, -1]
    assert prepared.rows["row"][:] == [0, 0, 1]
    assert prepared.report.total("rows_expanded") == 1
    assert prepared.report.lines()[1].startswith("1 chats became 1 more rows")


def test_untrained_ends_of_chats_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    opening = {"messages": [{"role": "assistant", "content": "Welcome"}, *row("a", "b")["messages"]]}
    write("a.jsonl", [opening, row("a", "b", "c"), row("a", "b")])
    report = run(tokenizer, "a.jsonl").report
    assert (report.total("opening_turns"), report.total("trailing_messages")) == (1, 1)
    assert len(report.lines()) == 3


def test_validation_rows_seen_in_training_are_found(tokenizer: PreTrainedTokenizerBase) -> None:
    values = rows(6)
    train, held_out = (
        run(tokenizer, write("a.jsonl", values)),
        run(tokenizer, write("b.jsonl", [row("new", "one"), values[3]])),
    )
    assert shared_rows(train, held_out) == [("b.jsonl", 1)]
    assert shared_rows(train, run(tokenizer, write("c.jsonl", rows(6, seed=1)))) == []
