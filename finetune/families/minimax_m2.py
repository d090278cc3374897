"""MiniMax-M2: every feed-forward block is of routed experts."""

from finetune.families.family import EXPERTS, PER_EXPERT_W, QKVO, TWIN_EXPERTS, Family

FAMILY = Family(
    name="minimax_m2",
    model_types=("minimax_m2",),
    attention=QKVO,
    mlp=(),
    licence="MIT, modified: attribution in commercial products.",
    experts=EXPERTS,
    stored=PER_EXPERT_W,
    moe_blocks=("MiniMaxM2SparseMoeBlock",),
    layers=("MiniMaxM2DecoderLayer",),
    stop=("[e~[",),
    thinking="<think> in the answer; must be kept in earlier turns.",
    tools="<minimax:tool_call> with <invoke> and <parameter>.",
    twin=TWIN_EXPERTS,
)
