"""Qwen3.5 and later of that architecture, with routed experts; the text part of a checkpoint that also sees."""

from finetune.families.family import EXPERTS, PER_EXPERT, QKVO, TWIN_EXPERTS, TWIN_LINEAR, Family

FAMILY = Family(
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    attention=(*QKVO, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
    mlp=("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
    licence="Apache-2.0.",
    never=("shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("Qwen3_5MoeSparseMoeBlock",),
    layers=("Qwen3_5MoeDecoderLayer",),
    stop=("<|im_end|>", "<|endoftext|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with <function=…> and <parameter=…>.",
    twin={**TWIN_EXPERTS, **TWIN_LINEAR, "shared_expert_intermediate_size": 32},
)
