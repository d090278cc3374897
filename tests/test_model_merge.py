"""Merged weights are base plus adapter: against PEFT's own merge, against the quantised model, or refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.exports import merged as export
from finetune.families.family import Family
from finetune.model import quantise
from finetune.model.change import Change, Whole
from finetune.model.folder import INDEX, find
from finetune.model.layout import on_disk
from finetune.model.load import Precision, held_as, load_base
from finetune.model.merge import MergeReport, _plan_shards, merge_weights
from finetune.model.probe import gap, logits_of, probe_rows
from finetune.model.requantise import Requantiser, requantiser
from finetune.model.update import Update, read_adapter
from finetune.recipe.sections import ModelOptions

torch.set_num_threads(1)

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base: Any, seed: int = 3, **config: Any) -> PeftModel:
    """`base` with an adapter that has moved: random B, and magnitudes off their start."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **config}
    wrapped = get_peft_model(base, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    return wrapped.eval()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A base folder and an adapter folder for it."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Path]:
        how = {name: config.pop(name) for name in ("max_shard_size",) if name in config}
        zoo.folder(tmp_path / "base", kind, dtype=dtype, **how)
        trained(zoo.model(kind, dtype=dtype), **config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make


def merge(base: Path, adapter: Path, dtype: str = "auto", size: str = "5GB", **facts: Any) -> tuple[Path, dict]:
    """The export's folder and report."""
    output = base.parent / "merged"
    output.mkdir()
    return output, export.write(find(str(base)), adapter, output, dtype, size, "# card\n", facts, None)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What PEFT and transformers write for the same."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(base.parent / "theirs")
    return weights(base.parent / "theirs")


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], changed: int) -> None:
    """Equal names, shapes and dtypes; values to 1e-6; and `ours` is not simply the base."""
    assert ours.keys() == theirs.keys()
    assert len(ours) >= changed >= 1
    for name, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype), name
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


GLM4 = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 14),
    "head shared with the embedding": ("tied", {}, 14),
    "biases": ("qwen2", {}, 14),
    "qwen3": ("qwen3", {}, 14),
    "fused gate and up": ("glm4", {"target_modules": GLM4}, 12),
    "rsLoRA": ("llama", {"use_rslora": True, "r": 6}, 14),
    "DoRA": ("llama", {"use_dora": True}, 14),
    "DoRA with rsLoRA": ("llama", {"use_dora": True, "use_rslora": True}, 14),
    "r = 1": ("llama", {"r": 1, "lora_alpha": 1}, 14),
    "r above the dimension": ("llama", {"r": 100}, 14),
    "one module": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}, 1),
    "part of the layers": ("llama", {"layers_to_transform": [1]}, 7),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, "^model.layers.0.mlp.gate_proj": 3},
            "alpha_pattern": {"v_proj": 64, "model.layers.1.self_attn.q_proj": 3, "down_.*": 5},
        },
        14,
    ),
    "patterns with rsLoRA": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 9}}, 14),
    "gaussian start": ("llama", {"init_lora_weights": "gaussian"}, 14),
    "DoRA, stored transposed": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        6,
    ),
    "stored transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_those_of_peft(make: Callable[..., Any], case: str) -> None:
    kind, config, changed = CASES[case]
    base, adapter = make(kind, **config)
    output, report = merge(base, adapter)
    close(weights(output), peft_merge(base, adapter), changed)
    before = weights(base)
    differ = [name for name, tensor in weights(output).items() if not torch.equal(tensor, before[name])]
    assert len(differ) == report["merged_tensors"] == changed
    assert report["merged_tensors"] + report["copied_tensors"] == len(before)
    assert report["kept_of_update"] == 1.0
    assert report["r"] == config.get("r", 4)


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
def test_the_merged_folder_answers_like_base_plus_adapter(make: Callable[..., Any], kind: str) -> None:
    base, adapter = make(kind)
    output, _ = merge(base, adapter)
    rows = zoo.ids().tolist()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with_adapter = logits_of(model, rows)
    with model.disable_adapter():
        without = logits_of(model, rows)
    after = logits_of(AutoModelForCausalLM.from_pretrained(output), rows)
    assert gap(with_adapter, after).max_logit < 1e-4
    assert gap(with_adapter, without).max_logit > 0.1
    assert gap(with_adapter, after).top1 == 1.0


