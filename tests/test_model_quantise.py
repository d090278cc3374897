"""What is quantised, what stays whole, what it takes; and that experts in 4 bits compute and learn as they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel
from torch import Tensor

from finetune.errors import ModelError
from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.model.adapt import attach
from finetune.model.folder import Base
from finetune.model.kinds import ends, is_packed, places
from finetune.model.load import Precision, load_base
from finetune.model.quantise import as_quantised, plan, quantised, weights_told
from finetune.model.quantise_experts import can_be_packed
from finetune.model.skeleton import skeleton
from finetune.model.targets import resolve_targets
from finetune.model.twin import family_twin
from finetune.recipe.sections import AdapterOptions, ModelOptions
from finetune.registry import resolve

pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
torch.set_num_threads(1)

WHOLE = ("router", "norm", "embedding", "head")


def named(family: str) -> Family:
    found: Family = resolve("family", family, FAMILIES)
    return found


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[Base, Family]]:
    """Write the twin of a family; gives its folder as a base."""

    def made(family: str, **changes: Any) -> tuple[Base, Family]:
        known = named(family)
        family_twin(known, **changes).save_pretrained(tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        return Base(family, tmp_path / family, config, (tmp_path / family / "model.safetensors",)), known

    return made


def loaded(base: Base, kind: str = "nf4", compute: str = "float32") -> Any:
    options = ModelOptions(name_or_path=str(base.folder), quantization=kind)  # type: ignore[arg-type]
    return load_base(options, base, Precision(compute, compute if kind == "none" else kind), "eager")


def dequantise(model: Any, packed: Any) -> Any:
    """Give a plain model the numbers that a quantised one stands for, by bitsandbytes' own means."""
    import bitsandbytes.functional as bnb

    with torch.no_grad():
        for name, module in packed.named_modules():
            if type(module).__name__ == "Linear4bit":
                model.get_submodule(name).weight.copy_(
                    bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
                )
            elif is_packed(module):
                for one, (count, *_) in module.shapes.items():
                    whole = torch.stack([module.slice_of(one, expert).whole() for expert in range(count)])
                    getattr(model.get_submodule(name), one).copy_(whole)
    return model


def ids() -> Tensor:
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def adapted(model: Any, family: Family) -> PeftModel:
    """With an adapter on everything proper that has moved off its start, the same for equal models."""
    options = AdapterOptions(r=4, lora_alpha=16)
    wrapped = attach(model, options, resolve_targets(model, options, family), "base").train()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.1 if "lora_B" in name else 0.3)
    return wrapped


def holds_experts(module: torch.nn.Module, family: Family) -> bool:
    leaves = {name.rpartition(".")[2] for name in family.experts}
    return any(name in leaves and one.dim() == 3 for name, one in module.named_parameters(recurse=False))


