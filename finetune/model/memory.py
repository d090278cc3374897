"""What loading a base takes of the host's memory in each process, told from the headers of its files."""

from __future__ import annotations

import math

import torch

from finetune.model.folder import Base, safetensors_header
from finetune.model.load import Precision
from finetune.model.skeleton import skeleton
from finetune.model.stored import stored
from finetune.recipe.sections import ModelOptions

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a number that can be trained
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_QUANTISED = {"nf4": 0.5, "int8": 1.0}  # bytes of a weight, without scales


def copied_bytes(options: ModelOptions, base: Base, kept: Precision, in_host: bool) -> int:
    """Bytes that a process needs for the base alone; at least, since what is mapped from files is not counted.

    Weights whose files have the dtype that they are loaded in are mapped: the processes of a host share one copy, which
    the system can drop and read again. All others are copies of the process.

    Args:
        options: the model section.
        base: the fetched base.
        kept: the precisions.
        in_host: whether weights that are quantised, or dequantised, are made in the host's memory, not on a device.
    """
    held = stored(options.name_or_path, base.config, options.quantization)
    loaded = kept.base if options.quantization == "none" else kept.compute
    if (options.quantization != "none" or held is not None) and not in_host:
        return 0
    if held is not None and not held.dequantised:
        return 0
    if options.quantization != "none":
        return int(_numbers(base) * _QUANTISED[options.quantization])
    width = getattr(torch, loaded).itemsize
    doubled = held is not None and held.method == "mxfp4"  # two numbers in a byte
    return _numbers(base, other_than=_NAMES.get(loaded, ""), in_bytes=doubled) * width


def most_bytes(options: ModelOptions, base: Base, kept: Precision) -> int:
    """Bytes of the model that is built of a base, if each weight is a copy: files may hold more than is loaded.

    Takes seconds, for the architecture is built.

    Raises:
        ModelError: it cannot be built.
    """
    dtype = kept.base if options.quantization == "none" else kept.compute
    return sum(one.numel() * one.element_size() for one in skeleton(options, base, dtype).parameters())


def dtypes(base: Base) -> str:
    """The dtypes of the numbers in a base's files, by torch's names where they have one, the most frequent first."""
    counted: dict[str, int] = {}
    for path in base.weights:
        for entry in safetensors_header(path).values():
            if entry["dtype"] in _WIDTHS:
                counted[entry["dtype"]] = counted.get(entry["dtype"], 0) + math.prod(entry["shape"])
    known = {short: name for name, short in _NAMES.items()}
    return ", ".join(known.get(one, one) for one in sorted(counted, key=lambda one: -counted[one]))


def _numbers(base: Base, other_than: str = "", in_bytes: bool = False) -> int:
    """How many numbers a base's files hold, but for those of one dtype."""
    total = 0
    for path in base.weights:
        for entry in safetensors_header(path).values():
            if entry["dtype"] in _WIDTHS and entry["dtype"] != other_than:
                total += math.prod(entry["shape"])
            elif entry["dtype"] == "U8" and in_bytes:
                total += 2 * math.prod(entry["shape"])
    return total
