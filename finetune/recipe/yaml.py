"""A strict reader of YAML 1.2: plain values, and the place of every key and value.

Stricter than YAML on purpose. A recipe is a mapping with text keys; what would surprise a reader (duplicate keys,
anchors, tags, merge keys, `no` read as false, `010` read as 8) is refused or read as it looks. Reading goes event by
event without recursion, so depth and size are limited before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune.recipe.origin import Origin, Path, dotted
from finetune.recipe.problems import Problem, RecipeProblems

MAX_BYTES = 1 << 20
"""Largest recipe file in bytes; recipes are a few kilobytes."""
MAX_DEPTH = 32
"""Deepest nesting of mappings and lists."""
MAX_VALUES = 20_000
"""Most values in a file."""
MAX_DIGITS = 64
"""Longest number in characters."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_HINTS = (
    ("mapping values are not allowed", "put text that holds ': ' in quotes, or mend the indentation"),
    ("did not find expected key", "check the indentation of this line and the one above"),
    ("could not find expected ':'", "every key needs a colon and a space after it"),
    ("did not find expected '-'", "check the indentation: a list goes on here without its dash"),
    ("expected ',' or", "a bracket is not closed, or a comma is missing"),
    ("expected <block end>", "check the indentation of this line and the one above"),  # without libyaml
    ("did not find expected node content", "a value is missing here"),
    ("unexpected end of stream", "a quote is not closed"),
    ("cannot start any token", "put text that starts with this character in quotes"),
    ("block sequence entries are not allowed", "begin the list on a new line, or write it in brackets: [a, b]"),
    ("unknown escape character", "in double quotes a backslash is an escape: double it, or use single quotes"),
)


@dataclass
class Document:
    """One file as plain values, with the place of everything in it."""

    source: str
    value: Any = None
    """The whole as dict, list, str, int, float, bool and None."""
    keys: dict[Path, Origin] = field(default_factory=dict)
    """Where the key of each mapping entry stands."""
    values: dict[Path, Origin] = field(default_factory=dict)
    """Where each value begins."""
    broken: set[Path] = field(default_factory=set)
    """Ways to values that were refused, and so are missing from `value`."""
    problems: list[Problem] = field(default_factory=list)
    """What was refused while reading went on."""


