"""fastokens gives the ids of the Hugging Face tokenizer on every text, or its work is done again without it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import vocabularies
from dialects import stop_ids, vocabulary
from random_chats import Kinds, chat
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from finetune.data import tokenizer as tokenizers
from finetune.data.engine import Engine, Settings
from finetune.data.examples import Located
from finetune.data.pretokenizer import quick
from finetune.data.tokenizer import CHECKED_AT_START, CHECKED_EVERY, Encoder, FastDiffers, Vocabulary
from finetune.recipe.sections import DataOptions, Source

SMOLLM2 = Path(__file__).parent.parent / "data" / "smollm2-135m-instruct"
# SmolLM2's comes with the quickstart's base, which only the slow tests may expect to be there.
REAL = (pytest.param("smollm2", marks=pytest.mark.slow), "qwen3_6", "deepseek")
SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530), (0x590, 0x700), (0x900, 0xA00),
    (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2190, 0x2300), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4), (0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0xFFEF), (0x1D400, 0x1D500), (0x1F300, 0x1FA00),
    (0x20000, 0x20100), (0xE0100, 0xE0110),
)  # fmt: skip
CODE = (
    "def f(x: int) -> str:\n    return f'{x!r}'  # ok\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i]*2;\n}\n",
    "SELECT * FROM t WHERE a >= 3.14e-10 AND b LIKE '%x%';", '{"a": [1, 2.50, null], "b": "\\u00e9\\n"}', "\tif\r\n",
    "\\frac{1}{2} \\alpha^{2}_i", "https://example.org/a?b=c&d=%20#e", "<div class='x'>&nbsp;</div>", "0xDEADBEEF",
    "$ sudo rm -rf /tmp/*.log | grep -v '^#' >> out.txt", "x" * 40, "=" * 80, "1234567890" * 3, "1,000,000.00",
)  # fmt: skip
WORDS = (
    "the", "Tokyo", "don't", "WE'LL", "naïve", "中文分词", "日本語の文章", "한국어", "नमस्ते", "مرحبا",
    "👩\u200d👩\u200d👧", "🇳🇴", "e\u0301", "\ufb01", "\u2167",
)  # fmt: skip
BLANKS = (" ", "  ", "\n", "\n\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u2003", "\u200b", "\ufeff", "\x85", "")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Vocabulary]:
    """Vocabularies of models that people use."""
    known: dict[str, Vocabulary] = {}

    def load(name: str) -> Vocabulary:
        if name not in known:
            folder = SMOLLM2
            if name == "deepseek":
                folder = vocabularies.deepseek(tmp_path_factory.mktemp(name))
            elif name != "smollm2":
                folder = vocabularies.qwen(tmp_path_factory.mktemp(name), name)
            known[name] = Vocabulary.of(AutoTokenizer.from_pretrained(folder))
        return known[name]

    return load


def texts(count: int, seed: int, tokens: Sequence[str]) -> Iterator[str]:
    """Texts of many scripts, code, odd blanks, and what looks like special tokens, whole and broken."""
    draw = Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 9)):
            kind = draw.randrange(8)
            if kind == 0:
                first, last = draw.choice(SCRIPTS)
                parts.append("".join(chr(draw.randrange(first, last)) for _ in range(draw.randrange(1, 12))))
            elif kind == 1:
                parts.append(draw.choice(CODE))
            elif kind == 2:
                token = draw.choice(tokens)
                cut = draw.randrange(len(token) + 1)
                parts.append(draw.choice((token, token[:cut], token[cut:], token * 2, token.upper())))
            elif kind == 3:
                parts.append(draw.choice(BLANKS) * draw.randrange(1, 6))
            else:
                parts.append(draw.choice(WORDS))
            parts.append(draw.choice((" ", "", *BLANKS)))
        yield "".join(parts)


def compared(made: Vocabulary, count: int, seed: int) -> int:
    """Compare the two encoders on so many texts; how many ids that were."""
    fast = Encoder(made)
    fast.expect(10**9)
    assert fast.uses_fast
    slow = Encoder(made.without_fast())
    chosen = list(texts(count, seed, [token.text for token in made.added]))
    seen = 0
    for first in range(0, count, 1000):
        some = chosen[first : first + 1000]
        found, wanted = fast.encode(some), slow.encode(some)
        assert not slow.uses_fast
        if not (np.array_equal(found.ids, wanted.ids) and np.array_equal(found.offsets, wanted.offsets)):
            bad = next(text for number, text in enumerate(some) if found[number].tolist() != wanted[number].tolist())
            raise AssertionError(f"other ids for {bad!r}")
        seen += len(wanted.ids)
    return seen


@pytest.mark.parametrize("name", REAL)
def test_fast_ids_are_the_reference_ids(real: Callable[[str], Vocabulary], name: str) -> None:
    assert compared(real(name), 2_000, 0) > 20_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*REAL, "qwen"])
def test_fast_ids_are_the_reference_ids_on_a_hundred_thousand_texts(
    real: Callable[[str], Vocabulary], name: str
) -> None:
    assert compared(real(name), 100_000, 1) > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*REAL, "qwen"])
def test_fast_ids_are_the_reference_ids_on_every_character(real: Callable[[str], Vocabulary], name: str) -> None:
    fast, slow = Encoder(real(name)), Encoder(real(name).without_fast())
    fast.expect(10**9)
    assert fast.uses_fast
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for first in range(0, len(points), 4096):
        some = [f"a{chr(p)} {chr(p)}1  {chr(p)}{chr(p)}'s{chr(p)}" for p in points[first : first + 4096]]
        found, wanted = fast.encode(some), slow.encode(some)
        if not np.array_equal(found.ids, wanted.ids):
            bad = [text for number, text in enumerate(some) if found[number].tolist() != wanted[number].tolist()]
            raise AssertionError(f"other ids for {bad!r}")


BLANK_AND_DIGIT = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "1",
    "23",
    "\u2167",
    "\xbd",
    "a",
    "\xe9",
    "'s",
    "'S",
    "'ll",
    "!",
    "\u4e2d",
)


@pytest.mark.parametrize("single", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in (True, False))])
def test_rewritten_pre_tokenizer_splits_the_same(real: Callable[[str], Vocabulary], single: bool | None) -> None:
    facts = json.loads(real("qwen3_6").backend or "")
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = [] if single is None else [{"type": "Digits", "individual_digits": single}]
    facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*digits, bytes_]} if digits else bytes_
    backend = json.dumps(facts)
    assert quick(backend) != backend
    slow, rewritten = Tokenizer.from_str(backend), Tokenizer.from_str(quick(backend))
    draw = Random(3)
    for _ in range(3_000):
        text = "".join(draw.choices(BLANK_AND_DIGIT, k=draw.randrange(1, 14)))
        assert slow.encode(text).ids == rewritten.encode(text).ids, text


def test_other_pre_tokenizers_stay_as_they_are(real: Callable[[str], Vocabulary]) -> None:
    for name in ("qwen3_6", "deepseek"):
        backend = real(name).backend or ""
        assert quick(backend) == backend


def test_text_that_fastokens_refuses_gets_the_reference_ids(real: Callable[[str], Vocabulary]) -> None:
    """Bytes that a vocabulary lacks are left out by the reference; fastokens raises at them."""
    facts = json.loads(real("qwen3_6").backend or "")
    lacking = next(token for token in facts["model"]["vocab"] if token == "\u0104")  # how ByteLevel writes byte 4
    number = facts["model"]["vocab"].pop(lacking)
    facts["model"]["vocab"]["nothing like it"] = number
    facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if lacking not in str(pair)]
    made = dataclasses.replace(real("qwen3_6"), backend=json.dumps(facts))
    encoder = Encoder(made)
    encoder.expect(10**9)
    assert encoder.uses_fast
    assert encoder.encode(["a\x04b", "c"])[0].tolist() == Encoder(made.without_fast()).encode(["a\x04b"])[0].tolist()


@pytest.mark.parametrize("name", REAL)
def test_reference_ids_are_those_of_transformers(real: Callable[[str], Vocabulary], name: str) -> None:
    made = real(name)
    judge = AutoTokenizer.from_pretrained(made.name)
    encoder = Encoder(made.without_fast())
    for text in texts(300, 2, [token.text for token in made.added]):
        wanted = judge(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode([text])[0].tolist() == encoder.ids(text) == wanted
        assert encoder.ordinary(text) == judge.encode(text, add_special_tokens=False, split_special_tokens=True) or any(
            not token.special and token.text in text for token in made.added
        ), "transformers splits special tokens alone"


@pytest.mark.parametrize("name", REAL)
def test_ordinary_ids_hold_no_added_token_and_say_the_same(real: Callable[[str], Vocabulary], name: str) -> None:
    made = real(name)
    encoder, added = Encoder(made.without_fast()), {token.id for token in made.added}
    for token in made.added:
        ids = encoder.ordinary(token.text)
        assert not added.intersection(ids)
        assert encoder.decode(ids) == token.text
    assert len(added) >= 3


class Swapped:
    """A fast encoder that gives two ids in each other's place, from some text on."""

    def __init__(self, inner: Any, one: int, other: int, after: int = 0) -> None:
        self._inner, self._swap, self._left = inner, {one: other, other: one}, after

    def encode_batch(self, batch: list[str]) -> list[Any]:
        return list(self._inner.encode_batch(batch))

    def encode_batch_flat(self, batch: list[str]) -> tuple[Any, Any]:
        ids, offsets = self._inner.encode_batch_flat(batch)
        self._left -= len(batch)
        if self._left >= 0:
            return ids, offsets
        return np.array([self._swap.get(number, number) for number in np.frombuffer(ids, np.int32)], np.int32), offsets


