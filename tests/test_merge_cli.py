"""`finetune merge`: merged weights answer like base plus adapter, or there are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Lab, chats, lab_in, write_rows
from warm import Outcome, Warm

from finetune.errors import ExportError
from finetune.merge import _refuse_unproved

CHANGES = {"training.learning_rate": 0.02, "training.max_steps": 20, "training.num_train_epochs": 100}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    """A finished run whose base may be changed."""
    lab = lab_in(tmp_path_factory.mktemp("trained"), bases, warm)
    lab.own_base("chatml")
    lab.train(CHANGES).ok()
    return lab


def merge(lab: Lab, *words: str) -> Outcome:
    return lab.warm.run("merge", *words, cwd=lab.folder)


def logits(model: Any, folder: Path) -> Any:
    """Float32 logits of a few rows, one after the other."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["messages"][-1]["content"] for row in chats(4)] + ["The server is slow. 你好"]
    model.eval()
    with torch.no_grad():
        found = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].float() for text in texts]
    return torch.cat(found)


def with_adapter(lab: Lab, adapter: str, base: str = "chatml", change: Any = None) -> Any:
    """Logits of base plus adapter by plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lab / base)
    if change is not None:
        change(model)
    return logits(PeftModel.from_pretrained(model, str(lab / adapter)), lab / base)


def loaded(folder: Path) -> Any:
    """A merged model by plain transformers, after a look that every weight came from its files."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def no_folder(lab: Lab, name: str) -> None:
    assert not (lab / name).exists()
    assert [path for path in (lab / name).parent.iterdir() if path.name.startswith(f".{Path(name).name}")] == []


