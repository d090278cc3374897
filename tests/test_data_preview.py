"""The preview: every token shown once, what is trained marked, and nothing of the rows can act in page or terminal."""

from __future__ import annotations

import html.parser
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.data.cache import Cache
from finetune.data.engine import Settings
from finetune.data.page import page
from finetune.data.prepare import PreparedSource, prepare
from finetune.data.preview import PreviewedRow, Previewer, places
from finetune.data.tokenizer import Vocabulary
from finetune.data.visible import visible
from finetune.errors import DataError
from finetune.recipe.sections import DataOptions

TOKENIZERS = Path(__file__).parent / "tokenizers"
XSS = (
    "<script>alert(1)</script>", "</pre><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "\"><svg onload='alert(1)'>", "' onmouseover='alert(1)", '" style="position:fixed', "</span></pre></body>",
    "javascript:alert(1)", "<a href=javascript:alert(1)>x</a>", "<!--", "-->", "<![CDATA[", "<?php ?>", "&lt;b&gt;",
    "&#60;script&#62;", "{{ 7 * 7 }}", "{% for x in y %}", "{{ ''.__class__ }}", "<meta http-equiv=refresh content=0>",
    "<iframe src=//evil.example>", "<link rel=stylesheet href=//evil.example>", "<style>*{display:none}</style>",
    "<base href=//evil.example>", "<form action=//evil.example>", "\x00<script>", "\u2028<script>", "</title><script>",
    "</style><script>", "<scr\u200bipt>", "＜script＞", "\u202e>tpircs<", "\x1b[2J",
    "\x1b]8;;https://evil.example\x07x",
)  # fmt: skip


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary.of(AutoTokenizer.from_pretrained(TOKENIZERS / name))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def chosen(rows: list[Any], model: str = "chatml", name: str = "rows", **data: Any) -> Settings:
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = vocabulary(model)
    assert known.eos_id is not None
    options = DataOptions(
        **{"train": [{"path": "train.jsonl", "name": name}], "max_length": 4096, "num_proc": 1, **data}
    )
    return Settings(known, frozenset({known.eos_id}), options)


def previewed(use: Settings, row: int | None = None, first: int | None = None) -> list[PreviewedRow]:
    with Cache("cache") as kept:
        return list(Previewer(use).rows(prepare(use.options.train, use, kept), row, first))


class Seen(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, attributes, texts, and the cells of its rows."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[list[tuple[str, str, str]]] = []
        self.title = ""
        self._open: list[str] = []
        self._cell = ("", "")
        self._text = ""
        self.feed(content)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "meta":
            return
        self._open.append(tag)
        if tag == "pre":
            self.cells.append([])
        known = dict(attributes)
        self._cell, self._text = (known.get("class") or "", known.get("title") or ""), ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "span" and "pre" in self._open:
            self.cells[-1].append((*self._cell, self._text))

    def handle_data(self, data: str) -> None:
        self._text += data
        if self._open[-1:] == ["title"]:
            self.title += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


KNOWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ul", "li", "pre", "span"}
KNOWN_ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "title"}


def seen(rows: list[PreviewedRow], title: str = "Rows") -> Seen:
    content = "".join(page(title, rows))
    found = Seen(content)
    assert set(found.tags) <= KNOWN_TAGS
    assert {name for name, _ in found.attributes} <= KNOWN_ATTRIBUTES
    assert "://" not in "".join(value or "" for _, value in found.attributes)
    return found


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_each_token_is_shown_with_what_it_is() -> None:
    (row,) = previewed(chosen([chat("Is 7 prime?", "Yes.")]))
    assert (row.source, row.row, row.turn, row.place, row.number, row.of) == ("rows", 0, 1, "train.jsonl:1", 1, 1)
    kinds = "".join({"trained": "t", "context": "c", "special": "s"}[token.kind] for token in row.tokens)
    assert kinds.strip("cs") == "t" * kinds.count("t")
    (one,) = row.trained
    trained = [token for token in row.tokens if token.trained]
    assert "".join(token.text for token in trained) == "Yes.<|im_end|>"
    assert trained[-1].special
    assert row.trained_tokens == one.tokens == sum(len(token.ids) for token in trained)
    said = "messages[1], assistant; behind what a server sends; ends with a stop token"
    assert row.said() == [f"tokens {one.start} to {one.end - 1}: {said}"]