def test_bfloat16_weights_are_the_float32_sum_rounded_once(make: Callable[..., Any]) -> None:
    base, adapter = make(dtype=torch.bfloat16)
    output, report = merge(base, adapter)
    _, updates = read_adapter(adapter)
    ours, before = weights(output), weights(base)
    for name, tensor in before.items():
        exact = tensor.float()
        if name in updates:
            exact = exact + 2.0 * updates[name].b @ updates[name].a
        assert torch.equal(ours[name], exact.to(torch.bfloat16)), name
    assert len(updates) == 14
    assert 0.99 < report["kept_of_update"] < 1.01


def test_what_rounding_leaves_of_a_tiny_update_is_measured(make: Callable[..., Any]) -> None:
    base, adapter = make(dtype=torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    save_file({name: t * (3e-5 if "lora_B" in name else 1) for name, t in load_file(file).items()}, file)
    output, report = merge(base, adapter)
    assert report["kept_of_update"] < 0.9
    shutil.rmtree(output)
    assert merge(base, adapter, "float32")[1]["kept_of_update"] == 1.0


@given(st.floats(0.01, 10), st.integers(1, 40))
def test_the_share_that_survived_is_one_where_nothing_was_rounded(scale: float, count: int) -> None:
    report = MergeReport()
    update = torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale
    report.count(update, update)
    assert report.kept_of_update == 1.0
    report.count(update, torch.zeros(count))
    assert report.kept_of_update == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_dtype_asked_for_and_config_says_so(
    make: Callable[..., Any], dtype: str, stored: torch.dtype
) -> None:
    base, adapter = make(dtype=stored)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "float64", "rope_theta": 12.5}))
    output, report = merge(base, adapter, dtype)
    found = weights(output)
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    written = json.loads((output / "config.json").read_text())
    assert written == {**config, "dtype": dtype, "torch_dtype": dtype, "rope_theta": 12.5}
    assert report["bytes"] == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(output).dtype == getattr(torch, dtype)


def test_whole_numbers_keep_their_dtype(make: Callable[..., Any]) -> None:
    base, adapter = make()
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "positions": torch.arange(5)}, base / "model.safetensors", {"format": "pt"})
    output, _ = merge(base, adapter, "bfloat16")
    assert torch.equal(weights(output)["positions"], torch.arange(5))


def test_an_overflow_is_refused(make: Callable[..., Any]) -> None:
    base, adapter = make()
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 70000.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"lm_head\.weight: not every number is finite in float16"):
        merge(base, adapter, "float16")


