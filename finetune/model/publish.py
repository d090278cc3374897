"""A twin's weights as the real ones are published: in FP8 by blocks (DeepSeek-V3), or experts in MXFP4 (gpt-oss).

So a rehearsal reads them as training will, and merges onto what was read. finetune/model/dequantise.py has the formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from finetune.files import write_json
from finetune.model.dequantise import E2M1
from finetune.model.folder import SINGLE

BLOCK = 128  # rows, and columns, that share a scale in FP8
_LARGEST = 448.0  # of the numbers of 8 bits with 4 of exponent (E4M3)
_GROUP = 32  # numbers that share an exponent in MXFP4
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
    },
}  # fmt: skip


def store_as(folder: Path, method: str) -> int:
    """Rewrite the weights of a twin in a format, and say so in its config.json.

    Args:
        folder: the twin's, its weights in one file.
        method: as `quant_method` of a config.json.

    Returns:
        How many weights are in that format now; 0 where the twin has none that could be, and stays as it is.
    """
    plain = load_file(folder / SINGLE)
    packed: dict[str, Tensor] = {}
    for name, weight in plain.items():
        packed |= _STORED[method](name, weight) if method in _STORED else {name: weight}
    changed = len(plain.keys() - packed.keys()) or len(packed.keys() - plain.keys())
    if changed:
        save_file(packed, folder / SINGLE, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", {**config, "quantization_config": dict(_CONFIGS[method])})
    return changed


def _fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The weight of a projection as numbers of 8 bits, and a scale for each block of them."""
    if "_proj" not in name or not name.endswith(".weight") or weight.dim() != 2:
        return {name: weight}
    rows, columns = weight.shape
    whole = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))  # (down, BLOCK, across, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / _LARGEST
    numbers = (blocks / scales[:, None, :, None]).flatten(-2).flatten(0, 1)[:rows, :columns]
    return {name: numbers.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scales}


def _mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Experts (experts, in, out) as bytes of two numbers, (experts, out, groups, 16), an exponent for each group."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")) or weight.shape[1] % _GROUP:
        return {name: weight}
    groups = weight.float().mT.unflatten(-1, (-1, _GROUP))
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2  # 6, the largest number, is 1.5 * 2^2
    values = torch.tensor([*E2M1, *(-one for one in E2M1)])
    codes = (torch.ldexp(groups, -exponents[..., None])[..., None] - values).abs().argmin(-1).to(torch.uint8)
    return {
        f"{name}_blocks": (codes[..., ::2] | codes[..., 1::2] << 4).contiguous(),
        f"{name}_scales": (exponents + 127).to(torch.uint8),
    }


_STORED = {"fp8": _fp8, "mxfp4": _mxfp4}