def test_merged_weights_answer_like_base_plus_adapter(trained: Lab) -> None:
    import torch
    from transformers import AutoTokenizer

    outcome = merge(trained, "run", "--dtype", "float32").ok()
    assert "proved: reloaded from disk" in outcome.stdout
    folder = trained / "run/merged"
    expected, base = with_adapter(trained, "run/adapter"), logits(loaded(trained / "chatml"), trained / "chatml")
    assert (logits(loaded(folder), folder) - expected).abs().max() <= 1e-5
    assert (base - expected).abs().max() > 0.5
    assert loaded(folder).dtype == torch.float32
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(trained / "chatml")
    assert ours.chat_template == theirs.chat_template
    assert ours("the server")["input_ids"] == theirs("the server")["input_ids"]
    for name in ("generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (trained / "chatml" / name).read_bytes()
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["gap"]["max_logit"] <= 1e-4
    assert proof["effect"]["mean_kl"] > 100 * proof["gap"]["mean_kl"]
    assert proof["loss"] < 0.01
    assert proof["rows"] == 8
    assert proof["merge"]["merged_tensors"] == 14
    card = (folder / "README.md").read_text()
    assert "base_model: chatml" in card
    assert str(trained.folder) not in card


def test_with_json_stdout_is_one_object(trained: Lab) -> None:
    facts = merge(trained, "run", "--output", "as-json", "--json").ok().json
    assert facts["output"] == "as-json"
    assert facts["proved"] is True
    assert facts["proof"]["loss"] < 0.01
    assert facts["kept_of_update"] == pytest.approx(1.0)


def test_a_merge_without_proof_says_so(trained: Lab) -> None:
    outcome = merge(trained, "run", "--output", "unproved", "--no-verify").ok()
    assert "not proved: --no-verify" in outcome.stdout
    assert not (trained / "unproved/proof.json").exists()
    assert merge(trained, "run", "--output", "unproved-2", "--no-verify", "--json").ok().json["proved"] is False


def test_bfloat16_is_named_in_the_config_and_held_in_the_files(trained: Lab) -> None:
    import torch

    merge(trained, "run", "--output", "half", "--dtype", "bf16").ok()
    assert loaded(trained / "half").dtype == torch.bfloat16
    assert json.loads((trained / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_written_in_shards_with_an_index(trained: Lab) -> None:
    shutil.copytree(trained / "run", trained / "sharded", ignore=shutil.ignore_patterns("merged"))
    recipe = trained / "sharded/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_shard_size: 5GB", "max_shard_size: 0.2MB"))
    facts = merge(trained, "sharded", "--json").ok().json
    assert len(facts["files"]) >= 3
    index = json.loads((trained / "sharded/merged/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(facts["files"])
    difference = logits(loaded(trained / "sharded/merged"), trained / "chatml") - with_adapter(trained, "run/adapter")
    assert difference.abs().max() <= 1e-5


def test_the_next_command_can_be_pasted_whatever_the_output_is_called(trained: Lab) -> None:
    assert "next: finetune evaluate 'two words'" in merge(trained, "run", "--output", "two words").ok().stdout


def test_an_output_that_exists_is_left_alone(trained: Lab) -> None:
    (trained / "mine").mkdir()
    (trained / "mine/thesis.tex").write_text("years of work")
    outcome = merge(trained, "run", "--output", "mine")
    assert outcome.returncode == 5
    assert "exists already" in outcome.stderr
    assert [path.name for path in (trained / "mine").iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file_is_left_alone(trained: Lab) -> None:
    (trained / "thesis.tex").write_text("years of work")
    outcome = merge(trained, "run", "--output", "thesis.tex")
    assert outcome.returncode == 5
    assert "thesis.tex exists already" in outcome.stderr
    assert (trained / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["run/adapter/merged", "run/merged-here/../adapter/deep/merged"])
def test_an_output_in_the_adapter_is_refused(trained: Lab, place: str) -> None:
    before = sorted((trained / "run/adapter").rglob("*"))
    outcome = merge(trained, "run", "--output", place)
    assert outcome.returncode == 5
    assert "lies in the adapter's own folder" in outcome.stderr
    assert len(before) >= 3
    assert sorted((trained / "run/adapter").rglob("*")) == before


@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_output_is_refused(trained: Lab, nothing: str) -> None:
    before = sorted(path.name for path in trained.folder.iterdir())
    outcome = merge(trained, "run", "--output", nothing)
    assert outcome.returncode == 2
    assert "--output: is empty" in outcome.stderr
    assert sorted(path.name for path in trained.folder.iterdir()) == before


def test_a_base_that_changed_since_the_training_is_refused(trained: Lab) -> None:
    weights = trained / "chatml/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    try:
        outcome = merge(trained, "run", "--output", "changed")
    finally:
        weights.write_bytes(before)
    assert outcome.returncode == 5
    assert "not the base that was trained on: model.safetensors changed since" in outcome.stderr
    no_folder(trained, "changed")


def test_a_run_is_merged_from_another_working_folder(trained: Lab, tmp_path: Path) -> None:
    trained.warm.run("merge", str(trained / "run"), "--output", "there", cwd=tmp_path).ok()
    assert json.loads((tmp_path / "there/manifest.json").read_text())["merged_from"]["base"] == "chatml"
    for name in ("manifest.json", "README.md"):
        assert str(trained.folder) not in (tmp_path / "there" / name).read_text()


def test_a_merge_that_cannot_be_proved_leaves_nothing(lab: Lab) -> None:
    """Updates far below the steps of bfloat16 are lost in it."""
    lab.train({"training.learning_rate": 1e-6, "training.max_steps": 2}).ok()
    outcome = merge(lab, "run", "--dtype", "bfloat16")
    assert outcome.returncode == 5
    assert "does not answer like base plus adapter" in outcome.stderr
    assert "--dtype float32" in outcome.stderr
    no_folder(lab, "run/merged")
    merge(lab, "run", "--dtype", "float32").ok()


def test_an_unknown_precision_is_refused(trained: Lab) -> None:
    outcome = merge(trained, "run", "--output", "odd", "--dtype", "bfloat61")
    assert outcome.returncode == 2
    assert "bfloat61" in outcome.stderr
    no_folder(trained, "odd")


def test_an_adapter_by_plain_peft_is_merged(lab: Lab) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(lab / "thinking")
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 12},
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = "thinking"
    model.save_pretrained(lab / "plain")
    outcome = merge(lab, "plain").ok()
    assert "merged:" in outcome.stdout.splitlines()[0]
    expected = with_adapter(lab, "plain", "thinking")
    assert (logits(loaded(lab / "merged"), lab / "thinking") - expected).abs().max() <= 1e-5
    assert json.loads((lab / "merged/proof.json").read_text())["probe"] == "built-in texts"


@pytest.mark.parametrize("changes", [{"adapter.method": "dora"}, {"adapter.use_rslora": True}], ids=["dora", "rslora"])
def test_other_adapters_are_merged_as_exactly(lab: Lab, changes: dict[str, Any]) -> None:
    lab.train({**CHANGES, **changes}).ok()
    merge(lab, "run").ok()
    difference = logits(loaded(lab / "run/merged"), lab / "chatml") - with_adapter(lab, "run/adapter")
    assert difference.abs().max() <= 2e-5


def test_an_adapter_of_a_quantised_base_is_merged_onto_what_it_was_trained_on(lab: Lab) -> None:
    import bitsandbytes.functional as bnb
    import torch

    def dequantised(model: Any) -> None:
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    packed, state = bnb.quantize_4bit(module.weight, compress_statistics=True, quant_type="nf4")
                    module.weight.copy_(bnb.dequantize_4bit(packed, state))

    lab.train({**CHANGES, "model.quantization": "nf4"}).ok()
    merge(lab, "run").ok()
    merged = logits(loaded(lab / "run/merged"), lab / "chatml")
    right = (merged - with_adapter(lab, "run/adapter", change=dequantised)).abs().max()
    wrong = (merged - with_adapter(lab, "run/adapter")).abs().max()
    assert right <= 1e-4
    assert wrong > 0.1


def test_an_int8_run_in_bfloat16_on_a_base_in_float32_is_merged_and_proved(lab: Lab) -> None:
    lab.train({**CHANGES, "model.quantization": "int8", "model.dtype": "bfloat16"}).ok()
    facts = merge(lab, "run", "--json").ok().json
    assert facts["proved"]
    assert facts["proof"]["loss"] < 0.05


def test_advice_names_another_precision_only_where_that_helps() -> None:
    figures = {"mean_kl": 1.0, "max_logit": 1.0}
    proof = {"effect": figures, "gap": figures, "loss": 1.0}
    for dtype, kept, helps in (("bfloat16", 0.9, True), ("auto", 1.00001, True), ("auto", 1.0, False),
                               ("float32", 0.9, False)):  # fmt: skip
        with pytest.raises(ExportError, match="serve the adapter itself") as caught:
            _refuse_unproved(proof, dtype, {"kept_of_update": kept})
        assert ("--dtype float32" in str(caught.value)) == helps


def test_the_template_of_the_recipe_is_that_of_the_merged_model(lab: Lab) -> None:
    from transformers import AutoTokenizer

    text = (lab / "chatml/chat_template.jinja").read_text().replace("You answer briefly.", "You speak in JSON.")
    (lab / "mine.jinja").write_text(text)
    write_rows(lab / "train.jsonl", chats(8))
    lab.train({**CHANGES, "data.chat_template": "mine.jinja"}).ok()
    merge(lab, "run").ok()
    assert AutoTokenizer.from_pretrained(lab / "run/merged").chat_template == text


def test_whole_weights_have_nothing_to_merge(lab: Lab) -> None:
    lab.train({"adapter": {"method": "none"}, "training.learning_rate": 1e-3}).ok()
    outcome = merge(lab, "run")
    assert outcome.returncode == 5
    assert "nothing to merge" in outcome.stderr
