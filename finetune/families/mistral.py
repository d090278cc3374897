"""Mistral and Ministral, dense."""

from finetune.families.family import GLU, QKVO, Family

FAMILY = Family(
    name="mistral",
    model_types=("mistral", "ministral", "ministral3"),
    attention=QKVO,
    mlp=GLU,
    licence="Most open sizes are Apache-2.0; some carry the Mistral Research License.",
    layers=("MistralDecoderLayer", "MinistralDecoderLayer", "Ministral3DecoderLayer"),
    stop=("</s>",),
    tools="[TOOL_CALLS] with JSON of name and arguments.",
)
