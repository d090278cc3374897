"""Which weights are quantised and which stay whole, what each takes, and the record that a merge replays.

Attention, feed-forward blocks and experts are quantised. Routers, norms, embeddings, heads, and the small layers that a
family file leaves alone (gates of one output, indexers) are not: they are next to nothing of the memory, and what they
decide is decided for whole tokens. bitsandbytes left to itself would quantise Hunyuan's router and every gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.model.kinds import KINDS, Place, ends, is_elsewhere, is_packed, is_steering, places
from finetune.model.stored import Stored

# Linear layers as files have them; a subclass has reasons of its own, and bitsandbytes leaves it alone as well.
_LINEAR = "Linear"
# Of these transformers quantises the transpose, and what bitsandbytes makes of it is told from a linear layer no more:
# neither a merge nor a start from the files' weights would know that files hold it the other way round.
_TRANSPOSED = "Conv1D"
_WHOLE = ("router", "norm", "embedding", "head")
_NAMES = {"shared_expert": "shared experts", "mlp": "feed-forward"}
_BLOCK, _SCALES = 64, 256  # weights to a scale, scales to a scale of scales: bitsandbytes' own sizes


@dataclass(frozen=True)
class Quantised:
    """How a base is held, for the files of an adapter.

    Attributes:
        kind: "nf4" or "int8".
        compute_dtype: what weights were read in before they were quantised, by torch's name.
        modules: full names of the linear layers in 4 or 8 bits.
        experts: full names of the parameters of routed experts in 4 bits, each expert quantised by itself.
    """

    kind: str
    compute_dtype: str
    modules: tuple[str, ...]
    experts: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """As finetune.json has them."""
        nf4 = {"quant_type": "nf4", "double_quant": True, "blocksize": _BLOCK, "quant_storage": "uint8"}
        return {
            "kind": self.kind,
            "compute_dtype": self.compute_dtype,
            **(nf4 if self.kind == "nf4" else {}),
            "modules": list(self.modules),
            "experts": list(self.experts),
        }


@dataclass(frozen=True)
class Plan:
    """What a load quantises.

    Attributes:
        kind: "nf4" or "int8".
        modules: full names of linear layers.
        experts: full names of parameters of routed experts.
        skipped: full names of linear layers that stay whole.
    """

    kind: str
    modules: frozenset[str]
    experts: frozenset[str]
    skipped: tuple[str, ...]

    def skip_patterns(self) -> list[str]:
        """`skipped` as transformers' `llm_int8_skip_modules`, which are regular expressions over starts of names."""
        return [re.escape(name) for name in self.skipped]


def plan(model: PreTrainedModel, family: Family | None, kind: str) -> Plan:
    """What a quantisation of this base holds in few bits.

    Args:
        model: the bare base, on the meta device or not.
        family: its family; None when no file knows it.
        kind: "nf4" or "int8".

    Raises:
        ModelError: routed experts that would have to stay whole in an nf4 base, or layers stored transposed.
    """
    from finetune.model.quantise_experts import can_be_packed

    modules, experts, skipped, unpackable, transposed = set(), set(), [], [], []
    for place in places(model, family):
        if place.fused:
            module = model.get_submodule(place.name.rpartition(".")[0])
            if kind == "nf4":
                experts.add(place.name)
                unpackable += [] if can_be_packed(module) else [place]
        elif place.what in (_LINEAR, _TRANSPOSED):
            kept = place.kind in _WHOLE or is_elsewhere(place.name) or _left_alone(place, family)
            if kept or not place.adaptable:
                skipped.append(place.name)
            elif place.what == _TRANSPOSED:
                transposed.append(place.name)
            else:
                modules.add(place.name)
    if transposed:
        raise ModelError(
            f"model.quantization: {kind} cannot hold {transposed[0]} and {len(transposed) - 1} more layers that are "
            f"stored transposed ({_TRANSPOSED}), since a merge could not repeat how they are quantised; write "
            "quantization: none"
        )
    if unpackable:
        size = sum(place.bytes for place in unpackable) / 1e9
        raise ModelError(
            f"model.quantization: nf4 cannot hold {unpackable[0].name} and {len(unpackable) - 1} more parameters of "
            f"routed experts, whose {unpackable[0].what} computes in a way of its own; they would stay whole and take "
            f"{size:.1f} GB. Write quantization: none, which says that they do"
        )
    return Plan(kind, frozenset(modules), frozenset(experts), tuple(skipped))


