"""What to say about a key that its section does not have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune.recipe import fields
from finetune.recipe.foreign import ForeignName, foreign, table
from finetune.recipe.suggest import NEAR, cost, distance, nearest_keys

_SECRET = re.compile(r"(^|_)(token|api_?key|access_?key|secret|secret_?key|password|passwd|credentials?)$")
_NOT_SECRET = re.compile(r"(^|_)(pad|eos|bos|unk|sep|cls|mask|image|audio|video|special|end|start|stop)_token$")
_ELSEWHERE = 0.12
"""How much nearer a key of another section must be to be offered before one of the same section."""
_NEAR_FOREIGN = 0.15
"""How near a name of another tool must be to be recognised through a misspelling."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What to tell, and the keys that were offered, best first."""

    message: str
    keys: tuple[str, ...] = ()


def is_secret(name: str) -> bool:
    """Whether a key of this name would hold a secret, whose value must not be written or shown."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return bool(_SECRET.search(name)) and not _NOT_SECRET.search(name)


def unknown_key(section: str, name: str) -> Answer:
    """Explain a key that `section` (empty for the top level) does not have.

    In order: a secret; a name of another tool; a key of another section; the nearest key; the keys there are.
    """
    if is_secret(name):
        return Answer("a recipe holds no secrets: remove it and set an environment variable (HF_TOKEN, WANDB_API_KEY)")
    homes = [home for home in fields.homes(name) if home != section]
    row = foreign(name)
    if row is not None and row.key.rsplit(".", 1)[-1] != name:
        return Answer(f"unknown key, {row.answer()}", (row.key,) if row.key else ())
    if homes:
        return _belongs(name, homes)
    offered = suggest_key(section, name)
    if offered:
        return Answer(f"unknown key; did you mean {offered[0]}?", tuple(offered))
    row = _nearest_foreign(name.lower())
    if row is not None:
        return Answer(f"unknown key; if it means {row.name}, {row.answer()}", (row.key,) if row.key else ())
    extra = "; an argument of TRL's SFTConfig goes under training.extra" if section == "training" else ""
    place = f"{section} has" if section else "a recipe has"
    return Answer(f"unknown key; {place} {', '.join(fields.names(section))}{extra}")


def suggest_key(section: str, name: str) -> list[str]:
    """The dotted keys that `name`, written in `section`, may have been meant to be, best first."""
    here = nearest_keys(name, fields.names(section))
    found = [f"{section}.{key}" if section else key for key in here]
    if here and cost(name, here[0]) <= _ELSEWHERE:
        return found
    best = cost(name, here[0]) - _ELSEWHERE if here else NEAR - _ELSEWHERE
    others: list[tuple[float, int, str]] = []
    for index, (home, model) in enumerate(fields.sections().items()):
        if home == section or (home.endswith("[]") and not section.endswith("[]") and not home.startswith(section)):
            continue
        others += [
            (cost(name, key), index, f"{home}.{key}" if home else key)
            for key in model.model_fields
            if cost(name, key) < best
        ]
    return [key for _, _, key in sorted(others)][:3] + found


def owned_by_recipe(name: str) -> Answer | None:
    """Why a name may not stand under training.extra: a field, or this toolkit, decides it. None when it may."""
    if is_secret(name):
        return unknown_key("training", name)
    row = foreign(name)
    if row is not None:
        if row.key == f"training.extra.{name}":
            return None
        return Answer(f"may not stand in training.extra, {row.answer()}", (row.key,) if row.key else ())
    homes = fields.homes(name)
    if homes:
        offered = [f"{home}.{name}" if home else name for home in homes]
        return Answer(f"may not stand in training.extra; write {' or '.join(offered)}", tuple(offered))
    return None


def _nearest_foreign(name: str) -> ForeignName | None:
    """The row of another tool's name that is a slip or two away, or None."""
    best, found = _NEAR_FOREIGN, None
    for other, row in table().items():
        longest = max(len(name), len(other))
        if abs(len(name) - len(other)) <= best * longest and (share := distance(name, other) / longest) <= best:
            best, found = share, row
    return found


def _belongs(name: str, homes: list[str]) -> Answer:
    offered = [f"{home}.{name}" if home else name for home in homes]
    if "" in homes:
        return Answer(f"belongs at the top level, not under a section: {name}", (name,))
    whole = [home for home in homes if not home.endswith("[]")]
    if not whole:
        return Answer(f"belongs under a source: {', or '.join(offered)}", tuple(offered))
    kept = [f"{home}.{name}" for home in whole]
    return Answer(f"belongs under {' or '.join(whole)}: {', or '.join(kept)}", tuple(kept))
