"""May a run go on, and from where? The newest whole checkpoint, if the run is still made of the same things.

What a run is made of stands in every checkpoint's manifest: the keys of the recipe that count, and what they led to
(rows, template, tokenizer, base, versions, processes). A checkpoint of other things would go on to a product that no
recipe describes, so a difference is refused, with all of them listed; `--allow-drift` accepts them by name, and then
the new values count from that step on.

No torch: keys are compared before anything heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.errors import RecipeError, RefusedError
from finetune.files import MANIFEST, read_sealed
from finetune.privacy import mask
from finetune.recipe import fields
from finetune.registry import nearest
from finetune.run.folder import RunFolder, read_json
from finetune.run.record import STACK

# Keys that leave the weights alone, or whose effect is compared by its own hash: rows, base, processes, device.
_NEUTRAL = re.compile(
    r"output_dir|(tracking|evaluate|export|audit)\..*|launch\..*|data\.(cache_dir|num_proc|on_bad_row)"
    r"|data\.(train|validation)\[\d+\]\.(path|name|revision|split)|model\.(name_or_path|revision|trust_remote_code)|adapter\.continue_from"
    r"|training\.(logging_steps|eval_steps|per_device_eval_batch_size|save_steps|save_total_limit|on_save_error)"
)
_SHAPE = "the saved weights have another shape"
_PLACE = "the place in the data is counted in steps of this size"
_STATE = "the saved optimizer state is another one's"
# What cannot be accepted, and why.
_FIXED = {
    "adapter.method": _SHAPE, "adapter.r": _SHAPE, "adapter.rank_pattern": _SHAPE, "adapter.target_modules": _SHAPE,
    "adapter.layers_to_transform": _SHAPE, "adapter.modules_to_save": _SHAPE, "adapter.trainable_token_indices": _SHAPE,
    "adapter.init_lora_weights": "the adapter began from other weights, and the base with it",
    "derived.adapter.target_modules": _SHAPE, "training.global_batch_size": _PLACE, "training.optim": _STATE,
    "training.method": _STATE,
}  # fmt: skip
WHOLE = "every process holds the whole state"  # as against shards of it

# What `found` holds, by the first part of its names.
_FOUND = ("data", "base", "template", "tokenizer", "versions", "world_size", "parallelism", "device", "derived",
          "continued_from")  # fmt: skip


@dataclass(frozen=True)
class Drift:
    """Something that a run is made of and that has changed."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.old)} → {_short(self.new)}"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        checkpoint: the newest whole one; None to start at the beginning.
        passed_over: why newer ones were not taken.
        accepted: what has changed since it was written, and was accepted.
    """

    checkpoint: str | None
    passed_over: tuple[str, ...] = ()
    accepted: tuple[Drift, ...] = ()

    @property
    def step(self) -> int:
        """The optimizer steps that are done."""
        return int(self.checkpoint.rsplit("-", 1)[-1]) if self.checkpoint else 0


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def counting_keys(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a resolved recipe that decide what its weights become, dotted, with secrets masked."""
    flat: dict[str, Any] = {}
    for section, value in mask(resolved).items():
        _spread(section, value, flat)
    return {name: value for name, value in flat.items() if not _NEUTRAL.fullmatch(name)}


def _spread(name: str, value: Any, flat: dict[str, Any]) -> None:
    inner = isinstance(value, dict) and (name in fields.sections() or "[" in name or name == "training.extra")
    if inner:
        for key, item in value.items():
            _spread(f"{name}.{key}", item, flat)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            _spread(f"{name}[{number}]", item, flat)
    else:
        flat[name] = value


def drifts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Drift]:
    """What differs between two mappings of names; a key that is new and has its default differs in nothing."""
    changed = []
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        known = fields.known_keys().get(re.sub(r"\[\d+\]", "[]", name))
        added = name not in before and known is not None and new == fields.plain(known.default)
        if old != new and not added:
            changed.append(Drift(name, old, new))
    return changed


def _is_named(drift: Drift, names: Collection[str]) -> bool:
    """Whether one of the names is the key's own, its last word, or one above it."""
    plain = re.sub(r"\[\d+\]", "", drift.name)
    parents = {plain[: match.start()] for match in re.finditer(r"\.", plain)}
    return bool({drift.name, plain, plain.rsplit(".", 1)[-1], *parents} & set(names))


def _why_fixed(drift: Drift, fixed: Collection[str]) -> str:
    """Why a difference cannot be accepted; nothing where it can."""
    if drift.name in _FIXED:
        return _FIXED[drift.name]
    if drift.name == "adapter.loraplus_lr_ratio" and None in (drift.old, drift.new):
        return "the saved optimizer state has other groups of parameters"  # from ratio to ratio they stay
    return "the optimizer's state is tied to it" if drift.name in fixed else ""


