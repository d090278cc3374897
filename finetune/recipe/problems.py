"""Every problem of a recipe, told in one error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune.errors import RecipeError
from finetune.recipe.origin import Origin

SHOWN = 50
"""Problems printed before the rest is only counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: where it stands, which key it is about, what is wrong and what to do."""

    origin: Origin
    key: str
    message: str

    def __str__(self) -> str:
        """The line a user reads."""
        return ": ".join(part for part in (str(self.origin), self.key, self.message) if part)

    def to_json(self) -> dict[str, Any]:
        """The same as a mapping for `--json`."""
        return {
            "source": self.origin.source,
            "line": self.origin.line,
            "column": self.origin.column,
            "key": self.key,
            "message": self.message,
        }


class RecipeProblems(RecipeError):
    """A recipe with at least one problem; `problems` holds all of them in the order of the files."""

    def __init__(self, problems: Iterable[Problem], files: Iterable[str] = ()) -> None:
        self.problems = in_order(problems, files)
        assert self.problems, "an error without a problem"
        lines = [str(problem) for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"... and {len(self.problems) - SHOWN} more problems")
        super().__init__("\n".join(lines))


def in_order(problems: Iterable[Problem], files: Iterable[str] = ()) -> tuple[Problem, ...]:
    """Sorted by place and without repetition: `files` in their order, other sources (overrides) after them."""
    rank = {name: index for index, name in enumerate(files)}
    unique = list(dict.fromkeys(problems))
    sources = list(dict.fromkeys(problem.origin.source for problem in unique))
    order = {name: (rank.get(name, len(rank)), sources.index(name)) for name in sources}
    return tuple(sorted(unique, key=lambda p: (order[p.origin.source], p.origin.line or 0, p.origin.column or 0)))
