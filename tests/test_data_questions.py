"""Held-out rows become the prompts a server would send."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import finetune.data.questions as module
from finetune.data.encode import encode_plain
from finetune.data.questions import Question, questions
from finetune.data.tokenizer import Vocabulary
from finetune.errors import DataError
from finetune.formats.example import PromptCompletion
from finetune.recipe.sections import Source

TOKENIZERS = Path(__file__).parent / "tokenizers"


@pytest.fixture(scope="module", params=["chatml", "llama3", "thinking"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZERS / request.param)


@pytest.fixture
def source(tmp_path: Path) -> Any:
    def write(*rows: dict[str, Any], name: str = "held.jsonl") -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path))

    return write


def ask(tokenizer: PreTrainedTokenizerBase, *sources: Source, limit: int | None = None) -> list[Question]:
    return questions(sources, tokenizer, None, frozenset({tokenizer.eos_token_id}), limit)


def chat(*turns: str, role: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if role == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def test_a_chat_asks_for_its_last_assistant_turn(tokenizer: PreTrainedTokenizerBase, source: Any) -> None:
    held = source(chat("one", "1"), chat("one", "1", "two", "2"), chat("a", "b", "trailing"))
    found = ask(tokenizer, held)
    assert [(q.shown, q.reference) for q in found] == [("one", "1"), ("two", "2"), ("a", "b")]
    assert [q.place for q in found] == [f"{held.path}:{line}" for line in (1, 2, 3)]
    expected = tokenizer.apply_chat_template(
        chat("one", "1", "two")["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert list(found[1].prompt) == expected


def test_a_prompt_is_encoded_as_it_is_trained(tokenizer: PreTrainedTokenizerBase, source: Any) -> None:
    row = {"prompt": "Say it: ", "completion": "yes"}
    (found,) = ask(tokenizer, source(row))
    vocabulary = Vocabulary.of(tokenizer)
    (trained,) = encode_plain([PromptCompletion(row["prompt"], row["completion"])], vocabulary, vocabulary.encoder)
    assert isinstance(trained, list)
    start = trained[0].trained[0][0]
    assert list(found.prompt) == list(trained[0].ids[:start])
    assert tokenizer.eos_token_id not in found.prompt
    assert (found.shown, found.reference) == ("Say it: ", "yes")


def test_a_limit_takes_the_first_rows_over_all_sources(tokenizer: PreTrainedTokenizerBase, source: Any) -> None:
    one = source(chat("a", "1"), chat("b", "2"), name="one.jsonl")
    two = source(chat("c", "3"), chat("d", "4"), name="two.jsonl")
    assert [q.shown for q in ask(tokenizer, one, two)] == ["a", "b", "c", "d"]
    assert [q.shown for q in ask(tokenizer, one, two, limit=3)] == ["a", "b", "c"]
    assert [q.shown for q in ask(tokenizer, one, two, limit=1)] == ["a"]


def test_all_rows_that_cannot_be_asked_are_named(tokenizer: PreTrainedTokenizerBase, source: Any) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    held = source(
        chat("a", "1"),
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": call}]},
        chat("I begin", "you follow", role="assistant"),
        {"messages": "nonsense"},
    )
    with pytest.raises(DataError) as caught:
        ask(tokenizer, held)
    said = str(caught.value)
    assert all(f"{held.path}:{line}" in said for line in (2, 3, 4))
    assert f"{held.path}:1:" not in said


def test_plain_text_and_no_rows_cannot_be_asked(tokenizer: PreTrainedTokenizerBase, source: Any) -> None:
    with pytest.raises(DataError, match="plain text"):
        ask(tokenizer, source({"text": "just text"}))
    with pytest.raises(DataError):
        ask(tokenizer, source())


def test_reasoning_is_taken_off() -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0
