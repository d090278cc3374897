"""ERNIE 4.5, dense."""

from finetune.families.family import GLU, QKVO, Family

FAMILY = Family(
    name="ernie4_5",
    model_types=("ernie4_5",),
    attention=QKVO,
    mlp=GLU,
    licence="Apache-2.0.",
    layers=("Ernie4_5DecoderLayer",),
    stop=("</s>", "<|end_of_sentence|>"),
    tied="yes",
)
