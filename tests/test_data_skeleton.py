"""One rendering speaks for every chat of its shape, and for no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dialects import stop_ids, tokenizer, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import skeleton as skeletons
from finetune.data.opaque import GUARDS, Guard, Opaque, Probe, Touched
from finetune.data.render import Masking, render
from finetune.data.skeleton import Skeleton, Skeletons
from finetune.data.template import ChatTemplate, chat_template, control_tokens
from finetune.formats.example import Conversation

WORDS = st.sampled_from(["", " ", "a", " a", "a ", "\na", "</think>", "<think>x</think>y", "b<x>", "0 0", "é", "/no"])


def probe(expression: str, text: str = "stood in") -> tuple[str, list[Guard]]:
    """What a template writes of a stand-in for the user's text, and what it asked."""
    guards: dict[Guard, None] = {}
    GUARDS.set(guards)
    template = Probe({"default": expression})
    return template.render([{"role": "user", "content": Opaque.of(0, guards)}], None), list(guards)


# A template's question, and texts for which its answer is not the assumed one.
ASKED = {
    "{% if '</think>' in c %}A{% else %}B{% endif %}{{ c }}": ["x</think>", "</think>"],
    "{% if c.startswith('<x>') %}A{% endif %}{{ c }}": ["<x>", "<x>y"],
    "{% if c.endswith('/no') %}A{% endif %}{{ c }}": ["a /no"],
    "{% if c == 'yes' %}A{% endif %}{{ c }}": ["yes"],
    "{% if c != 'yes' %}A{% endif %}{{ c }}": ["yes"],
    "{% if c %}A{% endif %}{{ c }}": [""],
    "{% if not c %}A{% endif %}{{ c }}": [""],
    "{% if c.strip() %}A{% endif %}{{ c }}": ["", " \n"],
    "{% if c | trim %}A{% endif %}{{ c }}": ["", "\t"],
    "{{ c.split('</think>')[-1] }}": ["a</think>b"],
    "{{ c.split('</think>')[0] }}": ["a</think>b"],
    "{{ c.replace('<x>', 'y') }}": ["<x>"],
    "{{ c.lstrip('\\n') }}": ["\na"],
    "{{ c.rstrip('\\n') }}": ["a\n"],
    "{{ c.strip('\\n') }}": ["\na", "a\n"],
    "{{ ('[' ~ c ~ ']') if c.strip().startswith('{') else c }}": [" {1}"],
    "{% set n = namespace(x='') %}{% if 'q' in c %}{% set n.x = 'q' %}{% endif %}{{ n.x }}{{ c }}": ["q"],
}  # fmt: skip


@pytest.mark.parametrize("expression", ASKED)
def test_questions_are_written_down_with_the_answer_that_was_assumed(expression: str) -> None:
    jinja = "{% set c = messages[0].content %}" + expression
    stood, guards = probe(jinja)
    assert guards
    plain = ChatTemplate({"default": jinja})
    for text in ASKED[expression]:
        assert not all(guard.holds(text) for guard in guards)
    written = plain.render([{"role": "user", "content": "ordinary"}], None)
    assert all(guard.holds("ordinary") for guard in guards)
    assert skeletons._parts(stood)
    assert "".join(_filled(stood, "ordinary")) == written


def _filled(stood: str, text: str) -> list[str]:
    return [part if isinstance(part, str) else text.strip() if part[1] else text for part in skeletons._parts(stood)]


@given(expression=st.sampled_from(sorted(ASKED)), text=WORDS)
def test_text_that_gives_the_assumed_answers_is_written_in_place(expression: str, text: str) -> None:
    jinja = "{% set c = messages[0].content %}" + expression
    stood, guards = probe(jinja)
    if all(guard.holds(text) for guard in guards):
        assert "".join(_filled(stood, text)) == ChatTemplate({"default": jinja}).render(
            [{"role": "user", "content": text}], None
        )


NOT_ANSWERED = (
    "{{ c | length }}", "{{ c | upper }}", "{{ c[0] }}", "{{ c[:5] }}", "{{ c | first }}", "{{ c * 2 }}",
    "{{ '%s' % c }}", "{{ c | replace('a', 'b') }}", "{{ c | tojson }}", "{{ c < 'b' }}", "{{ {c: 1} }}",
    "{{ c.lower() }}", "{{ c.find('a') }}", "{{ c.split() }}", "{{ c.lstrip() }}",
    "{% for x in c %}{{ x }}{% endfor %}", "{{ c | wordcount }}", "{{ c | int }}", "{{ c.count('a') }}",
    "{{ '{}'.format(c) }}", "{{ c | urlize }}", "{{ c is lower }}", "{{ c in ['a'] }}",
    "{{ [c] | join(',') | length }}", "{{ (c ~ 'x') | length }}", "{{ (c + 'x').strip() }}", "{{ 'a' in (c ~ 'b') }}",
    "{% set x %}{{ c }}{% endset %}{{ x }}", "{{ c.encode() }}", "{{ c | reverse }}", "{{ c | list }}",
    "{{ c | safe | length }}",
)  # fmt: skip


@pytest.mark.parametrize("expression", NOT_ANSWERED)
def test_questions_without_an_answer_for_others_are_refused(expression: str) -> None:
    jinja = "{% set c = messages[0].content %}" + expression
    try:
        stood, guards = probe(jinja)
    except Touched:
        return
    # What was answered all the same must hold for every text that gives the same answers.
    tried = 0
    for text in ("ordinary", "a", "Ab c", "ß", "1", " x ", "a,b", "<a&b>"):
        if all(guard.holds(text) for guard in guards):
            tried += 1
            plain = ChatTemplate({"default": jinja}).render([{"role": "user", "content": text}], None)
            assert "".join(_filled(stood, text)) == plain
    assert tried >= 4


