"""Qwen3.5 and later of that architecture, dense; the text part of a checkpoint that also sees."""

from finetune.families.family import GLU, QKVO, TWIN_LINEAR, Family

FAMILY = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    attention=(*QKVO, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
    mlp=GLU,
    licence="Apache-2.0.",
    never=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    layers=("Qwen3_5DecoderLayer",),
    stop=("<|im_end|>", "<|endoftext|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with <function=…> and <parameter=…>.",
    tied="small sizes: yes; larger: no",
    twin=TWIN_LINEAR,
)