def swapped(monkeypatch: pytest.MonkeyPatch, one: int, other: int, after: int = 0) -> None:
    inner = tokenizers._fastokens
    monkeypatch.setattr(tokenizers, "_fastokens", lambda backend: Swapped(inner(backend), one, other, after))
    monkeypatch.setattr(tokenizers, "FAST_FROM", 0)


def test_wrong_fast_encoder_is_found_on_the_runs_own_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = vocabulary("qwen3")
    encoder = Encoder(made)
    one, other = encoder.ids("a")[0], encoder.ids("b")[0]
    swapped(monkeypatch, one, other)
    wrong = Encoder(made)
    with pytest.raises(FastDiffers):
        wrong.encode(["xyz", "a b"])
    assert wrong.uses_fast
    assert Encoder(made.without_fast()).encode(["a b"])[0].tolist() == encoder.ids("a b")


def test_fast_encoder_that_goes_wrong_later_is_found_by_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    made = vocabulary("qwen3")
    one, other = Encoder(made).ids("a")[0], Encoder(made).ids("b")[0]
    swapped(monkeypatch, one, other, after=CHECKED_AT_START)
    wrong = Encoder(made)
    wrong.encode(["a b"] * CHECKED_AT_START)
    batches = CHECKED_EVERY // 32 + 2
    with pytest.raises(FastDiffers):
        [wrong.encode(["a b"] * 32) for _ in range(batches)]