@pytest.mark.parametrize("shards_in", ["5GB", "100KB"])
@pytest.mark.parametrize("size", ["5GB", "0.1MB", "0.001MB"])
def test_files_are_split_as_asked_and_load_again(make: Callable[..., Any], shards_in: str, size: str) -> None:
    base, adapter = make(max_shard_size=shards_in)
    output, report = merge(base, adapter, size=size)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert report["files"] == files
    assert (len(files) > 1) == (size != "5GB")
    assert (output / INDEX).exists() == (len(files) > 1)
    close(weights(output), peft_merge(base, adapter), 14)
    if len(files) > 1:
        index = json.loads((output / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(output).values())
        assert {name: file for file in files for name in load_file(output / file)} == index["weight_map"]
        limit = float(size[:-2]) * 1e6
        assert all(
            sum(t.nbytes for t in load_file(output / file).values()) <= limit or len(load_file(output / file)) == 1
            for file in files
        )
    assert find(str(output)).weights == tuple(output / file for file in files)


@given(st.lists(st.integers(1, 5_000_000), max_size=30), st.integers(1, 9))
def test_a_plan_keeps_order_and_size(sizes: list[int], limit: int) -> None:
    names = {str(number): size for number, size in enumerate(sizes)}
    shards = _plan_shards(names, f"{limit}MB")
    assert [name for shard in shards for name in shard] == list(names)
    assert all(len(shard) == 1 or sum(names[name] for name in shard) <= limit * 10**6 for shard in shards if shard)
    assert all(shards) or not sizes


def test_everything_else_is_copied_byte_for_byte(make: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = make()
    extra = {"LICENSE": "MIT", "chat_template.jinja": "{{ messages }}", "modeling_x.py": "pass"}
    left = [
        "README.md", "proof.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "manifest.json",
        "evaluation.json", "finetune.json", "adapter_config.json", "model.safetensors.index.json",
    ]  # fmt: skip
    for name in (*extra, *left):
        (base / name).write_text(extra.get(name, "{}"))
    output, _ = merge(base, adapter)
    kept = {path.name for path in base.iterdir()} - set(left) - {"model.safetensors"}
    assert {path.name for path in output.iterdir()} == kept | {"model.safetensors", "README.md"}
    assert len(kept) >= 5
    assert all((output / name).read_bytes() == (base / name).read_bytes() for name in kept)
    assert (output / "README.md").read_text() == "# card\n"


def test_a_tokenizer_beside_the_adapter_replaces_the_bases(make: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = make()
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "added_tokens.json", "config.json"):
        (adapter / name).write_text(f"new {name}")
    output = tmp_path / "merged"
    output.mkdir()
    export.write(find(str(base)), adapter, output, "auto", "5GB", "", {}, adapter)
    assert (output / "tokenizer.json").read_text() == "new tokenizer.json"
    assert (output / "chat_template.jinja").read_text() == "new chat_template.jinja"
    assert (output / "merges.txt").exists()
    assert (output / "added_tokens.json").exists()
    assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()


# -- refusals ------------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), r"is no adapter: adapter_config\.json is missing"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "is no adapter: adapter_model"),
    "broken config": (lambda a: (a / "adapter_config.json").write_text("{"), "the adapter is damaged"),
    "config of a list": (lambda a: (a / "adapter_config.json").write_text("[1]"), "the adapter is damaged"),
    "no alpha": (_config(lora_alpha="gone"), "the adapter is damaged: .*no lora_alpha"),
    "half a file": (
        lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:-9]),
        "the adapter is damaged",
    ),
    "another method": (_config(peft_type="LOHA"), "LOHA adapters cannot be merged here"),
    "bias of the adapter": (_config(lora_bias=True), "adapters with lora_bias"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "says modules_to_save: lm_head, and"),
    "a changed base": (_config(init_lora_weights="pissa_niter_4"), "adapters with init_lora_weights"),
    "a changed base, OLoRA": (_config(init_lora_weights="olora"), "adapters with init_lora_weights"),
    "repeated layers": (_config(layer_replication=[[0, 2], [1, 2]]), "adapters with layer_replication"),
    "single tokens": (_config(trainable_token_indices=[1]), r"says trainable_token_indices: \[1\], and"),
    "an aLoRA": (_config(alora_invocation_tokens=[1]), "adapters with alora_invocation_tokens"),
    "QA-LoRA": (_config(use_qalora=True), "adapters with use_qalora"),
    "two at once": (_config(lora_bias=True, use_qalora=True), "lora_bias, use_qalora"),
    "DoRA without magnitudes": (_config(use_dora=True), "has no lora_magnitude_vector"),
    "no B": (_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "q_proj has lora_A and no lora_B"),
    "no A": (_tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), "no LoRA matrices are not merged here: .*q_proj.lora_B"),
    "a head": (_tensors(lambda t: t.update(lm_head=torch.ones(2))), "no LoRA matrices are not merged here: lm_head"),
    "a magnitude": (
        _tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        "has a lora_magnitude_vector and no use_dora",
    ),
    "nothing": (_tensors(lambda t: t.clear()), "holds no LoRA matrices"),
    "other ranks": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 64)})),
        r"q_proj has lora_A \(3, 64\) and lora_B \(64, 4\)",
    ),
    "another shape": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)})),
        r"1 adapter weights do not fit .*\n  .*q_proj\.weight: \(64, 64\) in the base, \(64, 32\) in the adapter",
    ),
    "another base": (
        _tensors(
            lambda t: t.update(
                {name.replace("layers.1", "layers.7"): t.pop(name) for name in list(t) if "layers.1" in name}
            )
        ),
        r"7 adapter weights do not fit.*\n(  model\.layers\.7\S+: no such tensor in the base\n){7}name the base the",
    ),
    "not a number": (
        _tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(math.nan)),
        r"q_proj\.weight: not every number is finite in float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_rightly_is_refused(make: Callable[..., Any], case: str) -> None:
    damage, said = REFUSED[case]
    base, adapter = make()
    damage(adapter)
    with pytest.raises(ExportError, match=said):
        merge(base, adapter)
    assert list((base.parent / "merged").iterdir()) == []