def resolve_plain(text: str) -> Any:
    """What an unquoted scalar means by the core schema of YAML 1.2; `ValueError` for a number of too many digits."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if len(text) > MAX_DIGITS and (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
        raise ValueError(f"a number of {len(text)} digits")
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def decode(content: bytes, source: str) -> str:
    """The text of a recipe file.

    Raises:
        RecipeProblems: too large, empty, not UTF-8, a byte order mark, or a control character.
    """
    if len(content) > MAX_BYTES:
        raise _failure(source, None, f"over {MAX_BYTES:,} bytes, which no recipe has: is this one?")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _failure(source, (1, 1), "the file is UTF-16; save it as UTF-8")
    if content.startswith(b"\xef\xbb\xbf"):
        raise _failure(source, (1, 1), "the file starts with a byte order mark; save it as UTF-8 without BOM")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8")
        raise _failure(
            source, _place(before, len(before)), f"byte 0x{content[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from error
    bad = _UNPRINTABLE.search(text)
    if bad:
        name = f"U+{ord(bad.group()):04X}"
        raise _failure(source, _place(text, bad.start()), f"the character {name} is not allowed here; remove it")
    return text


def parse(text: str, source: str, origin: Origin | None = None, flow: bool = False) -> Document:
    """Read one YAML document.

    Args:
        text: the YAML, as `decode` returns it.
        source: the file name for places.
        origin: the place of everything, where `text` is not a file (an override).
        flow: only a scalar or a bracketed value may be given.

    Returns:
        The document; `problems` holds what was refused without ending the reading.

    Raises:
        RecipeProblems: broken syntax, several documents, or too deep nesting; it also tells what was refused before.
    """
    builder = _Builder(Document(source), origin, flow)
    try:
        for event in _events(text):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        line, column = _position(error.problem_mark or error.context_mark)
        builder.stop(origin or Origin("file", source, line + 1, column + 1), _syntax(error, text))
    except yaml.YAMLError as error:
        builder.stop(origin or Origin("file", source), f"not valid YAML: {error}")
    return builder.document


def _events(text: str) -> Iterator[yaml.Event]:
    loader = _Loader(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


def _position(mark: Any) -> tuple[int, int]:
    """Line and column of a PyYAML mark, both from 0; its C and Python parsers have different mark classes."""
    return (mark.line, mark.column) if mark is not None else (0, 0)


def _place(text: str, index: int) -> tuple[int, int]:
    line_start = text.rfind("\n", 0, index) + 1
    return text.count("\n", 0, index) + 1, index - line_start + 1


def _failure(source: str, place: tuple[int, int] | None, message: str) -> RecipeProblems:
    line, column = place or (None, None)
    return RecipeProblems([Problem(Origin("file", source, line, column), "", message)])


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """Why the parser stopped, and what usually mends it."""
    number, column = _position(error.problem_mark or error.context_mark)
    lines = text.split("\n")
    line = lines[number] if number < len(lines) else ""
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    if "\t" in indent and column <= len(indent) + 1:
        return "a tab is used for indentation; use spaces"
    reason = error.problem or "something else was expected"
    message = f"not valid YAML: {reason}"
    opened, _ = _position(error.context_mark or error.problem_mark)
    if opened != number:
        message += f" ({error.context}, begun at line {opened + 1})"
    hint = next((hint for start, hint in _HINTS if start in reason), "")
    return f"{message}; {hint}" if hint else message


@dataclass
class _Frame:
    """A mapping or list that is being read."""

    value: dict[str, Any] | list[Any]
    path: Path | None
    """None when the whole is thrown away, because its key was refused."""
    key: str | None = None
    awaits_key: bool = True

    def child(self) -> Path | None:
        if self.path is None:
            return None
        if isinstance(self.value, list):
            return (*self.path, len(self.value))
        return None if self.key is None else (*self.path, self.key)


class _Builder:
    """Turns events into a Document."""

    def __init__(self, document: Document, origin: Origin | None, flow: bool) -> None:
        self.document = document
        self.origin = origin
        self.flow = flow
        self.stack: list[_Frame] = []
        self.documents = 0
        self.count = 0

    def stop(self, origin: Origin, message: str) -> None:
        raise RecipeProblems([*self.document.problems, Problem(origin, "", message)])

    def refuse(self, origin: Origin, path: Path | None, message: str) -> None:
        self.document.problems.append(Problem(origin, dotted(path or ()), message))

    def take(self, event: yaml.Event) -> None:
        line, column = _position(event.start_mark)
        place = self.origin or Origin("file", self.document.source, line + 1, column + 1)
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self.stop(place, "a second YAML document begins here; a recipe is one document, remove the '---'")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            frame = self.stack.pop()
            if self.stack and isinstance(self.stack[-1].value, dict) and self.stack[-1].awaits_key:
                self.stack[-1].awaits_key = False  # a mapping or list stood as a key, which was refused
            else:
                self.attach(frame.value)
        elif isinstance(event, yaml.NodeEvent):
            self.node(event, place)

    def node(self, event: yaml.NodeEvent, place: Origin) -> None:
        frame = self.stack[-1] if self.stack else None
        if frame is not None and isinstance(frame.value, dict) and frame.awaits_key:
            self.key(frame, event, place)
            return
        self.count += 1
        if self.count > MAX_VALUES:
            self.stop(place, f"more than {MAX_VALUES:,} values; is it a recipe?")
        path = frame.child() if frame else ()
        if path is not None:
            self.document.values[path] = place
        if isinstance(event, yaml.AliasEvent):
            self.refuse(place, path, f"aliases (*{event.anchor}) are not read; write the value out")
            self.lose(path)
            return
        if event.anchor is not None:
            self.refuse(place, path, f"anchors (&{event.anchor}) are not read; write values out, or use extends")
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.refuse(place, path, f"tags ({tag}) are not read; write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            self.scalar(event, place, path, tagged=tag is not None)
        else:
            self.open(event, place, path)

    def open(self, event: yaml.NodeEvent, place: Origin, path: Path | None) -> None:
        if len(self.stack) >= MAX_DEPTH:
            self.stop(place, f"nested deeper than {MAX_DEPTH} levels")
        if self.flow and not getattr(event, "flow_style", False):
            self.stop(place, "write a mapping in braces, a list in brackets, or text with ': ' or '- ' in quotes")
        self.stack.append(_Frame({} if isinstance(event, yaml.MappingStartEvent) else [], path))

    def scalar(self, event: yaml.ScalarEvent, place: Origin, path: Path | None, tagged: bool) -> None:
        if tagged:
            self.lose(path)
            return
        if "\0" in event.value:
            self.refuse(place, path, "text must not hold the character U+0000")
            self.lose(path)
            return
        if not event.implicit[0]:
            self.attach(event.value)
            return
        try:
            self.attach(resolve_plain(event.value))
        except ValueError:
            self.refuse(place, path, f"a number of {len(event.value)} digits; put it in quotes if it is text")
            self.lose(path)

    def key(self, frame: _Frame, event: yaml.NodeEvent, place: Origin) -> None:
        frame.key, frame.awaits_key = None, False
        path = frame.path
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self.refuse(place, path, "a key must be text, not a mapping or a list (text in braces needs quotes)")
            frame.awaits_key = True  # until its end event
            self.open(event, place, None)
            return
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or getattr(event, "tag", None) is not None:
            self.refuse(place, path, "anchors, aliases and tags are not read on keys; write the plain key")
            return
        assert isinstance(event, yaml.ScalarEvent)
        name = event.value
        if name == "<<" and event.implicit[0]:
            self.refuse(place, path, "merge keys (<<) are not read; put what is shared in a file and use extends")
            return
        try:
            number = event.implicit[0] and not isinstance(resolve_plain(name), str)
        except ValueError:
            number = True
        if number or not name or "\0" in name:
            shown = name if len(name) <= 40 else f"{name[:37]}..."
            self.refuse(place, path, f"a key must be text, found {shown or 'nothing'}; put it in quotes")
            return
        assert isinstance(frame.value, dict)
        if path is None:
            frame.key = name
            return
        first = self.document.keys.get((*path, name))
        if first is not None:
            self.refuse(place, (*path, name), f"written twice, first at line {first.line}; keep one")
            return
        frame.key = name
        self.document.keys[(*path, name)] = place

    def attach(self, value: Any) -> None:
        if not self.stack:
            self.document.value = value
            return
        frame = self.stack[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
            return
        if frame.key is not None:
            frame.value[frame.key] = value
        frame.awaits_key = True

    def lose(self, path: Path | None) -> None:
        """Go on without a value that was refused."""
        if path is not None:
            self.document.broken.add(path)
        if self.stack and isinstance(self.stack[-1].value, dict):
            self.stack[-1].awaits_key = True
        else:
            self.attach(None)  # keeps the indices of the list true
