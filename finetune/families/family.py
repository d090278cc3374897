"""What a model family's config.json does not state, as plain data; and the words that most families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Attention: four projections, or those of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLA = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLA_OPTIONAL = ("q_proj", "q_a_proj", "q_b_proj")  # the query is compressed in large models, plain in small ones

# Feed-forward: gate, up and down; in models with experts those of dense layers and of the shared expert.
GLU = ("gate_proj", "up_proj", "down_proj")

# Routed experts: two parameters of three dimensions, experts x out x in; gate stands above up.
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

# What files call them, by their name in memory: a tensor per expert and projection.
PER_EXPERT = {
    "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.*.down_proj.weight",),
}
PER_EXPERT_W = {
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2.weight",),
}

# A model of two layers that trains in milliseconds, by the names that most configs use.
TWIN: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # wide, so that what a layer does shows in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Four experts, two of them asked, in whatever words a config has for it.
TWIN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# DeepSeek's: the first layer dense, a shared expert, one group of experts.
TWIN_DEEPSEEK: dict[str, Any] = {
    **TWIN_EXPERTS,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
TWIN_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
# A tower that sees, for the types of a family whose checkpoints are of more than text.
TWIN_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
# One layer of linear attention, one of full attention.
TWIN_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Names of layers are ends of full names: `q_proj` is every layer called so, `self_attn.q_proj` only those in
    attention.

    Attributes:
        name: short name, the key in FAMILIES.
        model_types: the `model_type` values of config.json that belong to it.
        attention: linear layers of attention, or of what stands in its place, that LoRA adapts.
        mlp: linear layers of dense feed-forward blocks and shared experts that LoRA adapts.
        licence: what using the weights obliges to, in one sentence.
        never: linear layers that `auto` leaves out: routers, gates of one output, indexers.
        optional: those of `attention` and `mlp` that not every model of the family has.
        experts: parameters of three dimensions that hold all routed experts of a layer.
        stored: for each of `experts`, and for the weight of a layer that files split, what files call the parts, `*`
            being the number of the expert, in the order in which they stand above each other; empty where files hold
            all of them as memory does.
        transposed: whether `experts` are stored experts x in x out.
        renamed: parts of names as (in memory, in files), where files call a layer otherwise.
        moe_blocks: class names of the blocks with routed experts, which DeepSpeed must gather whole (its ZeRO-3 leaf
            modules): which experts run differs between ranks.
        layers: class names of the layers that FSDP wraps; a model has one of them.
        stop: tokens that end an answer, the first one in chats.
        thinking: how the chat template takes reasoning; empty where it knows none.
        tools: how calls of functions are written; empty where the chat template knows none.
        tied: whether input and output embeddings are one tensor, in words.
        twin: what TWIN lacks for a tiny model with every kind of block.
        hub: names of its models on the hub, without their owner, as regular expressions in small letters; each with
            the chat template of such models by the name of TRL's file, empty where TRL has none. A rehearsal goes by
            them where the hub cannot be reached.
        published: of those whose weights are published quantised, likewise, each with `quant_method` of its config.
    """

    name: str
    model_types: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    licence: str
    never: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    transposed: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    moe_blocks: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    thinking: str = ""
    tools: str = ""
    tied: str = "no"
    twin: Mapping[str, Any] = field(default_factory=dict, hash=False)
    hub: tuple[tuple[str, str], ...] = ()
    published: tuple[tuple[str, str], ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Linear layers that `adapter.target_modules: auto` adapts, beside `experts`."""
        return tuple(dict.fromkeys(self.attention + self.mlp))

    def twin_shape(self) -> dict[str, Any]:
        """The config values of a tiny model with every kind of block that the family has."""
        return {**TWIN, **self.twin}