def test_rows_of_one_chat_are_numbered_and_say_their_turn() -> None:
    use = chosen([chat("q", "a"), {"messages": [*chat("q", "a", "r", "b")["messages"], {"role": "tool", "content": "x"},
                                                {"role": "assistant", "content": "c"}]}], "thinking")  # fmt: skip
    rows = previewed(use, row=1)
    assert [(row.row, row.number, row.of, row.place) for row in rows] == [
        (1, number + 1, len(rows), "train.jsonl:2") for number in range(len(rows))
    ]
    assert [one.turn for row in rows for one in row.trained] == [1, 3, 5]
    assert all(one.same for row in rows for one in row.trained)


def test_what_is_not_as_served_and_what_does_not_end_is_said() -> None:
    (row,) = previewed(chosen([chat("q", "x" * 300)], on_long_row="truncate", max_length=60))
    assert row.said()[0].endswith("messages[1], assistant; behind what a server sends; ends without a stop token")
    called = chat("q", "a", "r", "b", "s", "c")
    called["messages"][2]["role"] = "tool"
    (row,) = previewed(chosen([called], "thinking", history="as_rendered"))
    assert ["NOT behind what a server sends" in line for line in row.said()] == [False, True, False]
    (text,) = previewed(chosen([{"text": "Plain."}]))
    assert text.said() == [f"tokens 1 to {text.length - 1}: text; ends with a stop token"]


words = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"), min_size=1, max_size=20)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=words, answer=words.filter(str.strip), model=st.sampled_from(["chatml", "llama3"]))
def test_tokens_are_whole_and_in_order_for_any_text(question: str, answer: str, model: str, tmp_path: Path) -> None:
    use = chosen([chat(question, answer)], model)
    with Cache("cache") as kept:
        (one,) = prepare(use.options.train, use, kept)
        (row,) = Previewer(use).rows([one], None, None)
        ids, labels = one.rows.ids(0), one.rows.labels(0)
    assert [number for token in row.tokens for number in token.ids] == ids.tolist()
    assert [token.trained for token in row.tokens for _ in token.ids] == (labels >= 0).tolist()
    text = use.vocabulary.encoder.decode(ids.tolist())
    assert "".join(token.text for token in row.tokens) == text
    assert answer.strip() in text


def test_a_character_of_several_tokens_is_shown_once() -> None:
    (row,) = previewed(chosen([chat("q", "👩\u200d👩\u200d👧 한국어")]))
    assert any(len(token.ids) > 1 for token in row.tokens)
    assert not any("\ufffd" in token.text for token in row.tokens)


# -- which rows --------------------------------------------------------------------------------------------------------


def sources(use: Settings, kept: Cache) -> list[PreparedSource]:
    return prepare(use.options.train, use, kept)


def test_rows_are_chosen_by_their_number_in_the_source() -> None:
    use = chosen([chat("q", f"answer {n}") for n in range(5)])
    assert [row.row for row in previewed(use, row=3)] == [3]
    assert [row.row for row in previewed(use, first=2)] == [0, 1]
    assert [row.row for row in previewed(use, first=9)] == [row.row for row in previewed(use)] == list(range(5))


def test_rows_are_found_in_files_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    use = chosen([chat(f"question {n}", f"answer {n}") for n in range(60)])
    monkeypatch.setattr("finetune.data.read.pieces.__defaults__", (False, 500))  # bytes of a piece
    for number in (0, 17, 59):
        (row,) = previewed(use, row=number)
        assert row.place == f"train.jsonl:{number + 1}"
        assert row.trained[0].same
    assert [row.place for row in previewed(use)] == [f"train.jsonl:{n + 1}" for n in range(60)]


def test_a_row_that_is_not_there_is_answered_with_the_range() -> None:
    use = chosen([chat("q", "a"), chat("q", "x" * 200), chat("q", "b")], on_long_row="drop", max_length=100)
    with Cache("cache") as kept:
        found = sources(use, kept)
        for number in (3, -1, 10**12):
            with pytest.raises(DataError, match=rf"^--row {number}: rows has rows 0 to 2, counted from 0$"):
                list(places(found, number, None))
        with pytest.raises(
            DataError, match="this row of rows was left out when the rows were prepared; others stand from"
        ):
            list(places(found, 1, None))


