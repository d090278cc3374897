"""Writes the tables of model families in docs/models.md, from the family files themselves.

python docs/families.py            writes the tables into the page
python docs/families.py --check    exits with 1 when the page is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.registry import resolve

PAGE = Path(__file__).resolve().parent / "models.md"
BEGIN, END = "<!-- families: written by docs/families.py -->\n", "<!-- end of families -->\n"


def tables() -> str:
    """What is adapted, then what else is known, a row for each family."""
    known: list[Family] = [resolve("family", name, FAMILIES) for name in FAMILIES]
    lines = ["| family | `model_type` | attention | feed-forward | routed experts | never |", "|---" * 6 + "|"]
    lines += [
        _row(
            f"`{one.name}`: {_about(one)}",
            _code(one.model_types),
            _targets(one, one.attention),
            _targets(one, one.mlp),
            _code(one.experts),
            _code(one.never),
        )
        for one in known
    ]
    lines += ["", "## What else is known", ""]
    lines += [
        "`layers` are what FSDP wraps, `blocks of experts` what DeepSpeed must gather whole (its ZeRO-3 leaf modules).",
        "Stop tokens, reasoning, tools and licences are told for a first look, and nothing is computed from them: what",
        "a run stops at is read from the base itself, and a base's own licence binds. A test holds those of Llama,",
        "Qwen, DeepSeek, GLM-4.5, gpt-oss, Gemma and Phi-3 against the templates that TRL ships.",
        "",
        "| family | experts in files | layers | blocks of experts | stop tokens | reasoning | tools | tied | licence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _row(
            f"`{one.name}`",
            _stored(one),
            _code(one.layers),
            _code(one.moe_blocks),
            _code(one.stop),
            _prose(one.thinking),
            _prose(one.tools),
            one.tied,
            one.licence,
        )
        for one in known
    ]
    return "\n".join(lines) + "\n"


def _about(family: Family) -> str:
    """The first line of the family's file."""
    module = sys.modules[f"finetune.families.{family.name}"]
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _targets(family: Family, names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`?" if name in family.optional else f"`{name}`" for name in names)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _prose(text: str) -> str:
    """Text with tags shown rather than taken for HTML."""
    return text.replace("<", "&lt;")


def _stored(family: Family) -> str:
    if not family.experts:
        return ""
    return _code(part for name in family.experts for part in family.stored.get(name, (name,)))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def renewed(page: str) -> str:
    """The page with the tables between their marks replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{tables()}{END}{after}"


def main(words: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    fresh = renewed(page)
    if "--check" in words:
        print("up to date" if page == fresh else f"{PAGE} is not up to date; run: python docs/families.py")
        return int(page != fresh)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
