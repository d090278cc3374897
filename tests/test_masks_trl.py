"""Our masks beside TRL's, byte by byte, under every training template that TRL ships: each difference has its rule.

TRL marks what the assistant wrote in the finished chat. Ours is what a server lets the model write, so what a server
writes itself is not trained, nor what it never reads. Both are laid over the same finished chat here, which is
`history: as_rendered`. Bytes are compared, not tokens, since ours are cut where a server's prompt ends, and TRL's are
not: under Qwen 3.6 TRL trains a token of two newlines that no server sends.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import groupby, zip_longest
from random import Random

import pytest
from dialects import DIALECTS, TRL, stop_ids, tokenizer
from random_chats import Kinds, chat

from finetune.data.engine import Engine, Settings
from finetune.data.examples import Located
from finetune.data.rows import Block
from finetune.data.tokenizer import Vocabulary
from finetune.formats.example import Conversation
from finetune.recipe.sections import DataOptions, Source

BEHIND = "a blank behind the stop token"
SERVED = "what the server writes to ask for the turn"
CLOSED = "a closed thought in place of the one that the server opens"
UNASKED = "reasoning, where the server asks for none"

CHATML = frozenset({BEHIND})
EXPECTED = {
    **dict.fromkeys(("qwen3", "qwen3_instruct_2507", "qwen2_5_vl", "qwen3_vl", "gemma", "gemma3",
        "diffusion_gemma", "lfm2", "lfm2_v2", "phi3", "phi3_5"), CHATML),
    **dict.fromkeys(("qwen2_5", "qwen3_5_think", "qwen3_6", "qwen3_8"), frozenset({BEHIND, SERVED})),
    "qwen3_5_nothink": frozenset({BEHIND, SERVED, UNASKED}),
    **dict.fromkeys(("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
        frozenset({BEHIND, SERVED, CLOSED})),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3", "gptoss", "muse_glimmer"), frozenset({SERVED})),
    **dict.fromkeys(("llama3", "cohere", "cohere2", "glm4moe"), frozenset()),
}  # fmt: skip
# They take contents as lists of parts alone (tests/test_masks_properties.py).
PARTS_ONLY = {"idefics3", "smolvlm", "llava_next"}


def test_every_training_template_is_compared() -> None:
    files = {path.stem.removesuffix("_training") for path in TRL.glob("*_training.jinja")}
    assert files == EXPECTED.keys() | PARTS_ONLY
    assert len(EXPECTED) == 28


@cache
def engine(name: str) -> Engine:
    options = DataOptions(train=(Source(path="x.jsonl"),), max_length=10**6, history="as_rendered")
    return Engine(Settings(Vocabulary.of(tokenizer(name, training=True)), stop_ids(name), options))


def byte_mask(name: str, ids: list[int], mask: list[int]) -> tuple[bytes, list[int]]:
    """The text of ids in bytes, and the mask of each byte."""
    judge = tokenizer(name, training=True)
    added = judge.added_tokens_decoder
    sizes = [len(added[i].content.encode() if i in added else judge.convert_ids_to_tokens(i)) for i in ids]
    text = judge.decode(ids).encode()
    assert sum(sizes) == len(text)
    return text, [bit for bit, size in zip(mask, sizes, strict=True) for _ in range(size)]


def rows(block: Block) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each row's ids and trained ranges."""
    found, at, start = [], 0, 0
    for length, count in zip(block.lengths.tolist(), block.ranges.tolist(), strict=True):
        ranges = [tuple(ends) for ends in block.trained[2 * at : 2 * (at + count)].reshape(-1, 2).tolist()]
        found.append((block.ids[start : start + length].tolist(), ranges))
        at, start = at + count, start + length
    return found


