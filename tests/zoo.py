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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOKENIZER = Path(__file__).parent / "tokenizers" / "chatml"
VOCABULARY = 512

_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # wide, so that what a layer does shows in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _PLAIN),
    "tied": ("llama", {**_PLAIN, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _PLAIN),
    "qwen3": ("qwen3", _PLAIN),
    "glm4": ("glm4", _PLAIN),
    "mistral": ("mistral", _PLAIN),
    "hunyuan": ("hunyuan_v1_dense", _PLAIN),
    "moe": (
        "qwen3_moe",
        {**_PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "neox": ("gpt_neox", {**_PLAIN, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}),
    "gemma2": ("gemma2", {**_PLAIN, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
}


def model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of `kind` with random weights and biases, in eval mode, with eager attention."""
    model_type, shape = SHAPES[kind]
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):  # new ones are zero, so that losing them would not show
                parameter.normal_(std=0.1)
    return made.eval()


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
