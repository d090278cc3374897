"""Qwen3-Next: linear attention in three layers of four, routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT, QKVO, TWIN_EXPERTS, TWIN_LINEAR, Family

FAMILY = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    attention=(*QKVO, "linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
    mlp=GLU,
    licence="Apache-2.0.",
    never=("shared_expert_gate", "linear_attn.in_proj_ba"),
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("Qwen3NextSparseMoeBlock",),
    layers=("Qwen3NextDecoderLayer",),
    stop=("<|im_end|>", "<|endoftext|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with JSON of name and arguments.",
    twin={**TWIN_EXPERTS, **TWIN_LINEAR, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
)
