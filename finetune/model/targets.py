"""Which layers get an adapter: the recipe's words, resolved to full names on the model that was built.

PEFT accepts names that match nothing and matches others in part, so every word is held against the model here, and one
that means nothing is an error with the nearest names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.model.kinds import Place, ends, is_elsewhere, is_steering, places
from finetune.recipe.sections import AdapterOptions
from finetune.registry import nearest

GROUPS = ("attention", "mlp", "experts", "all-linear", "auto")
_KINDS_OF = {"attention": ("attention",), "mlp": ("mlp", "shared_expert"), "experts": ("experts",)}
_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")


@dataclass(frozen=True)
class Targets:
    """What gets an adapter.

    Attributes:
        modules: full names of linear layers, as `model.named_modules` gives them.
        parameters: full names of fused experts, as `model.named_parameters` gives them.
        assumed: what was assumed where no family file knows the model; empty otherwise.
        lost: how many matrices of such an adapter plain PEFT loses when it opens it.
        loses: the same in words; empty where it loses none.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    assumed: str = ""
    lost: int = 0
    loses: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.modules + self.parameters

    def short(self) -> tuple[str, ...]:
        """What to call them in a sentence and in a recipe: leaf names, fused experts with their parent's."""
        fused = {".".join(name.rsplit(".", 2)[-2:]) for name in self.parameters}
        return (*sorted({leaf(name) for name in self.modules}), *sorted(fused))


def leaf(name: str) -> str:
    """The last part of a full name."""
    return name.rsplit(".", 1)[-1]


def resolve_targets(model: PreTrainedModel, options: AdapterOptions, family: Family | None) -> Targets:
    """What `adapter.target_modules` and `adapter.layers_to_transform` mean on this model.

    Args:
        model: the built base, real or on the meta device.
        options: the adapter section.
        family: the model's family; None when no file knows it.

    Raises:
        ModelError: a word, name, pattern or layer matches nothing that can carry an adapter.
    """
    found = places(model, family)
    words = options.target_modules if isinstance(options.target_modules, tuple) else (options.target_modules,)
    chosen: set[str] = set()
    faults: list[str] = []
    for word in words:
        try:
            chosen |= _group(word, found, family) if word in GROUPS else _named(word, found)
        except LookupError as fault:
            faults.append(str(fault.args[0]))
    if faults:
        raise ModelError("adapter.target_modules: " + "; ".join(faults))
    kept = _only_layers([place for place in found if place.name in chosen], found, options)
    modules = tuple(place.name for place in kept if not place.fused)
    parameters = tuple(place.name for place in kept if place.fused)
    targets = Targets(modules, parameters)
    if family is None and any(word in GROUPS and word != "all-linear" for word in words):
        kind = model.config.model_type
        said = f"no family file knows model type {kind!r}; adapting every {', '.join(targets.short())}"
        return Targets(modules, parameters, said)
    return targets


def _group(word: str, found: list[Place], family: Family | None) -> set[str]:
    """The full names that a group stands for.

    Raises:
        LookupError: with what is wrong, when the model has no such layers or the family does not fit.
    """
    linear = [p for p in found if p.adaptable and p.kind != "router" and not is_elsewhere(p.name)]
    if family is None:
        linear = [p for p in linear if not is_steering(p.name)]
    never = family.never if family is not None else ()
    if word == "all-linear":
        return {place.name for place in linear if not place.fused and not ends(place.name, never)}
    kinds = sum(_KINDS_OF.values(), ()) if word == "auto" else _KINDS_OF[word]
    if family is None:
        names = {place.name for place in linear if place.kind in kinds or (word == "auto" and place.kind == "other")}
    else:
        ours = {"attention": family.attention, "mlp": family.mlp, "experts": family.experts}
        wanted = sum(ours.values(), ()) if word == "auto" else ours[word]
        names = {place.name for place in linear if _belongs(place, kinds, wanted, never)}
        lost = [end for end in wanted if end not in family.optional and not any(ends(name, (end,)) for name in names)]
        if lost and names:
            raise LookupError(f"{word} of family {family.name}: {_unknown(lost[0], found)}; write model.family: auto")
    if not names:
        has = [kind for kind in _KINDS_OF if any(place.kind in _KINDS_OF[kind] for place in linear)]
        own = sorted({p.what for p in found if p.what.endswith("Linear") and not p.adaptable and p.kind != "head"})
        hint = f"; its {', '.join(own)} layers have a product of their own, which LoRA does not follow" if own else ""
        raise LookupError(
            f"{word!r} means no layer of this model; it has {', '.join(has) or 'none of the groups'}{hint}"
        )
    return names


