"""The strict YAML reader: YAML 1.2 values, the place of everything, and a clear refusal of what surprises."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import RecipeError
from finetune.recipe.problems import RecipeProblems
from finetune.recipe.show import scalar
from finetune.recipe.yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Document, decode, parse, resolve_plain


def refusal(text: str | bytes) -> str:
    """The message that a text is refused with, by an error or by problems."""
    content = text.encode() if isinstance(text, str) else text
    try:
        document = parse(decode(content, "x.yaml"), "x.yaml")
    except RecipeProblems as error:
        return str(error)
    return "\n".join(map(str, document.problems))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("1E+5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("12", 12),
        ("+12", 12),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1f", 31),
        ("true", True),
        ("True", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("NO", "NO"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    assert resolve_plain(text) == value
    assert type(resolve_plain(text)) is type(value)
    read = parse(f"a: {text}\n", "x.yaml").value["a"]
    assert read == value
    assert type(read) is type(value)


def test_quoted_scalars_are_always_text() -> None:
    assert parse("a: '1e-4'\nb: \"true\"\nc: |\n  12\n", "x.yaml").value == {"a": "1e-4", "b": "true", "c": "12\n"}


def test_every_key_and_value_has_its_place() -> None:
    document = parse("a:\n  b: 1\nc: [x, {d: 2}]\n", "x.yaml")
    keys = {way: str(place) for way, place in document.keys.items()}
    values = {way: str(place) for way, place in document.values.items()}
    assert keys == {("a",): "x.yaml:1:1", ("a", "b"): "x.yaml:2:3", ("c",): "x.yaml:3:1", ("c", 1, "d"): "x.yaml:3:9"}
    assert values[("a", "b")] == "x.yaml:2:6"
    assert values[("c", 0)] == "x.yaml:3:5"
    assert values[("c", 1, "d")] == "x.yaml:3:12"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3:1: a", "written twice, first at line 1"),
        ("a: {b: 1, b: 2}", "x.yaml:1:11: a.b", "written twice"),
        ("a: &x 1", "x.yaml:1:4: a", "anchors (&x) are not read"),
        ("a: 1\nb: *x", "x.yaml:2:4: b", "aliases (*x) are not read"),
        ("a:\n  <<: {b: 1}", "x.yaml:2:3: a", "use extends"),
        ("a: !!python/object:os.system x", "x.yaml:1:4: a", "tags"),
        ("a: !!str 1", "x.yaml:1:4: a", "tags"),
        ("!thing\na: 1", "x.yaml:1:1", "tags"),
        ("1: a", "x.yaml:1:1", "a key must be text, found 1"),
        ("true: a", "x.yaml:1:1", "a key must be text, found true"),
        ("? [a, b]\n: 1", "x.yaml:1:3", "a key must be text, not a mapping or a list"),
        ("a: {{x}}", "x.yaml:1:5", "a key must be text, not a mapping or a list"),
        ("a: 1\n---\nb: 2", "x.yaml:2:1", "a second YAML document"),
        ("a:\n\tb: 1", "x.yaml:2:1", "a tab is used for indentation; use spaces"),
        ("a: b: c", "x.yaml:1:5", "mapping values are not allowed"),
        ("a: [1, 2\nb: 3", "x.yaml:2:2", "a bracket is not closed"),
        ('a: "x', "x.yaml:1:6", "a quote is not closed"),
        ("a: @b", "x.yaml:1:4", "in quotes"),
        ("a:\n  - b\n c: 1", "x.yaml:3:2", "indentation"),
        ("[" * (MAX_DEPTH + 2), f"x.yaml:1:{MAX_DEPTH + 1}", f"nested deeper than {MAX_DEPTH} levels"),
        ("[" * 100_000, f"x.yaml:1:{MAX_DEPTH + 1}", f"nested deeper than {MAX_DEPTH} levels"),
        ("a: " + "1" * 5000, "x.yaml:1:4: a", "a number of 5000 digits"),
        ('a: "\\0"', "x.yaml:1:4: a", "U+0000"),
        ("a: \x07", "x.yaml:1:4", "U+0007"),
        (b"a: b\nc: \xff\xfe", "x.yaml:2:4", "byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbfa: 1", "x.yaml:1:1", "byte order mark"),
        ("a: 1".encode("utf-16"), "x.yaml:1:1", "UTF-16"),
        (b"a: 1\n" + b"#" * MAX_BYTES, "x.yaml", "over 1,048,576 bytes"),
        ("- 1\n" * (MAX_VALUES + 1), f"x.yaml:{MAX_VALUES}:3", "more than 20,000 values"),
    ],
)
def test_what_surprises_is_refused_with_its_place(text: str | bytes, place: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"{place}: ")
    assert words in message


def test_refusals_do_not_end_the_reading() -> None:
    document = parse("a: &x 1\nb: *x\nc: !t 2\nd: 3\nd: 4\ne: [*x, 5]\n? {f: 1}\n: 6\ng: 7\n", "x.yaml")
    assert document.value == {"a": 1, "d": 3, "e": [None, 5], "g": 7}
    assert document.broken == {("b",), ("c",), ("e", 0)}
    assert len(document.problems) == 6


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{('*' + chr(97 + i) + ', ') * 9}]\n" for i in range(20)
    )
    error = RecipeProblems(parse(bomb, "x.yaml").problems)
    assert len(error.problems) == 21 + 20 * 9
    assert str(error).endswith("more problems")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    refused = ""
    try:
        parse(decode(content, "x.yaml"), "x.yaml")
    except RecipeError as error:
        refused = str(error)
    assert not refused or refused.startswith("x.yaml")


PIECES = st.sampled_from(
    [
        *(
            "a",
            "b",
            ": ",
            ":",
            "- ",
            "\n",
            "  ",
            "\t",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "'",
            '"',
            "&x ",
            "*x",
            "!t ",
            "#",
            "|",
        ),
        *(">", "? ", "<<", "---\n", "...\n", "%", "@", "1e4", ".inf", "~", "\\", "\u2028", "é", "\U0001f600"),
    ]
)


@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_yaml_like_text_is_read_or_refused(text: str) -> None:
    refused, document = "", Document("x.yaml")
    try:
        document = parse(decode(text.encode(), "x.yaml"), "x.yaml")
    except RecipeError as error:
        refused = str(error)
    assert not refused or refused.startswith("x.yaml")
    if not refused:
        assert set(document.keys) <= set(document.values) | document.broken


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
    | st.sampled_from(["yes", "1e-4", "010", "~", "null", "-", "a: b", "# x", "[a", "1_000", "C:\\x", "'", '"', "0x"])
)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_reads_back_equal(value: object) -> None:
    document = parse(decode(f"a: {scalar(value)}\n".encode(), "x.yaml"), "x.yaml")
    assert document.problems == []
    assert document.value == {"a": value}


def test_infinity_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        scalar(math.inf)
