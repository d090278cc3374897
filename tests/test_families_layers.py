"""Every family of the table names layers that its models have, and leaves none out.

That all of them learn, are saved, opened again and merged, is for tests/battery.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.families import FAMILIES, match
from finetune.families.family import TWIN, Family
from finetune.recipe.sections import AdapterOptions
from finetune.registry import resolve

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

KNOWN: list[Family] = [resolve("family", name, FAMILIES) for name in FAMILIES]
TYPES = [(family, model_type) for family in KNOWN for model_type in family.model_types]
EVERY = pytest.mark.parametrize(("family", "model_type"), TYPES, ids=[model_type for _, model_type in TYPES])


def twin(model_type: str) -> PreTrainedModel:
    """A tiny random model of an architecture that no family file describes."""
    from finetune.model import twin as made

    return made.twin(model_type, TWIN)


def test_families_are_found_under_their_own_names() -> None:
    assert len(TYPES) >= 30
    assert [family.name for family in KNOWN] == list(FAMILIES)
    types = [model_type for _, model_type in TYPES]
    assert len(set(types)) == len(types), "a model type belongs to one family"
    for family in KNOWN:
        assert family.licence.endswith("."), family.name
        assert family.layers, family.name
        assert bool(family.experts) == bool(family.moe_blocks), family.name
        assert {end for end in family.stored if not end.endswith(".weight")} <= set(family.experts), family.name
        assert set(family.optional) <= {*family.targets, *family.experts}, family.name


@pytest.mark.parametrize(
    ("name", "template", "told"),
    [
        ("llama", "llama3_1", ["<|eot_id|>"]),
        ("qwen2", "qwen2_5", ["<|im_end|>", "<tool_call>"]),
        ("qwen3", "qwen3", ["<|im_end|>", "<tool_call>", "<think>", "reasoning_content"]),
        ("qwen3_moe", "qwen3", ["<|im_end|>", "<tool_call>", "<think>", "reasoning_content"]),
        ("qwen3_5", "qwen3_5_think", ["<|im_end|>", "<tool_call>", "<function=", "<parameter=", "<think>"]),
        ("deepseek_v3", "deepseekv3", ["<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<think>"]),
        ("glm4_moe", "glm4moe", ["<|user|>", "<tool_call>", "<arg_key>", "<think>", "reasoning_content"]),
        ("gpt_oss", "gptoss", ["<|return|>", "<|call|>", "analysis", "commentary"]),
        ("gemma", "gemma3", ["<end_of_turn>"]),
        ("phi3", "phi3", ["<|end|>"]),
    ],
)
def test_what_is_told_of_stop_tokens_and_tools_stands_in_the_template(
    name: str, template: str, told: list[str]
) -> None:
    family: Family = resolve("family", name, FAMILIES)
    source = resources.files("trl").joinpath(f"chat_templates/{template}.jinja").read_text(encoding="utf-8")
    facts = f"{family.stop} {family.thinking} {family.tools}"
    assert family.stop[0] == told[0]
    for word in told:
        assert word in facts
        assert word in source


@EVERY
def test_auto_adapts_every_linear_layer_that_may_be(family: Family, model_type: str) -> None:
    from finetune.model.kinds import ends, is_elsewhere, places
    from finetune.model.targets import resolve_targets
    from finetune.model.twin import family_twin

    model = family_twin(family, model_type)
    assert match("auto", model_type) is family
    targets = resolve_targets(model, AdapterOptions(), family)
    reached = {place.name for place in places(model, family) if place.adaptable and not is_elsewhere(place.name)}
    left_out = reached - set(targets.names)
    assert all(ends(name, family.never) for name in left_out)
    for name in family.never:
        assert any(ends(one, (name,)) for one in left_out), f"{name} is in no {model_type}"
    for name in (*family.targets, *family.experts):
        assert name in family.optional or any(ends(one, (name,)) for one in targets.names), name
    assert {name for name, p in model.named_parameters() if ends(name, family.experts)} == set(targets.parameters)
    assert not targets.assumed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma4", {"enable_moe_block": False}),
        ("gemma4", {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
        ("granitemoehybrid", {"num_local_experts": 0}),
        ("granitemoehybrid", {"num_local_experts": 0, "layer_types": ["attention", "attention"]}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention", "moe", "mamba"]}),
        ("jamba", {"num_experts": 1}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("minimax_m3", {"mlp_layer_types": ["sparse", "sparse"]}),
        ("cohere2_moe", {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse", "sparse"]}),
        ("qwen4_exp", {"ple_layer_ids": []}),
        ("lfm2_moe", {"num_dense_layers": 0}),
    ],
)
def test_auto_fits_members_of_a_family_that_lack_a_kind_of_block(name: str, changes: dict[str, Any]) -> None:
    from finetune.model.kinds import ends, is_elsewhere, places
    from finetune.model.targets import resolve_targets
    from finetune.model.twin import family_twin

    family: Family = resolve("family", name, FAMILIES)
    model = family_twin(family, **changes)
    targets = resolve_targets(model, AdapterOptions(), family)
    reached = {place.name for place in places(model, family) if place.adaptable and not is_elsewhere(place.name)}
    assert reached > set(targets.names) or reached == set(targets.names)
    assert all(ends(one, family.never) for one in reached - set(targets.names))


@EVERY
def test_blocks_and_layers_are_called_as_the_family_says(family: Family, model_type: str) -> None:
    from finetune.model.kinds import KINDS, ends, is_elsewhere, places
    from finetune.model.twin import family_twin

    model = family_twin(family, model_type)
    modules = {type(module).__name__: module for module in model.modules()}
    assert len(set(family.moe_blocks) & set(modules)) == (1 if family.experts else 0)
    assert set(family.layers) & set(modules)
    holding = {type(module).__name__ for module in model.modules() if hasattr(module, "experts")}
    assert holding == set(family.moe_blocks) & set(modules)
    found = places(model, family)
    kinds = {place.kind for place in found}
    assert kinds <= set(KINDS)
    unsorted = [place.name for place in found if place.kind == "other" and place.adaptable]
    assert all(ends(name, family.never) or is_elsewhere(name) for name in unsorted)
    assert ("router" in kinds) == ("experts" in kinds) == bool(family.experts)


@EVERY
def test_files_call_the_experts_as_the_family_says(family: Family, model_type: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    from finetune.model.kinds import ends
    from finetune.model.layout import name_on_disk
    from finetune.model.twin import family_twin

    model = family_twin(family, model_type)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = set(file.keys())

    def stored(name: str) -> bool:
        return name_on_disk(name, on_disk, family) in on_disk

    fused = [name for name, _ in model.named_parameters() if ends(name, family.experts)]
    for name in fused:
        end = next(end for end in family.experts if ends(name, (end,)))
        start = name.removesuffix(end)
        for part in family.stored.get(end, (end,)):
            numbers = range(4) if "*" in part else [0]
            assert all(stored(start + part.replace("*", str(number))) for number in numbers), name
    assert not fused or bool(family.stored) != stored(fused[0])


def assert_lives(make: Callable[[], Any], family: Family | None, tmp_path: Path) -> None:
    """Adapters on all proper targets learn, come back in plain PEFT, and merge; `make` gives the same model always."""
    import torch
    from peft import PeftModel

    from finetune.model.adapt import adapted_modules, attach, untrained_modules
    from finetune.model.targets import resolve_targets

    model = make()
    options = AdapterOptions(r=4, lora_alpha=16)
    targets = resolve_targets(model, options, family)
    wrapped = attach(model, options, targets, "base").train()
    assert set(adapted_modules(wrapped)) == set(targets.names)
    ids = torch.randint(3, TWIN["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first moves lora_B off zero, by which a gradient reaches lora_A
        wrapped.zero_grad()
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.grad is not None:
                    parameter -= 0.2 * parameter.grad
    trained = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None or not bool(p.grad.any())] == []
    assert untrained_modules(wrapped) == []
    wrapped.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    with torch.no_grad():
        expected, found = (one(input_ids=ids, use_cache=False).logits for one in (wrapped, again))
        with wrapped.disable_adapter():
            base = wrapped(input_ids=ids, use_cache=False).logits
    assert float((expected - base).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert_merges(make(), tmp_path, ids, expected)


def assert_merges(model: PreTrainedModel, adapter: Path, ids: Tensor, expected: Tensor) -> None:
    """Merged, and reloaded by plain transformers, the model answers as base plus adapter, under the base's names."""
    import torch
    from safetensors import safe_open

    from finetune.model.auto import auto_class
    from finetune.model.conversions import layout_of
    from finetune.model.folder import Base, safetensors_header
    from finetune.model.merge import merge_weights
    from finetune.model.requantise import Requantiser
    from finetune.model.update import read_adapter

    base, merged = adapter / "base", adapter / "merged"
    model.save_pretrained(base)
    model.config.save_pretrained(merged)
    _, updates = read_adapter(adapter)
    found = Base("base", base, model.config.to_dict(), (base / "model.safetensors",))
    names = list(safetensors_header(base / "model.safetensors"))
    family = match("auto", found.model_type) or layout_of(model, names)
    report = merge_weights(found, updates, merged, "auto", "5GB", Requantiser(), family)
    assert len(report.merged) >= len(updates)
    files = []
    for folder in (base, merged):
        with safe_open(folder / "model.safetensors", "pt") as file:
            files.append(set(file.keys()))
    assert files[0] == files[1]
    again = auto_class(model.config).from_pretrained(merged, attn_implementation="eager").eval()
    with torch.no_grad():
        distance = (again(input_ids=ids, use_cache=False).logits - expected).abs().max()
    # The sum is rounded in another order, which float32 shows in the last digit of the largest logits.
    assert float(distance) <= 1e-5 * max(1.0, float(expected.abs().max()))