def test_a_base_that_is_quantised_on_disk_is_refused(make: Callable[..., Any]) -> None:
    base, adapter = make()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="is stored in GPTQ, which no merge reads; merge onto its"):
        merge(base, adapter)
    assert list((base.parent / "merged").iterdir()) == []


def test_a_tensor_that_is_no_float_cannot_be_adapted(make: Callable[..., Any]) -> None:
    base, adapter = make()
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj\.weight: stored as I8; dequantise the base first"):
        merge(base, adapter)


# -- quantised bases -----------------------------------------------------------------------------------------------

with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the quant extra is not installed"
)


def quantised(base: Path, kind: str, compute: str = "float32") -> Any:
    """The base as a QLoRA run loads it."""
    options = ModelOptions(name_or_path=str(base), quantization=kind)  # type: ignore[arg-type]
    return load_base(options, find(str(base)), Precision(compute, kind), "eager")


def facts_of(model: Any, kind: str, compute: str = "float32") -> dict[str, Any]:
    """What finetune.json says of the quantisation."""
    held = quantise.quantised(model, kind, compute)
    assert held is not None
    return held.facts()


def own_weight(module: LoraLayer) -> Tensor:
    """The numbers a quantised layer stands for, by bitsandbytes' own means."""
    import bitsandbytes.functional as bnb

    weight = module.get_base_layer().weight
    if hasattr(weight, "quant_state") and weight.quant_state is not None:
        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.CB.float() * weight.SCB[:, None].float() / 127.0


@with_bitsandbytes
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_merged_as_it_was_trained_on(tmp_path: Path, kind: str, compute: str) -> None:
    base = zoo.folder(tmp_path / "base", "qwen2", hidden_size=128, intermediate_size=256, head_dim=32)
    model = quantised(base, kind, compute)
    facts = facts_of(model, kind, compute)
    assert len(facts["modules"]) == 14
    wrapped = trained(model, target_modules=["q_proj", "down_proj"])
    wrapped.save_pretrained(tmp_path / "adapter")
    output, report = merge(base, tmp_path / "adapter", quantization=facts)
    assert (report["merged_tensors"], report["copied_tensors"]) == (4, len(weights(base)) - 4)
    ours, before = weights(output), weights(base)
    _, updates = read_adapter(tmp_path / "adapter")
    layers = dict(wrapped.get_base_model().named_modules())
    for module in facts["modules"]:
        name = f"{module}.weight"
        layer = layers[module]
        expected = own_weight(layer if isinstance(layer, LoraLayer) else _Plain(layer))
        if name in updates:
            expected = expected + 2.0 * updates[name].b @ updates[name].a
        torch.testing.assert_close(ours[name], expected.to(ours[name].dtype), rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours[name], before[name])
    rest = before.keys() - {f"{module}.weight" for module in facts["modules"]}
    assert len(rest) >= 5
    assert all(torch.equal(ours[name], before[name]) for name in rest)


