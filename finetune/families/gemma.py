"""Gemma 2 and the text models of Gemma 3."""

from finetune.families.family import GLU, QKVO, Family

FAMILY = Family(
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    attention=QKVO,
    mlp=GLU,
    licence="Gemma Terms of Use: use restrictions that must be passed on.",
    layers=("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
    stop=("<end_of_turn>", "<eos>"),
    tied="yes",
    twin={"query_pre_attn_scalar": 16},
)
