"""Which modules get an adapter, and the proof that exactly those did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune.errors import ModelError
from finetune.families import FAMILIES, match
from finetune.families.family import Family
from finetune.model import adapt
from finetune.model.adapt import Targets, adapted_modules, attach, resolve_targets, untrained_modules
from finetune.recipe.sections import AdapterOptions

torch.set_num_threads(1)

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPECTED = {
    "llama": LLAMA,
    "tied": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "hunyuan": LLAMA,
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
}


def resolve(model: Any, family: Family | None = None, **options: Any) -> Targets:
    return resolve_targets(model, AdapterOptions(**options), family)


def names(model: Any, leaves: tuple[str, ...]) -> set[str]:
    """Full names of all modules called so, in both layers."""
    found = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in leaves}
    assert len(found) == 2 * len(leaves)
    return found


def test_every_family_has_a_tiny_model() -> None:
    known = {match("auto", zoo.SHAPES[kind][0]).name for kind in EXPECTED}  # type: ignore[union-attr]
    assert known == set(FAMILIES)


@pytest.mark.parametrize("kind", EXPECTED)
def test_auto_adapts_what_the_family_names_in_every_layer(kind: str) -> None:
    model = zoo.model(kind)
    targets = resolve(model, match("auto", model.config.model_type))
    assert set(targets.modules) == names(model, EXPECTED[kind])
    assert targets.assumed == ""
    wrapped = attach(model, AdapterOptions(r=3), targets, "base")
    assert adapted_modules(wrapped).keys() == set(targets.modules)
    assert set(wrapped.peft_config["default"].target_modules) == set(EXPECTED[kind])


@pytest.mark.parametrize("kind", EXPECTED)
def test_all_linear_is_every_linear_layer_but_the_head(kind: str) -> None:
    model = zoo.model(kind)
    targets = resolve(model, match("auto", model.config.model_type), target_modules="all-linear")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(targets.modules) == linear - {"lm_head"}
    assert "lm_head" in linear


def test_all_linear_leaves_out_what_the_family_never_adapts() -> None:
    family = Family("mine", ("llama",), ("q_proj",), ("up_proj",), "MIT.", never=("k_proj",))
    found = resolve(zoo.model("llama"), family, target_modules="all-linear").modules
    assert not any(name.endswith("k_proj") for name in found)
    assert len(found) == 12


def test_a_list_means_leaf_names_ends_of_names_or_full_names() -> None:
    model = zoo.model("llama")
    assert set(resolve(model, target_modules=("q_proj", "v_proj")).modules) == names(model, ("q_proj", "v_proj"))
    one = "model.layers.1.mlp.up_proj"
    assert resolve(model, target_modules=(one,)).modules == (one,)
    assert resolve(model, target_modules=("1.mlp.up_proj",)).modules == (one,)
    assert resolve(model, target_modules=(one, "1.mlp.up_proj")).modules == (one,)


def test_a_list_of_part_of_the_layers_adapts_only_those() -> None:
    model = zoo.model("llama")
    targets = resolve(model, target_modules=("1.mlp.up_proj", "0.self_attn.q_proj"))
    wrapped = attach(model, AdapterOptions(), targets, "base")
    assert adapted_modules(wrapped).keys() == {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("q_prok",), "'q_prok' matches no module; did you mean 'q_proj'?"),
        (("zzz",), "'zzz' matches no module (linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
        (("q_proj", "v_prok"), "'v_prok' matches no module; did you mean 'v_proj'?"),
        (("layers.9.q_proj",), "'layers.9.q_proj' matches no module; did you mean 'q_proj'?"),
        (("proj",), "'proj' matches no module"),
        (("norm",), "'norm' matches model.norm, a LlamaRMSNorm; only linear layers are adapted"),
        (("embed_tokens",), "'embed_tokens' matches model.embed_tokens, a Embedding; only linear layers"),
        (("mlp",), "'mlp' matches model.layers.0.mlp, a LlamaMLP; only linear layers are adapted"),
        (("lm_head",), "'lm_head' is the output head, which is not adapted"),
        (("qq_proj", "lm_head", "norm"), "; "),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(wanted: tuple[str, ...], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(zoo.model("llama"), target_modules=wanted)
    assert str(caught.value).startswith("adapter.target_modules: ")
    assert said in str(caught.value)
    bad = [name for name in wanted if name not in ("q_proj", "v_proj")]
    assert all(repr(name) in str(caught.value) for name in bad)  # all of them at once


def test_a_family_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'gate_up_proj' matches no module; did you mean 'up_proj'|gate_proj"):
        resolve(zoo.model("llama"), match("glm4", ""))


def test_an_unknown_model_type_is_adapted_everywhere_and_said_so() -> None:
    model = zoo.model("neox")
    targets = resolve(model)
    leaves = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    assert set(targets.modules) == names(model, leaves)
    assert targets.assumed == (
        "no family file knows model type 'gpt_neox'; adapting every dense, dense_4h_to_h, dense_h_to_4h, "
        "query_key_value"
    )
    attach(model, AdapterOptions(), targets, "base")


class Gated(nn.Module):
    """A layer with a router, as some families have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.shared_expert_gate = nn.Linear(64, 1)


