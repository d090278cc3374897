"""ERNIE 4.5 with routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT, QKVO, TWIN_EXPERTS, Family

FAMILY = Family(
    name="ernie4_5_moe",
    model_types=("ernie4_5_moe",),
    attention=QKVO,
    mlp=GLU,
    licence="Apache-2.0.",
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("Ernie4_5_MoeSparseMoeBlock",),
    layers=("Ernie4_5_MoeDecoderLayer",),
    stop=("</s>", "<|end_of_sentence|>"),
    tied="yes",
    twin={
        **TWIN_EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
)