def refuse_transposed(name: str, model: nn.Module, held: Stored | None) -> None:
    """Refuse a base that bitsandbytes has stored, if it has layers that are stored transposed (GPT-2's).

    transformers quantises the transpose of their weights, in files as well, so that what a merge would write of one has
    its sides exchanged; where they are equal nothing else would show it.

    Args:
        name: of the base, as the recipe has it.
        model: the bare base, on the meta device.
        held: how its files hold its weights, from `stored`.

    Raises:
        ModelError: it has such layers.
    """
    found = [called for called, module in model.named_modules() if type(module).__name__ == _TRANSPOSED]
    if held is not None and not held.dequantised and found:
        raise ModelError(
            f"model.name_or_path: the weights of {name} are stored in {held.name}, and {found[0]} and "
            f"{len(found) - 1} more of its layers are stored transposed ({_TRANSPOSED}), which a merge could not put "
            "back; name the unquantised weights of this model"
        )


def _left_alone(place: Place, family: Family | None) -> bool:
    """Whether a layer steers rather than computes, or kernels take its weight past it; the family says, or its name."""
    return ends(place.name, family.never) if family is not None else is_steering(place.name)


def quantised(model: nn.Module, kind: str, compute_dtype: str) -> Quantised | None:
    """The record of a loaded base; None when nothing of it is quantised.

    Args:
        model: the loaded base.
        kind: "none", "nf4" or "int8".
        compute_dtype: from `Precision.compute`.
    """
    modules = tuple(n for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt"))
    packed: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if is_packed(module)]
    experts = tuple(sorted(f"{name}.{one}" for name, module in packed for one in module.shapes))
    return Quantised(kind, compute_dtype, modules, experts) if modules or experts else None


def as_quantised(found: Iterable[Place], model: PreTrainedModel, planned: Plan | None) -> list[Place]:
    """The places with the bytes they will take once loaded.

    Args:
        found: from `places(model, …)`.
        model: the bare base on the meta device, in the precision of matrix products.
        planned: from `plan`; None when nothing is quantised.
    """
    if planned is None:
        return list(found)
    return [_sized(place, model, planned) for place in found]


def _sized(place: Place, model: PreTrainedModel, planned: Plan) -> Place:
    if place.name in planned.experts:
        from finetune.model.quantise_experts import packed_bytes

        return replace(place, bytes=packed_bytes(model.get_parameter(place.name).shape))
    if place.name not in planned.modules:
        return place
    module: Any = model.get_submodule(place.name)
    rows = module.weight.shape[0]
    whole = module.weight.numel() * module.weight.element_size()
    return replace(place, bytes=place.bytes - whole + layer_bytes(planned.kind, module.weight.numel(), rows))


def layer_bytes(kind: str, numbers: int, rows: int) -> int:
    """What the weight of a linear layer takes.

    Args:
        kind: "nf4": two to a byte, a byte per 64 for its scale, 4 bytes per 256 scales and 4 for their mean; "int8": a
            byte each, and 4 for each row's scale.
        numbers: how many weights.
        rows: outputs of the layer.
    """
    if kind == "int8":
        return numbers + 4 * rows
    blocks = math.ceil(numbers / _BLOCK)
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / _SCALES) + 4


def by_kind(found: Iterable[Place]) -> dict[str, int]:
    """Bytes of each kind of block that the model has."""
    sums: dict[str, int] = {}
    for place in found:
        sums[place.kind] = sums.get(place.kind, 0) + place.bytes
    return sums


def weights_told(found: Iterable[Place], kind: str, dtype: str) -> str:
    """What the weights of a loaded base take, kind by kind, beside what they would take unquantised.

    Args:
        found: the places of the loaded base.
        kind: "nf4" or "int8".
        dtype: what they would be in unquantised, by torch's name.
    """
    width = getattr(torch, dtype).itemsize
    parts, now, before = [], 0, 0
    ordered = list(found)
    for kind_of_block in KINDS:
        ours = [place for place in ordered if place.kind == kind_of_block]
        taken = sum(place.bytes for place in ours)
        whole = sum(max(place.bytes, width * place.parameters) for place in ours)  # some stay in float32 in any case
        now, before = now + taken, before + whole
        if taken:
            parts.append(f"{_NAMES.get(kind_of_block, kind_of_block)} {in_bytes(taken)}" + _of(taken, whole))
    told = f"{in_bytes(now)} in memory, {in_bytes(before)} in {dtype}: {', '.join(parts)}"
    if kind == "int8" and any(place.fused for place in ordered):
        told += "; int8 holds linear layers alone, so the experts stay whole, and quantization: nf4 holds them too"
    return told


def _of(taken: int, whole: int) -> str:
    return f" of {in_bytes(whole)}" if taken != whole else ""


def in_bytes(number: int) -> str:
    """Bytes for a reader."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
