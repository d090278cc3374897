"""Phi-1, 1.5 and 2: two layers in a feed-forward block, and an output projection called dense."""

from finetune.families.family import Family

FAMILY = Family(
    name="phi",
    model_types=("phi",),
    attention=("q_proj", "k_proj", "v_proj", "dense"),
    mlp=("fc1", "fc2"),
    licence="MIT.",
    layers=("PhiDecoderLayer",),
    stop=("<|endoftext|>",),
)
