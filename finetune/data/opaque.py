"""Contents that record what a chat template asks of them, so that one rendering speaks for many chats.

A template takes a path that depends on roles, on which fields are there, and on what it asks of the texts: does this
content hold "</think>", is it empty, does it begin with "<tool_response>"? `Opaque` stands in for a text: it answers as
nearly every text would (no, no, no) and writes the question down. Any chat whose texts give the same answers takes the
same path, so its text is this rendering with its own contents in place (finetune/data/skeleton.py). A question with no
such answer (a length, a hash, a character) raises `Touched`, and those chats are rendered one by one.
"""

from __future__ import annotations

import functools
import re
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from finetune.data.template import ChatTemplate, Generation, Limits, Sandbox, environment

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode, which no text may hold
AS_IS, STRIPPED = "a", "s"
SLOT = re.compile(f"{OPEN}(\\d+)([{AS_IS}{STRIPPED}]){CLOSE}")
GUARDS: ContextVar[dict[Guard, None]] = ContextVar("GUARDS")  # where the questions of the running rendering go


class Touched(Exception):
    """A template asked something that a stand-in cannot answer for others."""


@dataclass(frozen=True)
class Guard:
    """A question and its assumed answer, which a text must share to take the same path.

    Attributes:
        slot: number of the text.
        form: how the template had changed it: AS_IS or STRIPPED.
        asks: "lacks", "starts", "ends", "is" (each assumed false of `what`), "edges" (no character of `what` at the
            ends named by it) or "filled" (assumed true).
        what: the operand.
    """

    slot: int
    form: str
    asks: str
    what: Any = ""

    def holds(self, text: str) -> bool:
        """Whether `text` gives the assumed answer."""
        if self.form == STRIPPED:
            text = text.strip()
        match self.asks:
            case "lacks":
                return self.what not in text
            case "starts":
                return not text.startswith(self.what)
            case "ends":
                return not text.endswith(self.what)
            case "is":
                return bool(text != self.what)
            case "left":
                return text.lstrip(self.what) == text
            case "right":
                return text.rstrip(self.what) == text
        return bool(text)