FEW = ["qwen3_moe", "deepseek_v3", "gpt_oss", "hunyuan_moe", "qwen3_next", "phi"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FEW)
def test_what_is_loaded_is_what_was_foretold(stored: Any, family: str, kind: str) -> None:
    base, known = stored(family)
    model = loaded(base, kind, "bfloat16")
    options = ModelOptions(name_or_path=str(base.folder), quantization=kind)  # type: ignore[arg-type]
    bare = skeleton(options, base, "bfloat16")
    planned = plan(bare, known, kind)
    held = quantised(model, kind, "bfloat16")
    assert held is not None
    assert (set(held.modules), set(held.experts)) == (planned.modules, planned.experts)
    assert len(planned.modules) >= 8
    assert bool(planned.experts) == (bool(known.experts) and kind == "nf4")
    foretold = {place.name: place for place in as_quantised(places(bare, known), bare, planned)}
    found = {place.name: place for place in places(model, known)}
    assert found.keys() == foretold.keys()
    for name, place in found.items():
        assert (place.kind, place.parameters) == (foretold[name].kind, foretold[name].parameters), name
        assert place.bytes == foretold[name].bytes, name
    said = weights_told(found.values(), kind, "bfloat16")
    assert ("experts stay whole" in said) == (kind == "int8" and bool(known.experts))


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_norms_embeddings_heads_and_gates_are_never_quantised(family: str) -> None:
    known = named(family)
    for model_type in known.model_types:
        model = family_twin(known, model_type)
        planned = [plan(model, known, "int8")]
        if any(not can_be_packed(one) for one in model.modules() if holds_experts(one, known)):
            with pytest.raises(ModelError, match="would stay whole and take"):
                plan(model, known, "nf4")
        else:
            planned.append(plan(model, known, "nf4"))
        kept = {p.name for p in places(model, known) if p.kind in WHOLE or ends(p.name, known.never)}
        assert kept
        for one in planned:
            assert one.modules
            assert not kept & (one.modules | one.experts)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_4_bits_answer_and_learn_as_their_dequantised_weights_do(stored: Any, family: str) -> None:
    base, known = stored(family)
    packed = loaded(base)
    plain = adapted(dequantise(loaded(base, "none"), packed), known)
    packed = adapted(packed, known)
    before = {name: value.clone() for name, value in packed.named_parameters() if not value.requires_grad}
    losses = []
    for model in (plain, packed):
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in packed.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    for name, value in packed.named_parameters():
        if name in before:
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name]), name
    with packed.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(packed(ids()).logits, plain(ids()).logits, rtol=0, atol=1e-5)


def test_a_forward_keeps_nothing_of_the_size_of_an_expert(stored: Any) -> None:
    base, known = stored("qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    expert, vocabulary = 2 * 128 * 128, 512 * 128

    def largest(model: PeftModel) -> int:
        """Numbers in the largest tensor that a forward keeps for the backward pass, embeddings left out."""
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
            model(input_ids=ids()[:, :8], use_cache=False)
        assert len(kept) > 50
        return max(one for one in kept if one != vocabulary)

    assert largest(adapted(loaded(base), known)) < expert
    assert largest(adapted(loaded(base, "none"), known)) >= 4 * expert


def test_only_one_parameter_is_whole_at_a_time_while_files_are_read(stored: Any, monkeypatch: Any) -> None:
    import weakref

    from finetune.model import quantiser

    base, _ = stored("mixtral", num_hidden_layers=3)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    pack = quantiser.pack

    def watched(module: Any, name: str, value: Tensor, *more: Any) -> Any:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(one() is not None for one in alive))
        return pack(module, name, value, *more)

    monkeypatch.setattr(quantiser, "pack", watched)
    model = loaded(base)
    assert (len(alive), most) == (6, 1)
    assert not any(p.dim() == 3 for p in model.parameters())


def test_an_adapter_is_not_folded_into_4_bits(stored: Any) -> None:
    base, known = stored("qwen3_moe")
    model = adapted(loaded(base), known)
    with pytest.raises(ModelError, match="use `finetune merge`"):
        model.base_model.model.model.layers[1].mlp.experts.merge()


def test_experts_that_compute_in_a_way_of_their_own_are_refused_with_what_they_take() -> None:
    class Own(torch.nn.Module):
        """Experts of nobody's form."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 8, 8))

    model = family_twin(named("qwen3_moe"))
    model.get_submodule("model.layers.1.mlp").experts = Own()
    with pytest.raises(ModelError, match=r"nf4 cannot hold model\.layers\.1\.mlp\.experts\.gate_up_proj .* 0\.0 GB"):
        plan(model, named("qwen3_moe"), "nf4")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_stored_transposed_are_refused_before_they_are_quantised(kind: str, tmp_path: Path) -> None:
    said = (
        rf"^model\.quantization: {kind} cannot hold transformer\.h\.0\.attn\.c_attn and 7 more .* quantization: none$"
    )
    with pytest.raises(ModelError, match=said):
        plan(zoo.model("gpt2"), None, kind)
    path = zoo.folder(tmp_path / "base", "gpt2", tokenizer=False)
    config = json.loads((path / "config.json").read_text())
    with pytest.raises(ModelError, match=said):
        loaded(Base("base", path, config, (path / "model.safetensors",)), kind)
