"""What files call the weights of a model: one parameter in memory, as routed experts are, may be many on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from finetune.families.family import Family
from finetune.model.change import Change, Rows, Update
from finetune.model.kinds import ends


def on_disk(changes: dict[str, Change], names: Collection[str], family: Family | None) -> dict[str, Change]:
    """The changes by the names that tensors have in the base's files.

    One whose tensors the files lack keeps its name in memory, so that a merge can say what it does not find.

    Args:
        changes: by the name in memory, from `read_adapter`.
        names: of all tensors in the files.
        family: the base's family; None when no file knows it, and names are taken as they are.
    """
    found: dict[str, Change] = {}
    for name, change in changes.items():
        whole = name_on_disk(name, names, family)
        if whole not in names:
            found |= _in_parts(name, change, names, family)
        elif isinstance(change, Update) and change.a.dim() == 3:
            found[whole] = replace(change, transposed=family is not None and family.transposed)
        else:
            found[whole] = change
    return found


def name_on_disk(name: str, names: Collection[str], family: Family | None) -> str:
    """What files call the tensor that memory calls `name`; `name` itself where they have no such tensor."""
    forms = [name]
    for in_memory, in_files in family.renamed if family is not None else ():
        forms += [form.replace(in_memory, in_files, 1) for form in forms if in_memory in form]
    return next((form for form in forms if form in names), name)


def parts_on_disk(name: str, names: Collection[str], family: Family | None) -> list[tuple[str, ...]]:
    """The tensors of the files that make up the weight called `name` in memory, where that is none of them itself.

    Those whose rows memory holds above each other stand together, in that order: once where files hold all experts of a
    layer in one tensor or the weight is no experts', else for each expert. Empty where files have no such tensors.

    Args:
        name: of a weight in memory.
        names: of all tensors in the files.
        family: the base's family.
    """
    end, stored = _stored(name, family)
    found: list[tuple[str, ...]] = []
    while stored and (_numbered(stored) or not found):
        parts = (name.removesuffix(end) + part.replace("*", str(len(found))) for part in stored)
        group = tuple(name_on_disk(part, names, family) for part in parts)
        if not all(part in names for part in group):
            break
        found.append(group)
    return found


def _stored(name: str, family: Family | None) -> tuple[str, tuple[str, ...]]:
    """The end of a name by which its family knows what files call its parts, and these; empty where it does not."""
    known = family.stored if family is not None else {}
    return next(((end, parts) for end, parts in known.items() if ends(name, (end,))), ("", ()))


def _numbered(parts: tuple[str, ...]) -> bool:
    """Whether files hold each expert's by itself."""
    return any("*" in part for part in parts)


def _in_parts(name: str, change: Change, names: Collection[str], family: Family | None) -> dict[str, Change]:
    """The change of each tensor that makes up the weight called `name`; itself under that name where there is none."""
    groups = parts_on_disk(name, names, family)
    if not groups or isinstance(change, Rows) or (isinstance(change, Update) and change.transposed):
        return {name: change}
    shape = (*change.b.shape[:-1], 0) if isinstance(change, Update) else tuple(change.value.shape)
    numbered = _numbered(_stored(name, family)[1])
    if len(shape) < 2 or shape[-2] % len(groups[0]) or (numbered and len(groups) != shape[0]):
        return {name: change}
    rows = shape[-2] // len(groups[0])
    return {
        tensor: _slice(change, number if numbered else None, slice(place * rows, (place + 1) * rows))
        for number, group in enumerate(groups)
        for place, tensor in enumerate(group)
    }


def _slice(change: Change, expert: int | None, rows: slice) -> Change:
    """What a change does to some rows of a weight: of that of one expert, or of all there is."""
    assert not isinstance(change, Rows)
    if not isinstance(change, Update):
        value = change.value if expert is None else change.value[expert]
        return replace(change, value=value[..., rows, :])
    a, b = (change.a, change.b) if expert is None else (change.a[expert], change.b[expert])
    magnitude = None if change.magnitude is None else change.magnitude[rows]
    under = None if change.under is None else change.under[..., rows, :]
    return replace(change, a=a, b=b[..., rows, :], magnitude=magnitude, under=under)