def test_checks_fall_on_the_first_texts_and_then_on_one_in_so_many() -> None:
    encoder = Encoder(vocabulary("qwen3"))
    checked, at = [], 0
    for size in (1, 10, 100, 5000, 3, 7000):
        checked += [at + index for index in encoder._sampled(size)]
        at += size
    assert checked[:CHECKED_AT_START] == list(range(CHECKED_AT_START))
    later = [index for index in checked if index >= 111]
    assert later == [index for index in range(111, at) if index % CHECKED_EVERY == 0]
    assert len(later) == 5


def test_fast_encoder_that_fails_the_hard_texts_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def encode_batch(self, batch: list[str]) -> list[Any]:
            raise RuntimeError("panicked")

    monkeypatch.setattr(tokenizers, "_fastokens", lambda backend: Wrong())
    encoder = Encoder(vocabulary("qwen3"))
    encoder.expect(10**9)
    assert not encoder.uses_fast
    assert encoder.encode(["a b"])[0].tolist() == encoder.ids("a b")


def test_few_characters_do_not_load_the_fast_encoder() -> None:
    encoder = Encoder(vocabulary("qwen3"))
    encoder.encode(["a" * 1000])
    assert not encoder.uses_fast


def test_engine_raises_when_the_encoders_differ_and_does_the_work_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.replace(vocabulary("qwen3"))  # a copy without the encoder that others share
    swapped(monkeypatch, made.encoder.ids("a")[0], made.encoder.ids("b")[0])
    options = DataOptions(train=(Source(path="x.jsonl"),), max_length=10**5)
    rows = [Located(chat(Random(seed), Kinds()), seed, f"x.jsonl:{seed + 1}") for seed in range(40)]
    with pytest.raises(FastDiffers):
        Engine(Settings(made, stop_ids("qwen3"), options)).chunk(rows)
    again = Engine(Settings(made.without_fast(), stop_ids("qwen3"), options)).chunk(rows)
    wanted = Engine(Settings(vocabulary("qwen3").without_fast(), stop_ids("qwen3"), options, quick=False)).chunk(rows)
    assert again.block is not None
    assert wanted.block is not None
    assert np.array_equal(again.block.ids, wanted.block.ids)


@pytest.mark.parametrize("name", ["deepseek", "qwen3"])
def test_vocabulary_travels_to_other_processes_without_its_encoder(
    real: Callable[[str], Vocabulary], name: str
) -> None:
    made = real(name) if name == "deepseek" else vocabulary(name)
    made.encoder.ids("x")
    packed = pickle.dumps(made)
    again = pickle.loads(packed)  # noqa: S301 - our own bytes, as a process pool sends them
    assert again == made
    assert again.hash == made.hash
    assert again.encoder.ids("Hello, world") == made.encoder.ids("Hello, world")
    assert "encoder" not in made.__getstate__()


def test_hash_tells_what_decides_ids() -> None:
    made = vocabulary("qwen3")
    others = [
        dataclasses.replace(made, backend=(made.backend or "") + " "),
        dataclasses.replace(made, named={}),
        dataclasses.replace(made, added=made.added[1:]),
        dataclasses.replace(made, leads=not made.leads),
    ]
    assert len({made.hash, *(other.hash for other in others)}) == 5
    assert dataclasses.replace(made, name="elsewhere").hash == made.hash
    assert made.without_fast().hash == made.hash