def rule(name: str, text: bytes, start: int, end: int, asked: list[str]) -> str:
    """Why TRL trains these bytes and we do not."""
    run, before = text[start:end].decode(), text[:start].decode()
    if not run.strip() and before.endswith(DIALECTS[name].stops):
        return BEHIND
    if any(run in part for part in asked):
        return SERVED
    if re.fullmatch(r"<think></think>\n?", run):
        return CLOSED
    assert name == "qwen3_5_nothink", run
    assert re.fullmatch(r"<think>\n.+\n</think>\n\n", run, re.DOTALL)
    return UNASKED


def compared(name: str, talk: Conversation, seen: Counter[str]) -> bool:
    """Lay both masks over one chat; False where one of us refuses it."""
    judge, messages = tokenizer(name, training=True), list(talk.messages)
    tools = list(talk.tools) if talk.tools else None
    chunk = engine(name).chunk([Located(talk, 0, "x.jsonl:1")])
    if chunk.block is None:
        return False
    theirs = judge.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    text, ours = b"", list[int]()
    for ids, ranges in rows(chunk.block):  # several, where a token would reach over the end of a server's prompt
        mask = [int(any(start <= at < end for start, end in ranges)) for at in range(len(ids))]
        own, bits = byte_mask(name, ids, mask)
        assert own.startswith(text)
        text, ours = own, [old | new for old, new in zip_longest(ours, bits, fillvalue=0)]
    whole, wanted = byte_mask(name, theirs["input_ids"], theirs["assistant_masks"])
    assert whole.startswith(text)
    left = whole[len(text) :].decode()
    assert not left.strip() or left.strip() in DIALECTS[name].stops, "we end a row at the first stop token"
    asked = []
    for turn, message in enumerate(messages):
        if turn and message["role"] == "assistant":
            finished, prompt = (
                judge.apply_chat_template(messages[:turn], tools=tools, add_generation_prompt=asks, tokenize=False)
                for asks in (False, True)
            )
            asked.append(prompt.removeprefix(finished))
    at = 0
    for pair, run in groupby(zip(ours, wanted, strict=False)):
        size = len(list(run))
        if pair == (0, 1):
            seen[rule(name, text, at, at + size, asked)] += 1
        else:
            assert pair[0] == pair[1], f"we alone train {text[at : at + size]!r}"
            seen["both train" if pair[0] else "neither trains"] += size
        at += size
    return True


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_differences_from_trl_follow_named_rules(name: str) -> None:
    seen: Counter[str] = Counter()
    chats = 0
    for seed in range(24):
        kinds = Kinds(
            alternating=True, tame=True, tags=False, tools=False, system=name != "gemma", reasoning=name != "gemma"
        )
        chats += compared(name, chat(Random(seed), kinds), seen)
    assert chats >= (8 if name == "gptoss" else 24), "gpt-oss ends its last turn alone with a stop token"
    assert seen["both train"] > 500
    assert seen["neither trains"] > 500
    assert seen.keys() - {"both train", "neither trains"} == EXPECTED[name]


def test_calls_and_their_results_are_trained_alike() -> None:
    for name in ("qwen2_5", "qwen3", "lfm2_v2", "glm4moe", "nemotron_3_nano"):
        seen: Counter[str] = Counter()
        called = 0
        for seed in range(40):
            talk = chat(Random(seed), Kinds(alternating=True, tame=True, tags=False))
            if talk.tools and any("tool_calls" in message for message in talk.messages):
                called += compared(name, talk, seen)
        assert called >= 5
        assert seen["both train"] > 300
        assert seen.keys() - {"both train", "neither trains"} <= EXPECTED[name]


def test_gpt_oss_turn_without_its_stop_token_is_refused_as_rendered() -> None:
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user", "assistant")]
    chunk = engine("gptoss").chunk([Located(Conversation(tuple(turns)), 0, "x.jsonl:1")])
    assert chunk.block is None
    assert "x.jsonl:1: messages[1]: found a turn that ends with no stop token once others" in str(chunk.faults[0])
    assert chunk.faults[0].fix == "set data.history to expand, or leave the row out"
