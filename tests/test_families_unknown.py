"""Models that no family file knows: adapted by the tree of their modules, merged by the names transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_families_layers import EVERY, assert_lives, assert_merges

from finetune.errors import ModelError
from finetune.families import match
from finetune.families.family import TWIN, TWIN_DEEPSEEK, TWIN_EXPERTS, TWIN_MLA, TWIN_VISION, Family
from finetune.recipe.sections import AdapterOptions, ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "attn_rotary_emb": 16}
_BLOCKS = {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 64}
# What the config of each adds to TWIN, the ends of names that must be adapted, and of some that must not.
UNKNOWN: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "gpt_neox": ({"num_key_value_heads": 4}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, set()),
    "kolibri1": (TWIN_EXPERTS, {"q_proj", "shared_experts.up_proj", "mlp.experts.gate_up_proj"}, {"gate"}),
    "dots3_note_text": (
        {**TWIN_DEEPSEEK, **TWIN_MLA},
        {"kv_b_proj", "g_proj", "mlp.down_proj", "shared_experts.down_proj", "mlp.experts.down_proj"},
        {"indexer.wq_b", "indexer.wk", "indexer.weights_proj"},
    ),
    "bamba": ({**_MAMBA, "attn_layer_indices": [1]}, {"mamba.in_proj", "q_proj", "down_proj"}, {"mamba.out_proj"}),
    "recurrent_gemma": (
        {**_BLOCKS, "num_key_value_heads": 1},
        {"linear_x", "linear_y", "linear_out", "q_proj", "gate_proj"},
        {"rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight"},
    ),
    "jetmoe": ({**TWIN_EXPERTS, "kv_channels": 16}, {"kv_proj"}, {"router.layer", "input_linear", "output_linear"}),
    "aria_text": (  # experts stored (in, out)
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {"q_proj", "shared_experts.up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        {"router"},
    ),
    "mamba2": ({"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}, {"in_proj"}, {"out_proj"}),
}
NAMED = pytest.mark.parametrize("model_type", UNKNOWN)


def made(model_type: str) -> PreTrainedModel:
    """The tiny model of an unknown type."""
    from finetune.model.twin import twin

    return twin(model_type, {**TWIN, **UNKNOWN[model_type][0]})


@NAMED
def test_the_tree_tells_what_to_adapt_and_what_was_assumed_is_said(model_type: str) -> None:
    from finetune.model.kinds import ends
    from finetune.model.targets import leaf, resolve_targets

    assert match("auto", model_type) is None
    _, wanted, left_out = UNKNOWN[model_type]
    targets = resolve_targets(made(model_type), AdapterOptions(), None)
    for name in wanted:
        assert any(ends(one, (name,)) for one in targets.names), name
    assert not any(ends(one, left_out) for one in targets.names)
    assert repr(model_type) in targets.assumed
    assert all(leaf(name) in targets.assumed for name in targets.names)


@NAMED
def test_an_unknown_model_learns_reloads_in_plain_peft_and_merges(model_type: str, tmp_path: Path) -> None:
    assert_lives(lambda: made(model_type), None, tmp_path)


def test_experts_that_no_adapter_can_reach_must_be_accepted() -> None:
    from finetune.model.adapt import attach
    from finetune.model.coverage import measure, refuse_unaccepted
    from finetune.model.kinds import places
    from finetune.model.targets import resolve_targets

    model = made("jetmoe")
    found = places(model, None)
    wrapped = attach(model, AdapterOptions(), resolve_targets(model, AdapterOptions(), None), "base")
    with pytest.raises(ModelError, match=r"routed experts .* get no adapter"):
        refuse_unaccepted(measure(found, wrapped), AdapterOptions())
    refuse_unaccepted(measure(found, wrapped), AdapterOptions(accept=("experts_frozen",)))


def test_layers_with_a_product_of_their_own_are_named_where_nothing_else_is_left() -> None:
    from finetune.model.targets import resolve_targets
    from finetune.model.twin import twin

    model = twin("falcon", {name: value for name, value in TWIN.items() if name != "head_dim"})
    with pytest.raises(ModelError, match="its FalconLinear layers have a product of their own"):
        resolve_targets(model, AdapterOptions(), None)


def test_an_adapter_of_which_plain_peft_loses_a_part_says_so_opens_whole_and_merges(tmp_path: Path) -> None:
    """Mistral Large 4, of whose experts PEFT renames what has its name already."""
    import torch

    from finetune.model.build import adapted
    from finetune.model.quantise_lora import open_adapter
    from finetune.model.twin import twin

    def made() -> Any:
        return twin("mistral_large4", {**TWIN, **TWIN_DEEPSEEK, **TWIN_MLA, "vision_config": TWIN_VISION})

    options = AdapterOptions(r=4, lora_alpha=16)
    model, targets = adapted(made(), options, ModelOptions(name_or_path="base"), None, None)
    assert "PEFT by itself loses 10 matrices of this adapter" in targets.loses
    ids = torch.randint(3, TWIN["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        model.save_pretrained(tmp_path)
        again = open_adapter(made(), tmp_path).eval()
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    assert_merges(made(), tmp_path, ids, expected)


def test_an_adapter_of_which_peft_loses_a_part_all_the_same_is_not_opened(tmp_path: Path) -> None:
    """As one whose file was written for other names of the same layers."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from finetune.model.quantise_lora import open_adapter

    wrapped = get_peft_model(made("gpt_neox"), LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    other = {name.replace("layers.0.", "blocks.0."): tensor for name, tensor in load_file(path).items()}
    save_file(other, path)
    with pytest.raises(ModelError, match=r"loses 2 matrices .*layers\.0\.attention\.dense"):
        open_adapter(made("gpt_neox"), tmp_path)


@EVERY
def test_a_family_and_the_table_of_transformers_agree_on_the_names_in_files(
    family: Family, model_type: str, tmp_path: Path
) -> None:
    from finetune.model.conversions import layout_of
    from finetune.model.folder import safetensors_header
    from finetune.model.kinds import ends
    from finetune.model.layout import name_on_disk, parts_on_disk
    from finetune.model.twin import family_twin

    model = family_twin(family, model_type)
    model.save_pretrained(tmp_path)
    names = set(safetensors_header(tmp_path / "model.safetensors"))
    read = layout_of(model, names)  # None where the table is silent, or two names in files become one

    def in_files(name: str, known: Family | None) -> list[tuple[str, ...]]:
        whole = name_on_disk(name, names, known)
        return [(whole,)] if whole in names else parts_on_disk(name, names, known)

    for name, _ in model.named_parameters():
        if ends(name, family.stored):
            assert in_files(name, family), name
            assert read is None or in_files(name, read) == in_files(name, family), name
        elif read is not None:
            assert name_on_disk(name, names, family) in (name, name_on_disk(name, names, read)), name