class _Plain:
    """A layer without an adapter, where one with is expected."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def get_base_layer(self) -> Any:
        return self.layer


@with_bitsandbytes
@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16])
def test_a_proof_in_float32_holds_the_blocks_that_training_in_bfloat16_had(tmp_path: Path, files: torch.dtype) -> None:
    """Of linear layers and of experts: the same bytes, which stand for the same numbers, and products in float32."""
    base = zoo.folder(tmp_path / "base", "moe", dtype=files)
    options = ModelOptions(name_or_path=str(base), quantization="nf4")
    in_training = load_base(options, find(str(base)), Precision("bfloat16", "nf4"), "eager")
    proof = Precision("float32", "nf4", quantised_from="bfloat16")
    in_proof = load_base(options, find(str(base)), proof, "eager")
    held = quantise.quantised(in_training, "nf4", "bfloat16")
    assert held is not None
    assert held == quantise.quantised(in_proof, "nf4", "bfloat16")
    assert len(held.modules) >= 8
    assert len(held.experts) >= 2
    seen: list[torch.dtype] = []
    for name in held.modules:
        ours, theirs = (model.get_submodule(name) for model in (in_proof, in_training))
        assert torch.equal(ours.weight.data, theirs.weight.data)
        values = [own_weight(_Plain(one)) for one in (ours, theirs)]  # type: ignore[arg-type]
        assert torch.equal(*values)
        ours.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer.dtype))
    for name in held.experts:
        place, _, leaf = name.rpartition(".")
        ours, theirs = (model.get_submodule(place) for model in (in_proof, in_training))
        for expert in range(ours.num_experts):
            assert torch.equal(ours.slice_of(leaf, expert).whole(), theirs.slice_of(leaf, expert).whole())
        ours.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer.dtype))
    with torch.no_grad():
        assert in_proof(zoo.ids()).logits.dtype == torch.float32
    assert set(seen) == {torch.float32}
    other = load_base(options, find(str(base)), Precision("float32", "nf4"), "eager")
    same = [
        torch.equal(other.get_submodule(name).weight.data, in_training.get_submodule(name).weight.data)
        for name in held.modules
    ]
    assert all(same) == (files == torch.bfloat16), "from bfloat16 files the bytes are the same either way"


@with_bitsandbytes
@pytest.mark.parametrize("compute", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_wherever_it_is_loaded_a_base_holds_the_blocks_of_training(tmp_path: Path, kind: str, compute: str) -> None:
    """From files in float32: the bytes of a training in bfloat16 in a proof and in another precision, the rest in that;
    and the configuration can still be written down.
    """
    base = zoo.folder(tmp_path / "base", "moe")
    options = ModelOptions(name_or_path=str(base), quantization=kind)  # type: ignore[arg-type]
    in_training = load_base(options, find(str(base)), Precision("bfloat16", kind), "eager")
    held = quantise.quantised(in_training, kind, "bfloat16")
    assert held is not None
    kept = held_as(held.facts(), compute)
    again = load_base(options, find(str(base)), kept, "eager")
    assert held == quantise.quantised(again, kind, "bfloat16")
    for name in held.modules:
        ours, theirs = (model.get_submodule(name) for model in (again, in_training))
        assert torch.equal(ours.weight.data, theirs.weight.data)
        values = [own_weight(_Plain(one)) for one in (ours, theirs)]  # type: ignore[arg-type]
        assert torch.equal(*values)
    for name in held.experts:
        place, _, leaf = name.rpartition(".")
        ours, theirs = (model.get_submodule(place) for model in (again, in_training))
        assert torch.equal(ours.slice_of(leaf, 0).whole(), theirs.slice_of(leaf, 0).whole())
        assert ours.compute_dtype == getattr(torch, compute)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert getattr(again, name)().weight.dtype == getattr(torch, compute)
    with torch.no_grad():
        assert again(zoo.ids()).logits.dtype == getattr(torch, compute)
    assert kind.removeprefix("nf").removeprefix("int") + "bit" in again.config.to_json_string()
    plain = load_base(options, find(str(base)), Precision(compute, kind), "eager")
    assert not all(
        torch.equal(plain.get_submodule(name).weight.data, in_training.get_submodule(name).weight.data)
        for name in held.modules
    ), "what rounding first is for"


def test_a_base_is_held_as_in_training_and_rounded_first_only_where_that_differs() -> None:
    assert held_as({}, "float32") == Precision("float32", "float32")
    facts = {"kind": "int8", "compute_dtype": "bfloat16"}
    assert held_as(facts, "float32") == Precision("float32", "int8", quantised_from="bfloat16")
    assert held_as(facts, "bfloat16") == Precision("bfloat16", "int8")


@with_bitsandbytes
def test_an_nf4_merge_answers_like_the_quantised_model_and_not_like_the_plain_one(tmp_path: Path) -> None:
    base = zoo.folder(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256, head_dim=32)
    model = quantised(base, "nf4")
    facts = facts_of(model, "nf4")
    trained(model, seed=4).save_pretrained(tmp_path / "adapter")
    rows = zoo.ids().tolist()
    with_adapter = logits_of(model, rows)
    output, _ = merge(base, tmp_path / "adapter", quantization=facts)
    right = gap(with_adapter, logits_of(AutoModelForCausalLM.from_pretrained(output), rows))
    shutil.rmtree(output)
    output, _ = merge(base, tmp_path / "adapter")
    wrong = gap(with_adapter, logits_of(AutoModelForCausalLM.from_pretrained(output), rows))
    assert right.max_logit < 1e-3
    assert wrong.mean_kl > 100 * max(right.mean_kl, 1e-9)


@with_bitsandbytes
def test_a_layer_quantised_in_training_and_absent_now_is_refused(make: Callable[..., Any]) -> None:
    base, adapter = make()
    facts = {"kind": "nf4", "compute_dtype": "float32", "modules": ["model.layers.5.mlp.up_proj"]}
    with pytest.raises(ExportError, match=r"layers\.5\.mlp\.up_proj\.weight: quantised in training, no such tensor"):
        merge(base, adapter, quantization=facts)
    assert list((base.parent / "merged").iterdir()) == []


@with_bitsandbytes
@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"kind": "nf4"}, r"finetune\.json: its quantization cannot be read"),
        ({"kind": "nf4", "modules": 3, "compute_dtype": "float32"}, "cannot be read"),
        ({"kind": "nf4", "modules": [], "compute_dtype": "float99"}, "cannot be read"),
        ({"kind": "nf4", "modules": [], "compute_dtype": "nn"}, "no quantisation known here"),
        ({"kind": "fp3", "modules": [], "compute_dtype": "float32"}, "fp3 in .* is no quantisation known here"),
    ],
)
def test_damaged_facts_are_refused(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        requantiser(facts)


def test_without_facts_nothing_is_requantised() -> None:
    weight = torch.randn(8, 8)
    assert requantiser({}) == Requantiser()
    assert requantiser({})("a.weight", weight) is weight


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (3, 6, 4)])
def test_the_change_of_a_weight_that_files_split_is_that_of_its_parts(shape: tuple[int, ...], whole: bool) -> None:
    """With DoRA's magnitudes where one row of them belongs to a row of the weight."""
    torch.manual_seed(0)
    experts, ends = shape[:-2], {"a.gate_up.weight": ("b.gate.weight", "b.up.weight")}
    weight = torch.randn(shape)
    magnitude = torch.rand(6) if len(shape) == 2 else None
    change: Change = (
        Whole(torch.randn(shape))
        if whole or len(shape) == 1
        else Update(torch.randn(*experts, 2, 4), torch.randn(*experts, 6, 2), 0.5, magnitude)
    )
    family = Family("split", ("split",), (), (), "None.", stored=ends)
    names = ["layers.0.b.gate.weight", "layers.0.b.up.weight"]
    name = "layers.0.a.gate_up.weight"
    found = on_disk({name: change}, names, family)
    if len(shape) == 1:
        assert found == {name: change}, "a bias is no weight of rows"
        return
    assert list(found) == names
    parts = [found[one].apply(part)[0] for one, part in zip(names, weight.chunk(2, dim=-2), strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=-2), change.apply(weight)[0], rtol=1e-6, atol=1e-6)
    assert on_disk({name: change}, names[:1], family) == {name: change}