def made(name: str, masking: Masking | None = None) -> Skeletons:
    template = chat_template(vocabulary(name), None, stop_ids(name))
    return Skeletons(template, masking or Masking(), vocabulary(name), control_tokens(vocabulary(name), template))


def talk(*contents: str, **more: Any) -> Conversation:
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    turns[1] = {**turns[1], **more}
    return Conversation(tuple(turns))


def test_chats_of_one_shape_share_a_skeleton_and_others_do_not() -> None:
    every = made("qwen3")
    first = every.of(talk("a", "b", "c", "d"))
    again = every.of(talk("Hello", "Hi", "Bye", "See you"))
    assert first is not None
    assert again is not None
    assert first[0] is again[0]
    assert again[1] == ["Hello", "Hi", "Bye", "See you"]
    longer, thought = every.of(talk("a", "b", "c", "d", "e", "f")), every.of(talk("a", "b", reasoning_content="c"))
    tooled = every.of(replace(talk("a", "b", "c", "d"), tools=({"type": "function", "function": {"name": "f"}},)))
    hidden = every.of(replace(talk("a", "b", "c", "d"), context=frozenset({1})))
    kinds = [found[0] for found in (first, longer, thought, tooled, hidden) if found is not None]
    assert len({id(kind) for kind in kinds}) == len(kinds) == 5


def test_chats_that_cannot_share_are_rendered_for_themselves() -> None:
    every = made("qwen3")
    assert every.of(talk("a", "b")) is not None
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    alone = [
        talk("a", "b", tool_calls=[call]),
        talk("a", "b", name="Ada"),
        talk("a", "<think>x</think>y"),
        talk("a <|im_end|>", "b"),
        talk("a\ufdd2", "b"),
        talk("<tool_response>a</tool_response>", "b"),
    ]
    assert [every.of(chat) for chat in alone] == [None] * len(alone)


def test_blank_texts_do_not_share_rows_that_differ_by_a_text() -> None:
    every = made("glm4moe")
    assert every.of(talk("a", "b", "c", "d", reasoning_content="e")) is not None
    assert every.of(talk("a", "b", "c", "d", reasoning_content="\n")) is None


def test_answer_that_begins_as_the_servers_prompt_ends_is_rendered_for_itself() -> None:
    every = made("deepseek_r1_distill")
    assert every.of(talk("a", "b", "c", "d", reasoning_content="e")) is not None
    assert every.of(talk("a", "<think>\nb", "c", "d", reasoning_content="e")) is None


def test_pieces_are_the_text_and_begin_with_their_header() -> None:
    every = made("qwen3")
    found = every.of(talk("a", "b", "c", "d"))
    assert found is not None
    skeleton, words = found
    template = chat_template(vocabulary("qwen3"), None, stop_ids("qwen3"))
    rendered = render(talk("a", "b", "c", "d"), template, Masking())
    assert ["".join(piece.text(words) for piece in row) for row in skeleton.rows] == [row.text for row in rendered]
    headers = [piece.header for row in skeleton.rows for piece in row if piece.header is not None]
    assert [tokenizer("qwen3").decode(list(header)) for header in headers] == ["assistant\n"] * 2
    assert [piece.turn for row in skeleton.rows for piece in row if piece.header is not None] == [1, 3]


@pytest.mark.parametrize("name", ["qwen3_6", "deepseek_r1_distill"])
def test_answer_that_closes_an_opened_thought_is_encoded_by_itself(name: str) -> None:
    # The server's prompt ends with a newline and the answer begins with one: both together would be one token.
    every = made(name)
    assert every.of(talk("a", "\nb")) is None or name == "qwen3_6", "newlines before the words are not written"
    found = every.of(talk("a", "b"))
    assert found is not None
    answer = next(piece for row in found[0].rows for piece in row if piece.header is not None)
    assert answer.header == ()
    assert answer.text(found[1]).startswith("\n</think>\n\nb")
    judge = tokenizer(name)
    prompt = judge.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    pieces = found[0].rows[0]
    before = pieces[: pieces.index(answer)]
    encoded = vocabulary(name).encoder.encode([piece.text(found[1]) for piece in before])
    assert encoded.ids.tolist() == prompt


def test_tokens_that_swallow_blanks_or_meet_their_neighbours_are_no_cuts() -> None:
    plain = vocabulary("qwen3")
    greedy = replace(plain, added=tuple(replace(token, plain=False) for token in plain.added))
    written = "".join(plain.templates.values())
    assert {"<|im_start|>", "<|im_end|>"} <= skeletons._cuts(plain, plain.encoder, written)
    assert skeletons._cuts(greedy, greedy.encoder, written) == frozenset()
    assert skeletons._cuts(plain, plain.encoder, "") == frozenset()


def test_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeletons, "MOST_SHAPES", 2)
    every = made("small_chatml")
    found = [every.of(talk(*["x"] * count)) for count in (2, 4, 6)]
    assert [one is not None for one in found] == [True, True, False]
    assert every.of(talk("y", "z")) is not None


def test_skeleton_without_guards_fits_everything() -> None:
    assert Skeleton(((),), ()).fits(["", "x"])
    assert not Skeleton(((), ()), ()).fits(["", "x"])
