"""What files call the weights of a model that no family file knows: read from transformers' own table of conversions.

The table says how names in files become names in memory when a model is loaded. Here it is applied to the names of one
base, which gives the facts about files that a family states otherwise; each of them is checked against every name.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
)

from finetune.families.family import Family
from finetune.model.layout import name_on_disk

_EXPERT = re.compile(r"(?P<module>.*)\.\d+\.(?P<ending>[^.]+\.weight)")
_LAYER = re.compile(r".*\.\d+\.")


def layout_of(model: PreTrainedModel, names: Collection[str]) -> Family | None:
    """The facts about files of a base, as a family states them; None where the table has nothing to say of them.

    Args:
        model: the bare model, real or on the meta device.
        names: of all tensors in the base's files.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    # What PEFT goes by (ParamWrapper), and what transformers' products of experts are made for.
    transposed = any(bool(getattr(module, "is_transposed", False)) for module in model.modules())
    if not transforms and not transposed:
        return None
    model_type = str(model.config.model_type)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamed: dict[tuple[str, str], None] = {}
    stored: dict[str, tuple[str, ...]] = {}
    plain: dict[str, str] = {}
    for name in names:
        called = apply_renamings(name, renamings)
        in_memory, pattern = apply_converters(called, converters)
        if called != name:
            renamed[_difference(called, name)] = None
        if pattern is None:
            plain[name] = called
        elif parts := _parts(called, in_memory, pattern, converters):
            stored |= parts
    found = Family(
        name=model_type,
        model_types=(model_type,),
        attention=(),
        mlp=(),
        licence="Not known.",
        experts=tuple(key for key in stored if not key.endswith(".weight")),  # the others are dense layers
        stored=stored,
        renamed=tuple(renamed),
        transposed=transposed,
    )
    if any(name_on_disk(called, names, found) != name for name, called in plain.items()):
        return replace(found, experts=(), stored={}, renamed=()) if transposed else None
    return found


def _difference(in_memory: str, in_files: str) -> tuple[str, str]:
    """The parts in which two names differ, with the one behind where nothing stands in the place of the other."""
    ours, theirs = in_memory.split("."), in_files.split(".")
    start = 0
    while start < min(len(ours), len(theirs)) and ours[start] == theirs[start]:
        start += 1
    end = 0
    while end < min(len(ours), len(theirs)) - start and ours[-1 - end] == theirs[-1 - end]:
        end += 1
    if start + end == min(len(ours), len(theirs)) and end:
        end -= 1
    return ".".join(ours[start : len(ours) - end]), ".".join(theirs[start : len(theirs) - end])


def _parts(called: str, in_memory: str, pattern: str, converters: list[WeightConverter]) -> dict[str, tuple[str, ...]]:
    """What files call the parts of a weight that is their rows above each other, for each expert where files number
    them; empty where it is put together another way.
    """
    converter = next(one for one in converters if pattern in one.source_patterns)
    endings = tuple(one.replace("\\", "").rsplit("*.", 1)[-1].lstrip(".") for one in converter.source_patterns)
    operations = list(converter.operations)
    module, leaf = in_memory.rsplit(".", 1)
    if isinstance(operations[0], MergeModulelist):
        numbered = _EXPERT.fullmatch(called)
        if numbered is None or numbered["module"] != module or numbered["ending"] not in endings:
            return {}
        del operations[0]
        above, key = 1, f"{_LAYER.sub('', module)}.{leaf}"
        parts = tuple(f"{_LAYER.sub('', module)}.*.{ending}" for ending in endings)
    else:
        ending = next((one for one in endings if called.endswith(f".{one}")), None)
        start = _LAYER.match(called)
        if ending is None or start is None or not in_memory.startswith(start[0]):
            return {}
        above, key = 0 if leaf == "weight" else 1, in_memory.removeprefix(start[0])
        parts = tuple(called.removeprefix(start[0]).removesuffix(ending) + one for one in endings)
    stacked = len(operations) == 1 and isinstance(operations[0], Concatenate) and operations[0].dim == above
    return {key: parts} if stacked or (not operations and len(endings) == 1) else {}