class Opaque(str):
    """A stand-in for a text.

    Attributes:
        slot: its number; None for what was joined of it and other text.
        form: AS_IS or STRIPPED.
        guards: where questions are written down.
    """

    slot: int | None
    form: str
    guards: dict[Guard, None]

    def __new__(cls, text: str, slot: int | None, form: str, guards: dict[Guard, None]) -> Opaque:
        """A stand-in that shows itself as `text`."""
        made = super().__new__(cls, text)
        made.slot, made.form, made.guards = slot, form, guards
        return made

    @classmethod
    def of(cls, slot: int, guards: dict[Guard, None], form: str = AS_IS) -> Opaque:
        """The stand-in of text number `slot`."""
        return cls(f"{OPEN}{slot}{form}{CLOSE}", slot, form, guards)

    def _assume(self, asks: str, what: Any = "") -> None:
        if self.slot is None or type(what) not in (str, tuple):
            raise Touched(asks)
        self.guards[Guard(self.slot, self.form, asks, what)] = None

    def _joined(self, text: str) -> Opaque:
        return Opaque(text, None, AS_IS, self.guards)

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Opaque:
        return self._joined(str.__add__(self, other))

    def __radd__(self, other: str) -> Opaque:
        return self._joined(str.__add__(other, self))

    def __bool__(self) -> bool:
        if self.slot is not None or not SLOT.sub("", str.__str__(self)):
            self._assume("filled")
        return True

    def __contains__(self, what: object) -> bool:
        self._assume("lacks", what)
        return False

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        self._assume("is", other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise Touched("hash")

    def startswith(self, what: Any, *rest: Any) -> bool:
        """Assumed false."""
        if rest:
            raise Touched("startswith")
        self._assume("starts", what)
        return False

    def endswith(self, what: Any, *rest: Any) -> bool:
        """Assumed false."""
        if rest:
            raise Touched("endswith")
        self._assume("ends", what)
        return False

    def strip(self, what: str | None = None) -> Opaque:
        """Blanks: another form. Other characters are assumed not to be there."""
        if what is None:
            if self.slot is None:
                raise Touched("strip")
            return Opaque.of(self.slot, self.guards, STRIPPED)
        return self.lstrip(what).rstrip(what)

    def lstrip(self, what: str | None = None) -> Opaque:
        """Nothing is assumed to be there."""
        self._assume("left", what if what is not None else " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0")
        if what is None:
            raise Touched("lstrip")  # Python's blanks are more than a list holds
        return self

    def rstrip(self, what: str | None = None) -> Opaque:
        """Nothing is assumed to be there."""
        if what is None:
            raise Touched("rstrip")
        self._assume("right", what)
        return self

    def split(self, separator: str | None = None, *rest: Any) -> list[Any]:
        """The separator is assumed not to be there."""
        if separator is None:
            raise Touched("split")
        self._assume("lacks", separator)
        return [self]

    def replace(self, old: str, new: str, *rest: Any) -> Opaque:
        """Assumed not to be there."""
        self._assume("lacks", old)
        return self


def _touch(name: str) -> Any:
    def refuse(self: Opaque, *args: Any, **given: Any) -> NoReturn:
        raise Touched(name)

    return refuse


_ANSWERED = set(vars(Opaque)) | {"__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__doc__",
    "__init_subclass__", "__subclasshook__", "__reduce_ex__", "__reduce__", "__dir__", "__delattr__", "__sizeof__",
    "__getstate__"}  # fmt: skip
for _name in dir(str):
    if _name not in _ANSWERED:
        setattr(Opaque, _name, _touch(_name))


def _holds_opaque(value: Any) -> bool:
    """Whether a stand-in, or text that holds one, is in a value."""
    if isinstance(value, str):
        return OPEN in str.__str__(value) if type(value) is str else isinstance(value, Opaque)
    if isinstance(value, dict):
        return any(map(_holds_opaque, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_opaque, value))


class _Joins(NodeTransformer):
    """`a ~ b` becomes `a|string + b|string`, whose result can still be told from plain text."""

    def visit_Concat(self, node: nodes.Concat, *args: Any, **given: Any) -> nodes.Expr:
        """One concatenation."""
        parts: list[nodes.Expr] = [
            nodes.Filter(self.visit(part), "string", [], [], None, None, lineno=node.lineno) for part in node.nodes
        ]
        joined = parts[0]
        for part in parts[1:]:
            joined = nodes.Add(joined, part, lineno=node.lineno)
        return joined

    def visit_AssignBlock(self, node: nodes.AssignBlock, *args: Any, **given: Any) -> NoReturn:
        """`{% set x %}…{% endset %}` gives plain text of which nothing could be told any more."""
        raise Touched("set block")


class Probing(Sandbox):
    """The sandbox, in which arithmetic on stand-ins raises Touched, and text made by a call is a stand-in again."""

    intercepted_binops = frozenset({"**", "*", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of the intercepted operations."""
        if _holds_opaque(left) or _holds_opaque(right):
            raise Touched(operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **given: Any) -> Any:
        """A macro, a method or a function; macros give plain text, whatever was output in them."""
        found = super().call(context, function, *args, **given)
        if type(found) is str and OPEN in found:
            only = SLOT.fullmatch(found)
            guards = GUARDS.get()
            return Opaque.of(int(only[1]), guards, only[2]) if only else Opaque(found, None, AS_IS, guards)
        return found


@cache
def probing_environment() -> jinja2.Environment:
    """The templates' environment, in which filters and tests that would look into a stand-in raise `Touched`."""
    made = Probing(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    plain = environment()
    made.globals.update(plain.globals)
    blind = {"trim", "string", "length", "count", "list", "first", "last", "reverse", "default", "d"}
    for name, use in plain.filters.items():
        made.filters[name] = _of_stand_ins(use) if name in blind else _guarded(name, use)
    types = {
        "string",
        "none",
        "defined",
        "undefined",
        "mapping",
        "number",
        "boolean",
        "integer",
        "float",
        "true",
        "false",
    }
    for name, use in plain.tests.items():
        made.tests[name] = use if name in types else _guarded(name, use)
    for name in ("iterable", "sequence"):
        made.tests[name] = _of_text(plain.tests[name])
    return made


def _guarded(name: str, use: Any) -> Any:
    """`use`, which raises Touched when a stand-in is among its arguments."""

    @functools.wraps(use)
    def asked(*args: Any, **given: Any) -> Any:
        if _holds_opaque(list(args)) or _holds_opaque(given):
            raise Touched(name)
        return use(*args, **given)

    return asked


def _of_stand_ins(use: Any) -> Any:
    """A filter that may be given stand-ins, and must not be given plain text that holds one."""

    @functools.wraps(use)
    def asked(*args: Any, **given: Any) -> Any:
        if any(type(value) is str and OPEN in value for value in args):
            raise Touched("filter")
        return use(*args, **given)

    return asked


def _of_text(use: Any) -> Any:
    def asked(value: Any) -> Any:
        return True if isinstance(value, Opaque) else use(value)

    return asked


class Probe(ChatTemplate):
    """A chat template whose renderings may hold stand-ins."""

    def _compiled(self, source: str) -> jinja2.Template:
        return _compiled(source)


@cache
def _compiled(source: str) -> jinja2.Template:
    with Limits():
        made = probing_environment()
        return made.from_string(_Joins().visit(made.parse(source)))