@with_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_that_files_split_is_quantised_as_the_one_that_memory_holds(kind: str) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(7, 40), torch.randn(7, 40) * 9  # no whole number of blocks of 64: one of them spans both
    names = {"layers.0.gate.weight": gate, "layers.0.up.weight": up}
    stored = {"gate_up.weight": ("gate.weight", "up.weight")}
    family = Family("split", ("split",), (), (), "None.", stored=stored)
    asked = Requantiser(kind, torch.float32, frozenset({"layers.0.gate_up"}))
    assert asked.by_file({}, family).needed() == ["layers.0.gate_up.weight"]
    split = asked.by_file(names, family)
    assert split.needed() == list(names)
    apart = [split(name, weight, names.__getitem__) for name, weight in names.items()]
    assert torch.equal(torch.cat(apart), asked("layers.0.gate_up.weight", torch.cat([gate, up])))


@with_bitsandbytes
def test_an_evaluation_between_two_steps_changes_no_quantised_weight(tmp_path: Path) -> None:
    base = zoo.folder(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256, head_dim=32)
    wrapped = trained(quantised(base, "nf4"))
    tokens = zoo.ids()

    def gradient() -> Tensor:
        wrapped.train()
        wrapped.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        return torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None])

    before = gradient()
    logits_of(wrapped, tokens.tolist())
    assert before.norm() > 0
    assert torch.equal(gradient(), before)


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["experts.down_proj"]])
def test_experts_of_one_kind_alone_are_merged(make: Callable[..., Any], targets: list[str]) -> None:
    base, adapter = make("moe", target_modules=["q_proj"], target_parameters=targets)
    output, report = merge(base, adapter)
    assert report["merged_tensors"] == 2 + 4 * (2 if "gate" in targets[0] else 1)
    rows = zoo.ids().tolist()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    after = logits_of(AutoModelForCausalLM.from_pretrained(output), rows)
    assert gap(logits_of(model, rows), after).max_logit < 1e-4


