"""What files call the weights of a model: routed experts are one parameter in memory, mostly many tensors on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from finetune.families.family import Family
from finetune.model.kinds import ends
from finetune.model.update import Update


def on_disk(updates: dict[str, Update], names: Collection[str], family: Family | None) -> dict[str, Update]:
    """The updates by the names that tensors have in the base's files.

    One whose tensors the files lack keeps its name in memory, so that a merge can say what it does not find.

    Args:
        updates: by the name in memory, from `read_adapter`.
        names: of all tensors in the files.
        family: the base's family; None when no file knows it, and names are taken as they are.
    """
    found: dict[str, Update] = {}
    for name, update in updates.items():
        if update.a.dim() == 3:
            found |= _experts(name, update, names, family)
        else:
            found[_renamed(name, names, family)] = update
    return found


def _renamed(name: str, names: Collection[str], family: Family | None) -> str:
    for in_memory, in_files in family.renamed if family is not None else ():
        other = name.replace(in_memory, in_files, 1)
        if name not in names and other in names:
            return other
    return name


def _experts(name: str, update: Update, names: Collection[str], family: Family | None) -> dict[str, Update]:
    """An update of all experts of a layer: as it is, or for each expert and each part of what memory holds as one."""
    if name in names:
        return {name: replace(update, transposed=family is not None and family.transposed)}
    end = next((end for end in (family.stored if family is not None else ()) if ends(name, (end,))), None)
    if family is None or end is None:
        return {name: update}
    parts = family.stored[end]
    rows = update.b.shape[1] // len(parts)
    found: dict[str, Update] = {}
    for number in range(update.a.shape[0]):
        for place, part in enumerate(parts):
            tensor = name.removesuffix(end) + part.replace("*", str(number))
            if tensor not in names:
                return {name: update}
            b = update.b[number, place * rows : (place + 1) * rows]
            found[tensor] = replace(update, a=update.a[number], b=b)
    return found