def check_names(names: Sequence[str]) -> None:
    """Compare what `--allow-drift` names with what can drift.

    Raises:
        RecipeError: a name that nothing has.
    """
    keys = [re.sub(r"\[\]", "", key) for key in fields.known_keys()]
    known = {*keys, *(key.rsplit(".", 1)[-1] for key in keys), *fields.sections(), *_FOUND} - {""}
    known |= {"data.rows", "data.validation_rows", *(f"versions.{name}" for name in ("python", "finetune", *STACK))}
    for name in names:
        plain = re.sub(r"\[\d+\]", "", name)
        above = any(key.startswith(f"{plain}.") for key in known)
        if plain not in known and not above and not name.startswith(("base.", "derived.", "training.extra.")):
            near = nearest(name, sorted(known), 1)
            hint = f"did you mean {near[0]}?" if near else "name a key of the recipe, or one of " + ", ".join(_FOUND)
            raise RecipeError(f"--allow-drift: nothing is called {name!r}; {hint}")


def accept(
    changed: Sequence[Drift], folder: RunFolder, allowed: Collection[str], fixed: Collection[str] = ()
) -> tuple[Drift, ...]:
    """Let pass what was allowed, now or when the run last went on.

    Args:
        changed: from `drifts`.
        folder: the run's.
        allowed: the names of `--allow-drift`.
        fixed: more names that cannot be accepted.

    Raises:
        RefusedError: with every difference that was not.
    """
    recorded = [entry for resumed in read_json(folder.record).get("resumed", []) for entry in resumed["accepted"]]
    lines, wanted = [], []
    for drift in changed:
        why = _why_fixed(drift, fixed)
        if why:
            lines.append(f"  {drift} (cannot be accepted: {why})")
        elif not _is_named(drift, allowed) and asdict(drift) not in recorded:
            lines.append(f"  {drift}")
            wanted.append(re.sub(r"\[\d+\]", "", drift.name))
    if lines:
        names = ",".join(dict.fromkeys(name.split(".")[0] if name.startswith("base.") else name for name in wanted))
        last = f", or accept it: --allow-drift {','.join(filter(None, [*allowed, names]))}" if wanted else ""
        raise RefusedError(
            f"output_dir: the run in {folder.root} was made of other things than this command names:\n"
            + "\n".join(lines)
            + f"\nUndo the change, choose another output_dir, pass --overwrite to train again{last}"
        )
    return tuple(changed)


def made_before(folder: RunFolder) -> dict[str, Any]:
    """What the newest checkpoint whose manifest is whole says that the run was made of; else what run.json says."""
    for path in folder.newest_first():
        if made_of := read_sealed(path).get("made_of"):
            return dict(made_of)
    return dict(read_json(folder.record).get("made_of") or {})


def check_keys(folder: RunFolder, resolved: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Compare the recipe's keys with those of the unfinished run in `folder`, before anything is loaded.

    Raises:
        RefusedError: they differ, and that was not allowed; or the run is of a version that kept no keys.
    """
    before = made_before(folder)
    if "recipe" not in before:
        raise RefusedError(
            f"output_dir: {folder.root} holds a run of another recipe; choose another output_dir, or pass --overwrite "
            "to remove that run"
        )
    accept(drifts(before["recipe"], counting_keys(resolved)), folder, allowed)


def find(folder: RunFolder, made_of: Mapping[str, Any], allowed: Collection[str]) -> ResumePoint:
    """Verify the newest checkpoints of an unfinished run until one is whole, and compare what it is made of.

    Args:
        folder: the run's.
        made_of: `recipe` and `found`, as of now.
        allowed: the names of `--allow-drift`.

    Raises:
        RefusedError: it is made of other things, and that was not allowed.
    """
    newest, passed_over = folder.newest_checkpoint()
    manifest = read_json(newest / MANIFEST) if newest else read_json(folder.record)
    before = manifest.get("made_of", {})
    changed = [drift for part in ("recipe", "found") for drift in drifts(before.get(part, {}), made_of[part])]
    accepted = accept(changed, folder, allowed, manifest.get("bound", ()))
    return ResumePoint(str(newest) if newest else None, tuple(passed_over), accepted)


def refuse_overrun(point: ResumePoint, steps: int, folder: RunFolder) -> None:
    """A run that has made more steps than its recipe now asks for cannot become what the recipe says.

    Args:
        point: where it would go on.
        steps: optimizer steps of the whole run.
        folder: the run's.

    Raises:
        RefusedError: there are more behind it.
    """
    if point.step > steps:
        raise RefusedError(
            f"output_dir: the run in {folder.root} has made {point.step} steps, and this recipe asks for {steps}, by "
            "training.max_steps, or by training.num_train_epochs and the rows; it cannot become one of so few. "
            f"Ask for {point.step} or more, choose another output_dir, or pass --overwrite to train again"
        )
