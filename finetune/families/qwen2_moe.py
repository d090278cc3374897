"""Qwen1.5-MoE and Qwen2-57B-A14B."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT, QKVO, TWIN_EXPERTS, Family

FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    attention=QKVO,
    mlp=GLU,
    licence="Qwen2-57B-A14B: Apache-2.0; Qwen1.5-MoE carries the Qwen licence.",
    never=("shared_expert_gate",),
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("Qwen2MoeSparseMoeBlock",),
    layers=("Qwen2MoeDecoderLayer",),
    stop=("<|im_end|>", "<|endoftext|>"),
    twin={**TWIN_EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
)
