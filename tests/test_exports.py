"""What training leaves, an adapter for plain PEFT or whole weights, is reopened and compared before it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import ExportError, RefusedError
from finetune.exports import adapter as adapter_export
from finetune.exports import merged as merged_export
from finetune.exports import weights as weights_export
from finetune.families import match
from finetune.model.adapt import attach
from finetune.model.folder import find
from finetune.model.probe import gap, logits_of
from finetune.model.targets import resolve_targets
from finetune.model.twin import family_twin
from finetune.recipe.sections import AdapterOptions

torch.set_num_threads(1)


def trained(moved: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = zoo.model("llama", dtype=dtype)
    chosen = AdapterOptions(r=4, **options)
    torch.manual_seed(2)
    wrapped = attach(model, chosen, resolve_targets(model, chosen, match("llama", "")), "org/base")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and moved:
                parameter.normal_(std=0.1)
    return wrapped


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_peft_loads_the_adapter_and_answers_alike(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    model = trained(dtype=dtype, method=method)
    proof = adapter_export.write(model, tmp_path / "adapter", "# card\n", {"base": {"name": "org/base"}})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert proof == {
        "tensors": len(tensors),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": file.stat().st_size,
    }
    assert len(tensors) == (42 if method == "dora" else 28)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    again = PeftModel.from_pretrained(zoo.model("llama", dtype=dtype), str(tmp_path / "adapter"))
    rows = zoo.ids().tolist()
    assert gap(logits_of(model, rows), logits_of(again, rows)).max_logit < (1e-5 if dtype == torch.float32 else 0.1)
    assert gap(logits_of(again, rows), logits_of(zoo.model("llama", dtype=dtype), rows)).max_logit > 0.1


def test_the_folder_holds_what_a_reader_and_a_merge_need(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    tokenizer.chat_template = "{{ messages }} mine"
    adapter_export.write(trained(), tmp_path / "plain", "# card\n", {"quantization": None})
    adapter_export.write(trained(), tmp_path / "with", "# card\n", {"quantization": None}, tokenizer)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json", "manifest.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "plain" / "finetune.json").read_text()) == {"quantization": None}
    assert (tmp_path / "plain" / "README.md").read_text() == "# card\n"
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("org/base", 4)
    assert AutoTokenizer.from_pretrained(tmp_path / "with").chat_template == "{{ messages }} mine"


def test_an_adapter_that_did_not_move_is_no_product(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not the trained one:\n(  \S+lora_B\S*: empty or all zero\n?){10}$"):
        adapter_export.write(trained(moved=False), tmp_path / "adapter", "", {})
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(RefusedError, match="exists already"):
        adapter_export.write(trained(), tmp_path / "adapter", "", {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(n), "not in the file"),
        (lambda t, n: t.update(more=torch.ones(1)), "more: in the file, not trained"),
        (lambda t, n: t[n].add_(1e-3), "other values"),
        (lambda t, n: t.update({n: t[n].bfloat16()}), r"torch\.bfloat16 .*, not torch\.float32"),
        (lambda t, n: t.update({n: t[n][:1].clone()}), r"\(1, 64\), not torch\.float32 \(4, 64\)"),
    ],
)
def test_a_file_that_differs_from_what_was_trained_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    model = trained()
    save = model.save_pretrained

    def damaged(folder: str, **how: Any) -> None:
        save(folder, **how)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors, next(name for name in sorted(tensors) if "q_proj.lora_A" in name))
        save_file(tensors, file)

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(ExportError, match=said):
        adapter_export.write(model, tmp_path / "adapter", "", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "glm4", "moe"])
def test_whole_weights_load_again_and_answer_alike(tmp_path: Path, kind: str) -> None:
    model = zoo.model(kind)
    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    proof = weights_export.write(model, tokenizer, tmp_path / "model", "# card\n")
    assert proof["parameters"] == sum(p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = zoo.ids().tolist()
    assert gap(logits_of(model, rows), logits_of(again, rows)).max_logit < 1e-5
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template
    assert proof["stops_added"] == []


def test_whole_weights_that_files_hold_in_other_pieces_are_compared_too(tmp_path: Path) -> None:
    family = match("kimi_linear", "")
    assert family is not None
    model = family_twin(family)
    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    weights_export.write(model, tokenizer, tmp_path / "model", "")
    assert not model.state_dict().keys() <= load_file(tmp_path / "model" / "model.safetensors").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_exported_models_stop_where_trained_answers_end(tmp_path: Path) -> None:
    base = zoo.folder(tmp_path / "base", "llama")
    named = json.loads((base / "generation_config.json").read_text()).get("eos_token_id")
    model, tokenizer = zoo.model("llama"), AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    proof = weights_export.write(model, tokenizer, tmp_path / "model", "", [7, 9])
    assert proof["stops_added"] == [7, 9]
    facts = {"base": {"name": "org/base"}, "quantization": None, "stops": {"ends": [7]}}
    adapter_export.write(trained(), tmp_path / "adapter", "", facts)
    (tmp_path / "merged").mkdir()
    report = merged_export.write(
        find(str(base)), tmp_path / "adapter", tmp_path / "merged", "auto", "5GB", "", facts, None
    )
    assert report["stops_added"] == [7]
    for exported, added in (("model", {7, 9}), ("merged", {7})):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / exported)
        stops = loaded.generation_config.eos_token_id
        found = set(stops) if isinstance(stops, list) else {stops}
        assert found - ({named} if isinstance(named, int) else set(named or ())) == added


@pytest.mark.parametrize("change", ["value", "missing", "dtype"])
def test_weights_that_differ_from_what_was_trained_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = zoo.model("llama")
    save = model.save_pretrained

    def damaged(folder: str) -> None:
        save(folder)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        if change == "value":
            tensors["model.norm.weight"][3] += 1e-4
        elif change == "dtype":
            tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
        else:
            del tensors["model.norm.weight"]
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", damaged)
    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        weights_export.write(model, tokenizer, tmp_path / "model", "")
    assert list(tmp_path.iterdir()) == []
