"""Tiny random models of real architectures, made in the process of the test that asks.

llama    head of its own, grouped attention
tied     Llama whose head is its embedding
qwen2    biases on q, k and v
qwen3    norms on q and k
glm4     gate and up in one layer
mistral  like llama
hunyuan  dense
moe      Qwen3 with fused experts
neox     a model type that no family file knows
gpt2     layers stored transposed
gemma2   soft caps behind the head and on the scores
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.families import FAMILIES
from finetune.families.family import TWIN, Family
from finetune.model.twin import twin
from finetune.registry import resolve

TOKENIZER = Path(__file__).parent / "tokenizers" / "chatml"
VOCABULARY = int(TWIN["vocab_size"])

_PLAIN = TWIN
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


def _of(family: str) -> tuple[str, dict[str, Any]]:
    """A family's first model type and the shape of its twin."""
    known: Family = resolve("family", family, FAMILIES)
    return known.model_types[0], known.twin_shape()


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: _of(kind) for kind in ("llama", "qwen2", "qwen3", "glm4", "mistral", "hunyuan")},
    "tied": ("llama", {**_PLAIN, "tie_word_embeddings": True}),
    "moe": _of("qwen3_moe"),
    "neox": ("gpt_neox", {**_PLAIN, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}),
    "gemma2": ("gemma2", {**_PLAIN, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
}


def model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of `kind` with random weights and biases, in eval mode, with eager attention."""
    model_type, shape = SHAPES[kind]
    return twin(model_type, {**shape, **changes}, seed, dtype)


def folder(path: Path, kind: str = "llama", tokenizer: bool = True, **how: Any) -> Path:
    """A base folder as the hub has them; `how` is for `model`, or `max_shard_size` for several files."""
    saving = {"max_shard_size": how.pop("max_shard_size")} if "max_shard_size" in how else {}
    model(kind, **how).save_pretrained(path, **saving)
    if tokenizer:
        for file in TOKENIZER.iterdir():
            shutil.copyfile(file, path / file.name)
    return path


def ids(rows: int = 2, length: int = 12, seed: int = 5) -> torch.Tensor:
    """Token ids (rows, length), int64, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
