"""`finetune rehearse`: what it plays, what it says, and that it ends as the story that fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import PLACE
from tiny import Lab

from finetune.errors import ModelError
from finetune.families import FAMILIES
from finetune.model.folder import Base
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes
from finetune.registry import resolve
from finetune.stage import find_model

KEYS = {
    "recipe", "base", "model_type", "family", "twin", "processes", "steps", "seconds", "folder", "covered",
    "not_covered",
}  # fmt: skip


def rehearse(lab: Lab, changes: dict[str, Any], *words: str) -> Any:
    """`finetune rehearse` on a recipe with `changes`, with a temporary folder that the lab can look into."""
    (lab / "tmp").mkdir(exist_ok=True)
    given = ("rehearse", lab.recipe(changes), "--steps", "2", *words)
    return lab.warm.run(*given, cwd=lab.folder, entry="forked:main", env={**PLACE, "TMPDIR": str(lab / "tmp")})


def parts(told: list[dict[str, str]]) -> dict[str, str]:
    return {line["part"]: line["text"] for line in told}


def test_a_rehearsal_takes_config_and_tokenizer_of_the_base_and_leaves_nothing(lab: Lab) -> None:
    facts = rehearse(lab, {"data.validation": "held.jsonl", "data.packing": True}, "--json").ok().json
    assert facts.keys() == KEYS
    assert (facts["model_type"], facts["family"], facts["processes"], facts["folder"]) == ("llama", "llama", 1, None)
    told = parts(facts["covered"])
    assert {
        "targets",
        "data",
        "masks",
        "stops",
        "packing",
        "train",
        "validate",
        "save",
        "merge",
        "proof",
    } <= told.keys()
    assert "22 of 22" in told["masks"]
    figures = {line["part"]: line["figures"] for line in facts["covered"]}
    assert figures["masks"] == {"answers": 22, "as_served": 22}
    assert len(figures["train"]["losses"]) == facts["steps"] == figures["train"]["steps"]
    assert figures["proof"]["loss"] < 0.05
    assert figures["save"]["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    left = parts(facts["not_covered"])
    assert {"hardware", "weights", "learning"} <= left.keys()
    assert "tokenizer" not in left, "the base's own tokenizer is here"
    assert not any((lab / "tmp").iterdir())
    assert not (lab / "run").exists()


def test_what_is_drawn_are_the_lines_of_the_json(lab: Lab) -> None:
    outcome = rehearse(lab, {"evaluate": {"data": "held.jsonl"}}, "--keep", "kept", "training.weight_decay=0.25").ok()
    for line in ("covered", "not covered", "  evaluate  4 rows", "  proof     reloaded from disk"):
        assert line in outcome.stdout
    assert "everything stands in kept" in outcome.stdout
    assert load_recipe(lab / "kept/run/recipe.yaml").recipe.training.weight_decay == 0.25
    assert (lab / "kept/run/merged/model.safetensors").is_file()
    again = rehearse(lab, {}, "--keep", "kept")
    assert again.returncode == 5
    assert "--keep: kept exists already" in again.stderr


def test_rows_that_are_not_here_are_made_in_the_declared_format_and_that_is_said(lab: Lab) -> None:
    sources = [{"path": "none.jsonl", "format": "alpaca", "columns": {"output": "answer"}}, "owner/dataset"]
    facts = rehearse(lab, {"data.train": sources, "data.validation": "gone.jsonl"}, "--json").ok().json
    left = [line["text"] for line in facts["not_covered"] if line["part"] == "data"]
    assert len(left) == 3
    assert left[0].startswith("none.jsonl does not exist: 48 made rows")
    assert left[1].startswith("owner/dataset is a data set of the hub: 48 made rows")
    assert "96 rows" in parts(facts["covered"])["data"]
    assert "validate" in parts(facts["covered"])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"training.learning_rates": 1}, 2),
        ({"model.name_or_path": "./nowhere"}, 5),
        ({"training.method": "sfx"}, 2),
        ({"training.global_batch_size": 6, "training.per_device_train_batch_size": 4}, 2),
        ({"adapter.target_modules": ["q_projj"]}, 5),
        ({"data.train": "broken.jsonl"}, 3),
        ({"data.max_length": 8}, 3),
    ],
)
def test_a_fault_ends_a_rehearsal_as_it_ends_training(lab: Lab, changes: dict[str, Any], code: int) -> None:
    (lab / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi."}]}\n')
    trained, found = lab.train(changes), rehearse(lab, changes)
    assert (trained.returncode, found.returncode) == (code, code)
    assert not any((lab / "tmp").iterdir())

    def said(text: str) -> str:
        """The error alone, without the names of the base."""
        error = text[text.index("error: ") :]
        return re.sub(r"\S*(chatml|/base)\b", "BASE", error)

    assert said(found.stderr) == said(trained.stderr)


def test_a_launcher_is_refused(lab: Lab) -> None:
    outcome = lab.warm.run("rehearse", lab.recipe(), cwd=lab.folder, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert outcome.returncode == 2
    assert "run it without a launcher" in outcome.stderr


def test_layers_named_by_number_are_there_as_in_the_real_model(lab: Lab) -> None:
    config = {"model_type": "qwen3", "num_hidden_layers": 5, "hidden_size": 1024, "vocab_size": 500}
    (lab / "config-alone").mkdir()
    (lab / "config-alone/config.json").write_text(json.dumps(config))
    changes = {"model.name_or_path": "config-alone", "adapter.layers_to_transform": ["3-4"]}
    facts = rehearse(lab, changes, "--json").ok().json
    assert "5 layers" in facts["twin"]
    assert "tokenizer" in parts(facts["not_covered"])
    beyond = rehearse(lab, {**changes, "adapter.layers_to_transform": [5]})
    assert beyond.returncode == 5
    assert "layers_to_transform" in beyond.stderr


def test_a_twin_has_the_switches_of_its_model(lab: Lab) -> None:
    config = {
        **resolve("family", "glm4_moe", FAMILIES).twin_shape(),
        "model_type": "glm4_moe", "n_routed_experts": 160, "num_hidden_layers": 92, "first_k_dense_replace": 3,
        "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 1, "dtype": "float32",
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    del config["mlp_layer_types"]
    (lab / "glm").mkdir()
    (lab / "glm/config.json").write_text(json.dumps(config))
    facts = rehearse(lab, {"model.name_or_path": "glm"}, "--keep", "kept", "--json").ok().json
    made = json.loads((lab / "kept/base/config.json").read_text())
    assert (made["use_qk_norm"], made["attention_bias"], made["n_routed_experts"]) == (True, True, 4)
    assert "stored as float32 and, as the real ones, FP8" in facts["twin"]
    left = parts(facts["not_covered"])
    assert "how they are read" not in left["weights"]
    assert "model" not in left
    assert "proof" in parts(facts["covered"])
    refused = rehearse(lab, {"model.name_or_path": "glm", "model.quantization": "nf4"})
    assert refused.returncode == 5
    assert "stored in FP8 already" in refused.stderr


NAMES = {
    "Qwen/Qwen3-0.6B": ("qwen3", "qwen3"),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", "qwen3"),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", "qwen3"),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": ("qwen3_moe", "qwen3"),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", "qwen2_5"),
    "Qwen/Qwen2.5-Coder-1.5B": ("qwen2", "qwen2_5"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("qwen2", "deepseek_r1_distill"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("llama", "deepseek_r1_distill"),
    "deepseek-ai/DeepSeek-R1-0528": ("deepseek_v3", "deepseekv3"),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", "deepseekv3"),
    "zai-org/GLM-4.5-Air": ("glm4_moe", "glm4moe"),
    "tencent/Hunyuan-A13B-Instruct": ("hunyuan_moe", ""),
    "tencent/Hunyuan-7B-Instruct": ("hunyuan", ""),
    "openai/gpt-oss-120b": ("gpt_oss", "gptoss"),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", "llama3_1"),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", "llama3_1"),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", "llama3"),
}


def recipe_of(folder: Path, base: str, family: str = "auto") -> Any:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{name_or_path: {base}, family: {family}}}\ndata: {{train: a.jsonl}}\noutput_dir: run\n")
    return load_recipe(path).recipe


@pytest.mark.parametrize(("name", "known"), NAMES.items())
def test_models_of_the_hub_are_known_by_name_without_network(name: str, known: tuple[str, str], tmp_path: Path) -> None:
    found = find_model(recipe_of(tmp_path, name))
    assert found.family is not None
    assert (found.family.name, found.template) == known
    assert found.base is None
    assert "is not in the cache" in found.missing


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("deepseek-ai/DeepSeek-V3", "fp8"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "fp8"),
        ("deepseek-ai/DeepSeek-R1-0528", "fp8"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),
        ("someone/DeepSeek-V3-bf16", None),
        ("openai/gpt-oss-20b", "mxfp4"),
        ("unsloth/gpt-oss-20b-BF16", None),
    ],
)
def test_models_whose_weights_are_published_quantised_are_known_by_name(
    name: str, method: str | None, tmp_path: Path
) -> None:
    held = find_model(recipe_of(tmp_path, name)).stored
    assert (held.method if held is not None else None) == method
    recipe = recipe_of(tmp_path, name)
    asked = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    if method is None:
        assert find_model(asked).stored is None
    else:
        with pytest.raises(ModelError, match=r"whose weights are stored in .* already"):
            find_model(asked)


@pytest.mark.parametrize(("family", "method"), [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_a_twin_in_the_form_that_is_published_stands_for_nearly_the_weights_it_was_made_of(
    family: str, method: str, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from finetune.model.dequantise import tensors_of
    from finetune.model.publish import store_as
    from finetune.model.twin import family_twin

    family_twin(resolve("family", family, FAMILIES)).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert store_as(tmp_path, "gptq") == 0
    assert json.loads((tmp_path / "config.json").read_text()) == config
    changed = store_as(tmp_path, method)
    assert changed >= 4
    written = json.loads((tmp_path / "config.json").read_text())
    base = Base("twin", tmp_path, written, (tmp_path / "model.safetensors",))
    read = {name: held.read() for name, held in tensors_of(base).items()}
    assert {name: one.shape for name, one in read.items()} == {name: one.shape for name, one in before.items()}
    other = [name for name in before if not torch.equal(read[name].float(), before[name].float())]
    assert len(other) == changed
    for name in other:
        lost = (read[name] - before[name].float()).norm() / before[name].float().norm()
        assert lost < (0.04 if method == "fp8" else 0.15), name


def test_the_bases_of_all_shipped_recipes_are_known(tmp_path: Path) -> None:
    bases = {load_recipe(path).recipe.model.name_or_path for path in shipped_recipes().values()}
    hub = sorted(base for base in bases if not base.startswith("data/"))
    assert len(hub) >= 10
    for base in hub:
        assert find_model(recipe_of(tmp_path, base)).family is not None


def test_a_name_that_nobody_knows_is_answered_with_what_to_say(lab: Lab) -> None:
    outcome = rehearse(lab, {"model.name_or_path": "owner/unheard-of-7b"})
    assert outcome.returncode == 4
    assert "model.family=qwen3" in outcome.stderr
    found = find_model(recipe_of(lab.folder, "owner/unheard-of-7b", "mistral"))
    assert (found.model_type, found.template) == ("mistral", "")