def test_a_source_of_which_nothing_was_kept_says_so() -> None:
    use = chosen([chat("q", "x" * 200)], on_long_row="drop", max_length=100)
    for row in (None, 0):
        with pytest.raises(DataError, match=r"^no row of rows was kept; `finetune data prepare` says why$"):
            previewed(use, row=row, first=3)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_page_holds_every_token_with_its_ids_and_marks() -> None:
    rows = previewed(chosen([chat("Is 7 prime?", "Yes.", "And 8?", "No."), chat("a <b>", "c & d")]))
    found = seen(rows)
    assert len(found.cells) == 2
    for row, cells in zip(rows, found.cells, strict=True):
        assert [text for *_, text in cells] == [visible(token.text, lines=True) for token in row.tokens]
        assert [title for _, title, _ in cells] == [" ".join(map(str, token.ids)) for token in row.tokens]
        assert [("t" in style.split(), "s" in style.split()) for style, *_ in cells] == [
            (token.trained, token.special) for token in row.tokens
        ]
    assert "script" not in found.tags


def test_nothing_that_rows_hold_acts_in_a_page() -> None:
    assert len(XSS) >= 30
    rows = [chat(text, f"{text} ", text, text) for text in XSS]
    rows += [{"text": "".join(XSS)}, {"prompt": XSS[0], "completion": XSS[2]}]
    Path("mixed").mkdir()
    for text in XSS[:4]:
        shown = previewed(chosen(rows[: len(XSS)], name=text))
        assert len(shown) == len(XSS)
        found = seen(shown, title=f"Rows of {text}")
        assert found.title == f"Rows of {text}"
        content = "".join(page(text, shown))
        assert "<script" not in content
        assert not any(kind in content for kind in ("<img", "<svg", "<iframe", "<base", "<form", "<link"))
    seen(previewed(chosen(rows[len(XSS) : -1], name="texts")))


def test_a_place_in_a_folder_of_any_name_is_escaped() -> None:
    folder = Path('<img src=x onerror="alert(1)">')
    folder.mkdir()
    (folder / "<script>.jsonl").write_text(json.dumps(chat("a", "b")))
    use = chosen([chat("a", "b")])
    use = Settings(use.vocabulary, use.stop_ids, DataOptions(train=str(folder), max_length=256))
    (row,) = previewed(use)
    assert "<script>.jsonl:1" in row.place
    seen([row])


def test_words_of_a_template_are_escaped() -> None:
    Path("own.jinja").write_text(
        "{% for m in messages %}<script>{{ m.role }}</script>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<script>assistant</script>{% endif %}"
    )
    (row,) = previewed(chosen([chat("q", "a")], chat_template="own.jinja"))
    assert "<script>user" in "".join(token.text for token in row.tokens)
    seen([row])


def test_a_page_is_made_as_rows_come() -> None:
    made = 0

    def rows() -> Any:
        nonlocal made
        (row,) = previewed(chosen([chat("q", "a" * 2000)]))
        for _ in range(50):
            made += 1
            yield row

    parts = page("many", rows())
    next(parts)
    assert made < 5
    assert sum(part.count("<h2>") for part in parts) >= 45


def test_a_page_asks_for_nothing_and_allows_no_script() -> None:
    content = "".join(page("Rows", previewed(chosen([chat("q", "a")]))))
    assert "default-src 'none'" in content
    for word in ("http:", "https:", "src=", "href=", "url(", "@import", "<script"):
        assert word not in content


# -- text that hides ---------------------------------------------------------------------------------------------------


@given(st.text())
def test_visible_text_holds_nothing_that_hides_or_reorders(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
                   for letter in shown)  # fmt: skip


def test_every_character_of_unicode_that_hides_is_shown() -> None:
    hidden = [
        chr(number) for number in range(0x110000) if unicodedata.category(chr(number)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    assert len(hidden) >= 2000  # with the halves of characters
    assert [letter for letter in hidden if letter in visible(letter)] == []


def test_ordinary_text_is_left_as_it_is() -> None:
    for text in (
        "Yes.",
        "naïve café",
        "中文，标点。",
        "한국어",
        "العربية",
        "हिन्दी",
        "👍🏽",
        "a b",
        "x²",
        "<b>&amp;</b>",
    ):
        assert visible(text) == text
    assert visible("a\nb") == "a↵b"
    assert visible("a\nb", lines=True) == "a↵\nb"
    assert visible("\x1b[2J\u202e\t\x7f\u200d") == "␛[2J⟨U+202E⟩␉␡⟨U+200D⟩"


def test_numbers_of_rows_stay_numbers() -> None:
    (row,) = previewed(chosen([chat("q", "a")]))
    assert isinstance(row.row, int)
    assert not isinstance(row.length, np.integer)
