"""The tensors of a base as ordinary weights, whatever format its files hold them in; read one at a time.

FP8 (DeepSeek-V3): a number of 8 bits and a scale for each block, or one for the tensor. MXFP4 (gpt-oss): two numbers of
4 bits in a byte, and an exponent for each 32 of them; experts are stored out x in, and are in x out in memory.
bitsandbytes: its own packing, which its own functions undo. Training reads them the same way (model/stored.py), so an
adapter is merged onto what it was trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.errors import ExportError
from finetune.model.folder import Base, safetensors_header
from finetune.model.shard import NAMES, Entry
from finetune.model.stored import facts_of

MERGED = ("fp8", "mxfp4", "bitsandbytes")  # formats, by `quant_method` of config.json, that are read here
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what 3 bits of an MXFP4 number mean; the fourth is the sign
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Held:
    """A tensor that files hold.

    Attributes:
        entry: what it is once it is read.
        parts: what it is made of, as (file, name in it): itself first.
        how: "plain", or one of the formats.
        block: rows and columns that share a scale in FP8; None where the grid of scales tells them.
    """

    entry: Entry
    parts: tuple[tuple[Path, str], ...]
    how: str = "plain"
    block: tuple[int, int] | None = None

    def read(self) -> Tensor:
        """The tensor; float32 where it was dequantised."""
        return _READ[self.how](self)

    def part(self, end: str) -> Tensor:
        """The part whose name ends so."""
        return _load(*next(part for part in self.parts if part[1].endswith(end)))


def tensors_of(base: Base) -> dict[str, Held]:
    """Every tensor of a base's files by its name, in their order; dequantised ones under the names of ordinary weights.

    Raises:
        ExportError: a weight is stored in a way that is not read here.
    """
    where = {name: (path, entry) for path in base.weights for name, entry in safetensors_header(path).items()}
    plain = {
        name: Held(_entry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]), ((path, name),))
        for name, (path, entry) in where.items()
    }
    facts = facts_of(base.config)
    if facts is None:
        return plain
    dtype, block = _own_dtype(base.config), tuple(facts.get("weight_block_size") or ()) or None
    packed: dict[str, Held] = {}
    used: set[str] = set()
    for name in plain:
        for found in (_fp8(name, plain), _mxfp4(name, plain), _bits(name, plain)):
            if found is not None:
                called, shape, names, how = found
                size = math.prod(shape) * dtype.itemsize
                parts = tuple((where[one][0], one) for one in names)
                packed[called] = Held(Entry(NAMES[dtype], shape, size), parts, how, block)
                used.update(names)
    rest = {name: held for name, held in plain.items() if name not in used}
    if odd := [name for name, held in rest.items() if held.entry.dtype.startswith("F8") or held.entry.dtype == "U8"]:
        raise ExportError(
            f"{base.name}: {odd[0]} is stored in a way that no merge reads; merge onto unquantised weights"
        )
    return rest | packed


def _entry(dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> Entry:
    return Entry(dtype, shape, offsets[1] - offsets[0])


def _own_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The precision that a base is loaded in by its config; bfloat16 where that says none."""
    for place in (config, config.get("text_config") or {}):
        named = getattr(torch, str(place.get("dtype") or place.get("torch_dtype")), None)
        if named in NAMES:
            return named
    return torch.bfloat16


# What a tensor is a part of, for each format: the name of the whole, its shape, its parts, and how they are read.
_Found = tuple[str, tuple[int, ...], list[str], str] | None


def _fp8(name: str, plain: Mapping[str, Held]) -> _Found:
    scale = f"{name}_scale_inv"
    if scale not in plain or plain[name].entry.dtype != "F8_E4M3":
        return None
    unused = [one for one in (f"{name.removesuffix('.weight')}.activation_scale",) if one in plain]
    return name, plain[name].entry.shape, [name, scale, *unused], "fp8"


def _mxfp4(name: str, plain: Mapping[str, Held]) -> _Found:
    whole = name.removesuffix("_blocks")
    if whole == name or f"{whole}_scales" not in plain:
        return None
    experts, out, groups, half = plain[name].entry.shape
    return whole, (experts, groups * half * 2, out), [name, f"{whole}_scales"], "mxfp4"


def _bits(name: str, plain: Mapping[str, Held]) -> _Found:
    if (module := name.removesuffix(".SCB")) != name:
        weight = f"{module}.weight"
        form = [one for one in (f"{module}.weight_format",) if one in plain]
        return weight, plain[weight].entry.shape, [weight, name, *form], "int8"
    weight, _, kind = name.partition(_STATE)
    if not kind:
        return None
    shape = tuple(_state_of(_load(*plain[name].parts[0]))["shape"])
    return weight, shape, [weight, *(one for one in plain if one.startswith(f"{weight}."))], "4-bit"


def _state_of(packed: Tensor) -> dict[str, Any]:
    """bitsandbytes' facts about a weight, which it stores as the bytes of a JSON text."""
    return dict(json.loads(bytes(packed.tolist()).decode("utf-8")))


def _load(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _read_fp8(held: Held) -> Tensor:
    numbers, scales = _load(*held.parts[0]).float(), held.part("_scale_inv")
    if scales.is_floating_point() and scales.numel() == 1:  # one for the whole tensor
        return numbers * scales.float().reshape(())
    # A grid over the last two dimensions; in front of them stands the number of the expert, where all are one tensor.
    if scales.is_floating_point() and scales.dim() == numbers.dim() and scales.shape[:-2] == numbers.shape[:-2]:
        fitting = (math.ceil(size / count) for size, count in zip(numbers.shape[-2:], scales.shape[-2:], strict=True))
        rows, columns = held.block or fitting
        whole = scales.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        whole = whole[..., : numbers.shape[-2], : numbers.shape[-1]]
        if whole.shape == numbers.shape:
            return numbers * whole
    kind, name = str(scales.dtype).removeprefix("torch."), held.parts[0][1]
    raise ExportError(
        f"{name}: {tuple(numbers.shape)} numbers in FP8 with {tuple(scales.shape)} scales in {kind}, blocks "
        f"of {held.block or 'no stated size'}, which no merge reads; merge onto unquantised weights"
    )


def _read_mxfp4(held: Held) -> Tensor:
    blocks, exponents = held.part("_blocks"), held.part("_scales")
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
    whole = torch.ldexp(numbers, exponents.int()[..., None] - 127)
    return whole.flatten(-2).mT.contiguous()


def _read_int8(held: Held) -> Tensor:
    return _load(*held.parts[0]).float() * held.part(".SCB").float()[:, None] / 127.0


def _read_4bit(held: Held) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    (_, weight), *others = held.parts
    state = QuantState.from_dict({name.removeprefix(f"{weight}."): _load(path, name) for path, name in others}, "cpu")
    numbers: Tensor = dequantize_4bit(_load(*held.parts[0]), state)
    return numbers.float()


_READ = {
    "plain": lambda held: _load(*held.parts[0]),
    "fp8": _read_fp8,
    "mxfp4": _read_mxfp4,
    "int8": _read_int8,
    "4-bit": _read_4bit,
}