def test_an_adapter_that_peft_moved_to_the_experts_is_merged(make: Callable[..., Any]) -> None:
    base, adapter = make("moe", target_modules=LLAMA)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r".*\.gate_up_proj": 8}
    output, _ = merge(base, adapter)
    rows = zoo.ids().tolist()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    after = logits_of(AutoModelForCausalLM.from_pretrained(output), rows)
    assert gap(logits_of(model, rows), after).max_logit < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_parameters": ["experts.gate_up_proj_bias"]}, "adapted parameters .gate_up_proj_bias. that are not"),
        ({"r": 3}, "is no multiple of r = 3"),
        ({"rank_pattern": {"down_proj": 32}}, "is no multiple of r = 32"),
    ],
)
def test_experts_that_do_not_fit_their_config_are_refused(make: Callable[..., Any], changes: Any, said: str) -> None:
    base, adapter = make("moe", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ExportError, match=said):
        merge(base, adapter)


def test_a_base_that_lacks_an_expert_is_refused(make: Callable[..., Any]) -> None:
    base, adapter = make("moe", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    tensors = weights(base)
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: no such tensor in the base"):
        merge(base, adapter)


# -- parts ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_an_update_is_scale_b_a(rows: int, columns: int, r: int, transposed: bool) -> None:
    draw = torch.Generator().manual_seed(rows * 100 + columns * 10 + r)
    a, b = torch.randn(r, columns, generator=draw), torch.randn(rows, r, generator=draw)
    weight = torch.randn((columns, rows) if transposed else (rows, columns), generator=draw)
    merged, change = Update(a, b, 0.5, transposed=transposed).apply(weight)
    delta = 0.5 * torch.einsum("or,ri->oi", b, a)
    torch.testing.assert_close(merged, weight + (delta.T if transposed else delta))
    torch.testing.assert_close(change, merged - weight)


def test_a_merge_into_a_folder_needs_no_adapter_file(tmp_path: Path) -> None:
    base = find(str(zoo.folder(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    update = Update(torch.ones(1, 64), torch.ones(64, 1), 2.0)
    name = "model.layers.0.self_attn.q_proj.weight"
    report = merge_weights(base, {name: update}, tmp_path / "out", "auto", "5GB", Requantiser())
    assert report.merged == [name]
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    torch.testing.assert_close(after[name], before[name] + 2.0)


def test_probe_rows_are_the_runs_own_or_built_in_texts() -> None:
    assert probe_rows([[1, 2], [], [3] * 999], lambda text: [0]) == [[1, 2], [3] * 256]
    built_in = probe_rows(None, lambda text: list(text.encode()))
    assert len(built_in) >= 5
    assert probe_rows([], lambda text: list(text.encode())) == built_in


def test_a_gap_is_measured_over_all_positions() -> None:
    a = [torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 5.0]])]
    b = [torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 5.0]])]
    found = gap(a, b)
    assert (found.max_logit, found.positions) == (2.0, 3)
    assert found.top1 == pytest.approx(2 / 3)
    p, q = a[1 - 1][1].softmax(-1), b[0][1].softmax(-1)
    assert found.mean_kl == pytest.approx(float((p * (p / q).log()).sum()) / 3, rel=1e-5)
    assert gap(a, a).mean_kl == 0
    assert found.facts().keys() == {"max_logit", "mean_kl", "top1", "positions"}