def test_what_looks_like_a_router_is_left_out_of_an_unknown_model() -> None:
    model = zoo.model("neox")
    model.gpt_neox.layers[0].extra = Gated()
    assert not any("extra" in name for name in resolve(model).modules)


def test_a_convolution_is_no_expert() -> None:
    model = zoo.model("neox")
    model.gpt_neox.layers[0].conv = nn.Conv1d(64, 64, 3)
    assert len(resolve(model).modules) == 8


@pytest.mark.parametrize("wanted", ["auto", "all-linear"])
def test_fused_experts_are_refused_where_they_would_stay_untrained(wanted: str) -> None:
    said = rf"adapter\.target_modules: {wanted} would leave most of this model \(qwen3_moe\) untrained.*k_proj"
    with pytest.raises(ModelError, match=said):
        resolve(zoo.model("moe"), target_modules=wanted)


def test_attention_of_a_model_with_experts_can_be_named() -> None:
    model = zoo.model("moe")
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj")
    wrapped = attach(model, AdapterOptions(), resolve(model, target_modules=leaves), "base")
    assert len(adapted_modules(wrapped)) == 8


def test_names_that_peft_moves_to_the_experts_are_refused_by_the_proof() -> None:
    model = zoo.model("moe")  # layer 0 is dense, layer 1 has the experts
    targets = resolve(model, target_modules=("gate_proj", "up_proj", "down_proj", "q_proj"))
    assert "model.layers.0.mlp.gate_proj" in targets.modules
    with pytest.raises(ModelError, match="would not train what the recipe says") as caught:
        attach(model, AdapterOptions(), targets, "base")
    assert "model.layers.0.mlp.gate_proj: meant, not adapted" in str(caught.value)
    assert "model.layers.1.mlp.experts" in str(caught.value)


def test_what_peft_itself_refuses_is_a_model_error() -> None:
    model = zoo.model("moe")
    with pytest.raises(ModelError, match=r"adapter\.target_modules: refused by PEFT .* without also targeting up_proj"):
        attach(model, AdapterOptions(), resolve(model, target_modules=("gate_proj",)), "base")


def test_the_proof_counts_what_is_missing_and_what_is_too_many() -> None:
    model = zoo.model("llama")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    meant = Targets(tuple(sorted(names(model.model, ("q_proj", "o_proj")))))
    with pytest.raises(ModelError, match=r"\(4 modules missed, 4 too many\)"):
        adapt._prove_coverage(wrapped, meant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_is_float32_and_alone_is_trained(dtype: torch.dtype, method: str) -> None:
    model = zoo.model("llama", dtype=dtype)
    options = AdapterOptions(method=method, r=5, lora_alpha=20, lora_dropout=0.25, use_rslora=True)  # type: ignore[arg-type]
    wrapped = attach(model, options, resolve(model, match("llama", "")), "org/base", "abc")
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == (3 if method == "dora" else 2) * 14
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for name, p in wrapped.named_parameters() if "lora_" not in name} == {dtype}
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 20, 0.25)
    assert (config.use_rslora, config.use_dora, config.bias) == (True, method == "dora", "none")
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "abc")


def test_one_seed_one_adapter() -> None:
    def made(seed: int) -> torch.Tensor:
        model = zoo.model("llama")
        targets = resolve(model, match("llama", ""))
        torch.manual_seed(seed)
        matrices = [p for n, p in attach(model, AdapterOptions(), targets, "b").named_parameters() if "lora_A" in n]
        return torch.cat([matrix.flatten() for matrix in matrices])

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


def test_layers_stored_transposed_are_declared_so() -> None:
    model = zoo.model("gpt2")
    targets = resolve(model, target_modules=("c_attn", "mlp.c_proj"))
    wrapped = attach(model, AdapterOptions(), targets, "base")
    assert wrapped.peft_config["default"].fan_in_fan_out is True
    assert len(adapted_modules(wrapped)) == 4
    plain = zoo.model("llama")
    config = attach(plain, AdapterOptions(), resolve(plain, match("llama", "")), "base").peft_config["default"]
    assert config.fan_in_fan_out is False


def test_layers_stored_in_two_ways_are_refused() -> None:
    model = zoo.model("gpt2")
    model.transformer.h[0].extra = nn.Linear(64, 64)
    with pytest.raises(ModelError, match="stored transposed"):
        attach(model, AdapterOptions(), resolve(model, target_modules=("c_attn", "extra")), "base")


def step(wrapped: PeftModel) -> None:
    """One step of plain descent on random rows."""
    tokens = zoo.ids()
    wrapped.train()
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def test_modules_that_did_not_move_are_named() -> None:
    model = zoo.model("llama")
    wrapped = attach(model, AdapterOptions(), resolve(model, match("llama", "")), "base")
    assert set(untrained_modules(wrapped)) == adapted_modules(wrapped).keys()
    assert len(untrained_modules(wrapped)) == 14
    model.model.layers[1].self_attn.o_proj.base_layer.weight.data.zero_()  # no gradient passes it at the first step
    step(wrapped)
    assert untrained_modules(wrapped) == [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    step(wrapped)  # by now o_proj's own adapter lets it through
    assert untrained_modules(wrapped) == []
