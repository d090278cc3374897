"""Phi-3, Phi-3.5 and Phi-4: query, key and value are one layer, gate and up another."""

from finetune.families.family import Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    attention=("qkv_proj", "o_proj"),
    mlp=("gate_up_proj", "down_proj"),
    licence="MIT.",
    layers=("Phi3DecoderLayer",),
    stop=("<|end|>", "<|endoftext|>", "<|im_end|>"),
    tied="Phi-4-mini: yes; others: no",
)
