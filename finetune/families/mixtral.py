"""Mixtral: every feed-forward block is of routed experts."""

from finetune.families.family import EXPERTS, PER_EXPERT_W, QKVO, TWIN_EXPERTS, Family

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    attention=QKVO,
    mlp=(),
    licence="Apache-2.0.",
    experts=EXPERTS,
    stored=PER_EXPERT_W,
    moe_blocks=("MixtralSparseMoeBlock",),
    layers=("MixtralDecoderLayer",),
    stop=("</s>",),
    twin=TWIN_EXPERTS,
)
