"""GLM-4, dense: gate and up are one fused layer."""

from finetune.families.family import QKVO, Family

FAMILY = Family(
    name="glm4",
    model_types=("glm4", "glm"),
    attention=QKVO,
    mlp=("gate_up_proj", "down_proj"),
    licence="MIT for GLM-4-0414; earlier ones carry the GLM-4 licence.",
    layers=("GlmDecoderLayer", "Glm4DecoderLayer"),
    stop=("<|user|>", "<|endoftext|>", "<|observation|>"),
    tools="The function's name on the line of the role, JSON of its arguments below.",
)
