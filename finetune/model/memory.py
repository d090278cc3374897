"""What loading a base takes of the host's memory in each process, told from the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from finetune.model.folder import Base, safetensors_header
from finetune.model.load import Precision
from finetune.model.skeleton import skeleton
from finetune.model.stored import stored
from finetune.recipe.sections import ModelOptions

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a number that can be trained
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")
_QUANTISED = {"nf4": 0.5, "int8": 1.0}  # bytes of a weight, without scales


def copied_bytes(options: ModelOptions, base: Base, kept: Precision, in_host: bool, as_stored: bool = False) -> int:
    """Bytes that a process needs for the base alone; at least, since what is mapped from files is not counted.

    Weights whose files have the dtype that they are loaded in are mapped: the processes of a host share one copy, which
    the system can drop and read again. All others are copies of the process: those that get another dtype, and experts
    that files hold one by one and transformers puts into one weight.

    Args:
        options: the model section.
        base: the fetched base.
        kept: the precisions.
        in_host: whether weights that are quantised, or dequantised, are made in the host's memory, not on a device.
        as_stored: whether 16-bit weights of a float32 model stay as they are until they are laid down in parts.
    """
    held = stored(options.name_or_path, base.config, options.quantization)
    loaded = kept.base if options.quantization == "none" else kept.compute
    if (options.quantization != "none" or held is not None) and not in_host:
        return 0
    if held is not None and not held.dequantised:
        return 0
    if options.quantization != "none":
        return int(sum(count for _, _, count in _numbers(base)) * _QUANTISED[options.quantization])
    width, needed = getattr(torch, loaded).itemsize, 0
    doubled = held is not None and held.method == "mxfp4"  # two numbers in a byte
    for name, dtype, count in _numbers(base, in_bytes=doubled):
        stays = dtype == _NAMES.get(loaded) or (as_stored and dtype in ("BF16", "F16"))
        if not stays:
            needed += count * width
        elif _ONE_BY_ONE.search(name) and not options.trust_remote_code:  # such code has its experts in a list
            needed += count * _WIDTHS[dtype]
    return needed


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
    for _, dtype, count in _numbers(base):
        counted[dtype] = counted.get(dtype, 0) + count
    known = {short: name for name, short in _NAMES.items()}
    return ", ".join(known.get(one, one) for one in sorted(counted, key=lambda one: -counted[one]))


def _numbers(base: Base, in_bytes: bool = False) -> Iterator[tuple[str, str, int]]:
    """Name, dtype and count of numbers of each weight in a base's files.

    Args:
        base: the fetched base.
        in_bytes: whether bytes hold two numbers each.
    """
    for path in base.weights:
        for name, entry in safetensors_header(path).items():
            if entry["dtype"] in _WIDTHS:
                yield name, entry["dtype"], math.prod(entry["shape"])
            elif entry["dtype"] == "U8" and in_bytes:
                yield name, "U8", 2 * math.prod(entry["shape"])