def _belongs(place: Place, kinds: tuple[str, ...], wanted: tuple[str, ...], never: tuple[str, ...]) -> bool:
    return place.kind in kinds and ends(place.name, wanted) and not ends(place.name, never)


def _named(word: str, found: list[Place]) -> set[str]:
    """The full names that a name, the end of one, or a regular expression means.

    Raises:
        LookupError: with what is wrong.
    """
    if _REGEX.search(word):
        return _matching(word, found)
    hits = [place for place in found if ends(place.name, (word,))]
    plain = [place for place in hits if not place.fused]
    hits = plain or hits  # `down_proj` is a layer where there is one; fused experts are `experts.down_proj`
    if not hits:
        inside = [place for place in found if f".{word}." in f".{place.name}."]
        if inside:
            raise LookupError(
                f"{word!r} holds {', '.join(sorted({leaf(place.name) for place in inside}))} and is no layer itself; "
                "name the layers"
            )
        raise LookupError(_unknown(word, found))
    for place in hits:
        if place.kind == "head":
            raise LookupError(f"{word!r} is the output head, which is not adapted: many models share it with the input")
        if not place.adaptable:
            raise LookupError(f"{word!r} matches {place.name}, a {place.what}; only linear layers are adapted")
    return {place.name for place in hits}


def _matching(pattern: str, found: list[Place]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise LookupError(f"{pattern!r} is no regular expression: {error}") from error
    names = {place.name for place in found if place.adaptable and compiled.fullmatch(place.name)}
    if not names:
        example = next((place.name for place in found if place.adaptable), "")
        raise LookupError(f"{pattern!r} matches no whole name of a layer, as {example}")
    return names


def _unknown(word: str, found: list[Place]) -> str:
    """What to say of a name that no layer has."""
    linear = sorted({leaf(place.name) for place in found if place.adaptable and not place.fused})
    fused = sorted({".".join(place.name.split(".")[-2:]) for place in found if place.fused})
    if fused and leaf(word) in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
        return f"{word!r} matches no module: the experts of this model are fused ({', '.join(fused)}); write experts"
    near = nearest(leaf(word), linear + list(GROUPS), 1)
    hint = f"; did you mean {near[0]!r}?" if near else f" (linear layers: {', '.join(linear)})"
    return f"{word!r} matches no module{hint}"


def layer_of(name: str) -> int | None:
    """The number of the layer that a full name lies in; None outside of layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def _only_layers(chosen: list[Place], found: list[Place], options: AdapterOptions) -> list[Place]:
    """Those of `chosen` in the layers that the recipe names; each number must hold at least one."""
    if not options.layers_to_transform:
        return chosen
    last = max((layer_of(place.name) or 0 for place in found), default=0)
    wanted: set[int] = set()
    for part in options.layers_to_transform:
        first, _, end = str(part).partition("-")
        numbers = range(int(first), int(end or first) + 1)
        if numbers[-1] > last:
            raise ModelError(f"adapter.layers_to_transform: {part} is beyond the model's layers, 0 to {last}")
        wanted |= set(numbers)
    if empty := sorted(wanted - {layer_of(place.name) for place in chosen}):
        some = ", ".join(map(str, empty[:5]))
        raise ModelError(
            f"adapter.layers_to_transform: layer {some} has none of the layers that adapter.target_modules means"
        )
    return [place for place in chosen if layer_of(place.name) in wanted]


def check_patterns(targets: Targets, key: str, patterns: Iterable[str]) -> None:
    """Every pattern of rank_pattern or alpha_pattern matches a target, as PEFT will match it.

    Raises:
        ModelError: one matches none, or is no regular expression.
    """
    for pattern in patterns:
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ModelError(f"adapter.{key}: {pattern!r} is no regular expression: {error}") from error
        if not any(compiled.match(name) for name in targets.names):
            near = nearest(leaf(pattern), [leaf(name) for name in targets.short()], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(targets.short())})"
            raise ModelError(f"adapter.{key}: {pattern!r} matches nothing that gets an adapter{hint}")
