"""Whole runs: starts taken from the weights, two learning rates, an earlier adapter, and weights frozen by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Lab, lab_in
from warm import Outcome, Warm

from finetune.errors import ModelError
from finetune.model.earlier import read_earlier
from finetune.recipe.sections import AdapterOptions

FOUR = {"training.max_steps": 4, "training.save_steps": 2, "training.learning_rate": 5e-3}


def torn_after_two(lab: Lab, changes: dict[str, Any]) -> Outcome:
    """Take a finished run back to its checkpoint of step 2, as a crash would leave it, and continue it."""
    shutil.rmtree(lab / "run/adapter")
    shutil.rmtree(lab / "run/checkpoints/checkpoint-4")
    (lab / "run/exit.json").unlink()
    outcome = lab.train(changes).ok()
    assert "from run/checkpoints/checkpoint-2" in outcome.stderr
    return outcome


def logits(lab: Lab, base: str, adapter: str | None) -> Any:
    """What plain transformers and plain PEFT say on a few ids, float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(lab / base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(lab / adapter))
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45).reshape(2, 20)).logits


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init",
    ["pissa", pytest.param("pissa_niter_4", marks=pytest.mark.slow), pytest.param("olora", marks=pytest.mark.slow)],
)
def test_a_start_from_the_weights_resumes_to_the_same_bits_and_merges(lab: Lab, init: str) -> None:
    changes = {**FOUR, "adapter.init_lora_weights": init, "adapter.lora_dropout": 0.1}
    outcome = lab.train(changes).ok()
    assert f"started by {init} (as many numbers again hold that start, frozen)" in outcome.stderr
    config = json.loads((lab / "run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert json.loads((lab / "run/adapter/finetune.json").read_text())["doubled"] == init
    expected, losses = lab.adapter(), lab.losses()
    torn_after_two(lab, changes)
    assert lab.adapter() == expected
    assert lab.losses() == losses
    if init == "pissa":
        facts = lab.warm.run("merge", "run", "--json", cwd=lab.folder).ok().json
        assert facts["proved"]
        gap = (logits(lab, "run/merged", None) - logits(lab, "chatml", "run/adapter")).abs().max()
        assert float(gap) < 1e-5
        assert float((logits(lab, "chatml", None) - logits(lab, "chatml", "run/adapter")).abs().max()) > 0.1


def test_a_start_from_the_weights_is_alike_on_two_processes(lab: Lab) -> None:
    from safetensors.torch import load_file

    changes = {**FOUR, "adapter.init_lora_weights": "pissa", "training.per_device_train_batch_size": 2}
    lab.train(changes).ok()
    recipe = lab.recipe({**changes, "output_dir": "two"}, "two.yaml")
    for outcome in lab.warm.ranks(2, recipe, cwd=lab.folder):
        outcome.ok()
    assert lab.losses("two") == pytest.approx(lab.losses(), rel=1e-5)
    one, two = (load_file(lab / run / "adapter/adapter_model.safetensors") for run in ("run", "two"))
    assert one.keys() == two.keys()


def test_loftq_belongs_to_the_plain_nf4_base(lab: Lab) -> None:
    changes = {**FOUR, "adapter.init_lora_weights": "loftq", "model.quantization": "nf4"}
    lab.train(changes).ok()
    expected, losses = lab.adapter(), lab.losses()
    lab.train({**FOUR, "model.quantization": "nf4", "output_dir": "plain"}).ok()
    assert abs(losses[0] - lab.losses("plain")[0]) > 1e-3, "what quantisation has lost is made up for"
    torn_after_two(lab, changes)
    assert lab.adapter() == expected
    facts = lab.warm.run("merge", "run", "--json", cwd=lab.folder).ok().json
    assert facts["proved"]
    assert facts["proof"]["gap"]["max_logit"] < 1e-4


def test_whole_modules_beside_a_quantised_base_are_trained_in_float32(lab: Lab) -> None:
    """TRL casts all that is trained to bfloat16 there; ours is put back."""
    import torch
    from safetensors.torch import load_file

    whole = {"adapter.modules_to_save": ["lm_head"], "adapter.trainable_token_indices": [5, 6]}
    lab.train({**FOUR, **whole, "model.name_or_path": "llama3", "model.quantization": "nf4"}).ok()
    tensors = load_file(lab / "run/adapter/adapter_model.safetensors")
    assert sum("lora_" not in name for name in tensors) == 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert lab.losses()[-1] < lab.losses()[0] - 0.1


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def test_with_loraplus_b_learns_faster_and_the_run_resumes_to_the_same_bits(lab: Lab) -> None:
    changes = {**FOUR, "adapter.loraplus_lr_ratio": 8.0, "training.learning_rate": 1e-3, "training.weight_decay": 0.01}
    lab.train(changes).ok()
    expected, losses = lab.adapter(), lab.losses()
    torn_after_two(lab, changes)
    assert lab.adapter() == expected
    assert lab.losses() == losses
    lab.train({**changes, "adapter.loraplus_lr_ratio": 1.0, "output_dir": "even"}).ok()
    lab.train({**changes, "adapter.loraplus_lr_ratio": None, "output_dir": "plain"}).ok()
    assert lab.losses("even") == pytest.approx(lab.losses("plain"), rel=1e-6), "a ratio of one is plain LoRA"
    assert losses[-1] < lab.losses("plain")[-1] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_loraplus_is_the_same_where_weights_lie_in_parts(lab: Lab, mode: str) -> None:
    """In ZeRO-3 every weight looks one-dimensional, by which PEFT's own grouping would give A the rate of B."""
    one = {**FOUR, "adapter.loraplus_lr_ratio": 8.0, "training.learning_rate": 1e-3}
    lab.train(one).ok()
    recipe = lab.recipe({**one, "launch.config": mode, "output_dir": "parts"}, "parts.yaml")
    how: dict[str, Any] = {}
    if mode == "fsdp2":  # accelerate has it on accelerators only
        path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
        how = {"entry": "fsdp_on_cpu:main", "env": {"PYTHONPATH": path}}
    for outcome in lab.warm.ranks(2, recipe, cwd=lab.folder, **how):
        outcome.ok()
    assert lab.losses("parts") == pytest.approx(lab.losses(), rel=1e-6)


@pytest.mark.slow
def test_the_first_step_of_loraplus_is_as_many_times_larger(lab: Lab) -> None:
    """B starts at zero and the first step of Adam has the size of its learning rate, so that B shows the ratio."""
    import torch
    from safetensors.torch import load_file

    sizes = {}
    for ratio in (None, 8.0):
        one = {"training.max_steps": 1, "training.learning_rate": 1e-4, "adapter.loraplus_lr_ratio": ratio}
        lab.train({**one, "output_dir": str(ratio)}).ok()
        tensors = load_file(lab / str(ratio) / "adapter/adapter_model.safetensors")
        b = torch.cat([tensor.abs().flatten() for name, tensor in tensors.items() if "lora_B" in name])
        sizes[ratio] = float(b.median())
    assert sizes[8.0] == pytest.approx(8 * sizes[None], rel=1e-3)


def test_an_optimizer_with_groups_of_its_own_is_refused_with_loraplus() -> None:
    """GaLore, APOLLO and LOMO do so; their packages are none of ours, so that a stand-in answers here."""
    from finetune.errors import RecipeError
    from finetune.run.trainer import Trainer

    class StandIn:
        model = None
        args = SimpleNamespace(optim=SimpleNamespace(value="galore_adamw"))

        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any) -> tuple[Any, dict[str, Any]]:
            return object, {"lr": 1.0, "params": []}

    with pytest.raises(
        RecipeError, match=r"adapter\.loraplus_lr_ratio: galore_adamw makes groups of parameters of its"
    ):
        Trainer.use_loraplus(StandIn(), 8.0)  # type: ignore[arg-type]


# -- an earlier adapter ------------------------------------------------------------------------------------------------

FIRST = {
    "adapter": {
        "r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "training.max_steps": 6,
    "output_dir": "first",
}  # fmt: skip
ON = {"adapter": {"continue_from": "first/adapter"}, "training.max_steps": 3, "training.learning_rate": 5e-3}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    """A lab with a finished run in it; not to be changed."""
    lab = lab_in(tmp_path_factory.mktemp("earlier"), bases, warm)
    lab.train(FIRST).ok()
    return lab


@pytest.fixture
def after(lab: Lab, earlier: Lab) -> Lab:
    """A lab of its own with that run in it."""
    shutil.copytree(earlier / "first", lab / "first")
    return lab


def test_training_goes_on_from_an_earlier_adapter(after: Lab) -> None:
    from safetensors.torch import load_file

    outcome = after.train(ON).ok()
    assert "lora r=6, continued from first/adapter on down_proj, q_proj, v_proj" in outcome.stderr
    fresh = after.train({**FIRST, "output_dir": "fresh", "training.max_steps": 1}).ok()
    assert fresh.returncode == 0
    assert after.losses()[0] < after.losses("fresh")[0] - 0.3, "it knows what the first run learnt"
    old, new = (json.loads((after / run / "adapter/adapter_config.json").read_text()) for run in ("first", "run"))
    for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "use_rslora", "peft_type"):
        assert new[key] == old[key], key
    shapes = [
        {name: tensor.shape for name, tensor in load_file(after / run / "adapter/adapter_model.safetensors").items()}
        for run in ("first", "run")
    ]
    assert shapes[0] == shapes[1]
    record = json.loads((after / "run/run.json").read_text())
    assert record["continued_from"]["adapter"] == "first/adapter"
    assert record["continued_from"]["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    card = (after / "run/adapter/README.md").read_text()
    assert "continued from first/adapter" in card
    assert str(after.folder) not in card
    assert after.warm.run("merge", "run", "--json", cwd=after.folder).ok().json["proved"]


def test_a_run_folder_is_taken_for_its_adapter_and_the_resolved_recipe_repeats_it(after: Lab) -> None:
    after.train({**ON, "adapter": {"continue_from": "first", "lora_dropout": 0.1}}).ok()
    expected = after.adapter()
    resolved = (after / "run/recipe.yaml").read_text()
    assert "r: 6" in resolved
    (after / "again.yaml").write_text(resolved)
    after.warm.run("train", "again.yaml", "output_dir=again", cwd=after.folder).ok()
    assert after.adapter("again") == expected


def test_no_step_leaves_the_adapter_as_it_was_and_resume_gives_the_same_bits(after: Lab) -> None:
    changes = {**ON, **FOUR}
    after.train(changes).ok()
    expected = after.adapter()
    torn_after_two(after, changes)
    assert after.adapter() == expected


def test_another_adapter_does_not_continue_a_run(after: Lab) -> None:
    changes = {**ON, **FOUR}
    after.train(changes).ok()
    shutil.rmtree(after / "run/adapter")
    after.train({**FIRST, "training.max_steps": 5}, "--overwrite").ok()
    refused = after.train(changes)
    assert refused.returncode == 5
    assert "continued_from" in refused.stderr
    assert not (after / "run/adapter").exists()


def test_what_the_recipe_says_otherwise_is_refused_with_both_values(after: Lab) -> None:
    stated = {"r": 16, "lora_alpha": 9, "method": "dora", "rank_pattern": {"q_proj": 4}}
    outcome = after.train({**ON, "adapter": {"continue_from": "first/adapter", **stated}})
    assert outcome.returncode == 2
    for line in (
        "adapter.r: 16 in the recipe, 6 in the adapter of first/adapter",
        'adapter.method: "dora" in the recipe, "lora" in the adapter',
        'adapter.rank_pattern: {"q_proj": 4} in the recipe, {"q_proj": 3} in the adapter',
    ):
        assert line in outcome.stderr
    assert "lora_alpha" not in outcome.stderr
    targets = {"continue_from": "first/adapter", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}
    outcome = after.train({**ON, "adapter": targets})
    assert outcome.returncode == 2
    assert (
        "adapter.target_modules: q_proj, up_proj in the recipe, down_proj, q_proj, v_proj in the ad" in outcome.stderr
    )
    assert "model.layers.0.mlp.up_proj: in the recipe, not in the adapter" in outcome.stderr
    assert not (after / "run").exists()
    same = {"continue_from": "first/adapter", "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 6}
    after.train({**ON, "adapter": same}).ok()


def test_an_adapter_that_cannot_be_continued_is_refused_with_its_reason(
    after: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(after.folder)

    def spoilt(name: str, **config: Any) -> str:
        shutil.copytree(after / "first/adapter", after / name)
        path = after / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return name

    spoilt("cut")
    weights = after / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spoilt("half")
    (after / "half/adapter_model.safetensors").unlink()
    (after / "unfinished").mkdir()
    (after / "unfinished/run.json").write_text("{}")
    cases = {
        "nowhere": "nowhere: there is no such folder; name the adapter folder",
        "unfinished": "unfinished: this run has no adapter yet",
        "chatml": "chatml is no whole adapter: adapter_config.json is missing",
        "half": "half is no whole adapter: adapter_model.safetensors is missing",
        "cut": "the adapter in cut is damaged: ",
        spoilt("ia3", peft_type="IA3"): "ia3 holds a IA3 adapter; only LoRA and DoRA are trained",
        spoilt("biased", bias="all"): "biased has bias: all, which is not trained further here",
        spoilt("pissa", init_lora_weights="pissa"): "pissa has init_lora_weights: pissa, which",
        spoilt("zero", r=0): "the adapter in zero is damaged: adapter_config.json has r: 0",
        spoilt("listed", rank_pattern=[1]): "the adapter in listed is damaged: ",
    }
    for name, said in cases.items():
        with pytest.raises(ModelError) as caught:
            read_earlier(AdapterOptions(continue_from=name), "chatml", "none")
        assert str(caught.value).startswith("adapter.continue_from: ")
        assert said in str(caught.value)
    outcome = after.train({**ON, "adapter": {"continue_from": "cut"}})
    assert outcome.returncode == 5
    assert cases["cut"] in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (after / "run").exists()


def test_an_adapter_of_another_base_is_refused(after: Lab) -> None:
    adapter = {"continue_from": "first/adapter"}
    other = after.train({**ON, "adapter": adapter, "model.name_or_path": "llama3"})
    assert other.returncode == 5
    assert (
        "llama3 is not the base that the adapter in first/adapter was trained on: config.json, model." in other.stderr
    )
    quantised = after.train({**ON, "adapter": adapter, "model.quantization": "nf4"})
    assert quantised.returncode == 5
    assert "was trained on a base in none, and model.quantization is nf4" in quantised.stderr
    (after / "first/adapter/finetune.json").unlink()  # as PEFT itself, or another tool, leaves an adapter
    named = after.train({**ON, "adapter": adapter, "model.name_or_path": "llama3"})
    assert named.returncode == 5
    assert "says that its base is chatml, and model.name_or_path is llama3" in named.stderr
    config = after / "first/adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"chatml"', '"llama3"'))
    shaped = after.train({**ON, "adapter": adapter, "model.name_or_path": "llama3"})
    assert shaped.returncode == 5
    assert "does not fit llama3: " in shaped.stderr
    assert "size mismatch" in shaped.stderr
    assert not (after / "run").exists()


def test_an_adapter_that_peft_would_load_in_part_is_refused(after: Lab) -> None:
    from safetensors.torch import load_file, save_file

    path = after / "first/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    dropped = tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = dropped
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = after.train(ON)
    assert outcome.returncode == 5
    assert "layers.0.mlp.up_proj.lora_A.weight: in the file, not in the model" in outcome.stderr
    assert "layers.0.self_attn.q_proj.lora_A.weight: in the model, not in the file" in outcome.stderr


def test_an_adapter_that_plain_peft_made_is_continued(lab: Lab) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.3, use_dora=True)
    base = AutoModelForCausalLM.from_pretrained(lab / "chatml", dtype=torch.bfloat16)
    get_peft_model(base, config, autocast_adapter_dtype=False).save_pretrained(str(lab / "theirs"))
    path = lab / "theirs/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/models/chatml/"}))
    lab.train({**ON, "adapter": {"continue_from": "theirs"}}).ok()
    config = json.loads((lab / "run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["use_dora"], config["base_model_name_or_path"]) == (2, True, "chatml")
    assert config["lora_dropout"] == 0.0, "dropout is of the training, so it is the recipe's"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_of_routed_experts_is_continued(lab: Lab, quantization: str) -> None:
    """Where PEFT would move the adapters of dense layers to the experts, the file's own places hold."""
    import zoo

    zoo.folder(lab / "moe", "moe", vocab_size=2048)
    base = {"model.name_or_path": "moe", "model.quantization": quantization, "training.learning_rate": 5e-3}
    lab.train({**base, "adapter": {"r": 3, "rank_pattern": {"up_proj": 2}}, "output_dir": "first"}).ok()
    lab.train({**base, "adapter": {"continue_from": "first"}, "training.max_steps": 2}).ok()
    assert lab.losses()[0] < lab.losses("first")[0] - 0.02
    old, new = (json.loads((lab / run / "adapter/adapter_config.json").read_text()) for run in ("first", "run"))
    assert {key for key in old if old[key] != new[key]} <= {"target_modules", "target_parameters"}  # in other orders
    for key in ("target_modules", "target_parameters"):
        assert sorted(new[key] or ()) == sorted(old[key] or ())
    assert lab.warm.run("merge", "run", "--json", cwd=lab.folder).ok().json["proved"]


def test_targets_of_an_earlier_adapter_are_told_before_a_weight_is_loaded(after: Lab) -> None:
    facts = after.warm.run("targets", after.recipe(ON), "--json", cwd=after.folder).ok().json
    adapted = {entry["name"].rsplit(".", 1)[-1] for entry in facts["modules"] if entry["adapted"]}
    assert adapted == {"q_proj", "v_proj", "down_proj"}
    layer = next(entry for entry in facts["modules"] if entry["name"] == "model.layers.0.self_attn.q_proj")
    assert layer["trainable"] == 3 * (64 + 64)
    wrong = after.warm.run("targets", after.recipe({**ON, "adapter": {**ON["adapter"], "r": 7}}), cwd=after.folder)  # type: ignore[dict-item]
    assert wrong.returncode == 2
    assert "adapter.r: 7 in the recipe, 6 in the adapter" in wrong.stderr


def test_the_run_that_an_adapter_is_of_is_not_replaced_by_the_run_that_needs_it(after: Lab) -> None:
    refused = after.train({**ON, "output_dir": "first"}, "--overwrite")
    assert refused.returncode == 5
    assert "holds what this run needs: first/adapter" in refused.stderr


# -- frozen weights ----------------------------------------------------------------------------------------------------

WHOLE = {"adapter": {"method": "none"}, "training.learning_rate": 1e-3, "model.name_or_path": "llama3"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_stay_to_the_bit_and_the_others_learn(lab: Lab, checkpointing: bool) -> None:
    import torch
    from safetensors.torch import load_file

    words = ["embed_tokens", r"model\.layers\.0\..*", "1.mlp.up_proj"]
    changes = {**WHOLE, "model.freeze": words, "training.activation_checkpointing": checkpointing}
    outcome = lab.train(changes).ok()
    assert "trains   what is not frozen: " in outcome.stderr
    assert "frozen by model.freeze: 11 weights, " in outcome.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (lab / "llama3", lab / "run/model"))
    assert before.keys() == after.keys()
    held = {name for name in before if torch.equal(before[name], after[name])}
    assert held == {name for name in before if "embed_tokens" in name or "layers.0." in name or "1.mlp.up_proj" in name}
    assert lab.losses()[-1] < lab.losses()[0] - 0.1


def test_frozen_weights_are_told_before_a_weight_is_loaded(lab: Lab) -> None:
    recipe = lab.recipe({**WHOLE, "model.freeze": ["embed_tokens", "layers.1"]})
    facts = lab.warm.run("targets", recipe, "--json", cwd=lab.folder).ok().json
    trained = {entry["name"]: entry["trainable"] for entry in facts["modules"]}
    assert trained["model.embed_tokens"] == 0
    assert all(size == 0 for name, size in trained.items() if ".layers.1." in name)
    assert all(size > 0 for name, size in trained.items() if ".layers.0." in name)
    assert facts["trainable"] == sum(trained.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed_tokns"], "model.freeze: 'embed_tokns' matches no module or weight; did you mean 'embed_tokens'?"),
        (["layers.7"], "model.freeze: 'layers.7' matches no module or weight"),
        (
            ["embed_tokens", r"model\.layer\..*"],
            r"'model\\.layer\\..*' matches no whole name of a module or weight, as",
        ),
        (["*"], "'*' is no regular expression"),
        ([".*"], "model.freeze: .* is every weight of the model; leave some to train"),
    ],
)
def test_words_that_freeze_nothing_or_everything_are_refused(lab: Lab, words: list[str], said: str) -> None:
    for verb in ("targets", "train") if len(words) > 1 else ("targets",):
        outcome = lab.warm.run(verb, lab.recipe({**WHOLE, "model.freeze": words}), cwd=lab.folder)
        assert outcome.returncode == 5
        assert said in outcome.stderr
    assert not (lab / "run").exists()


def test_tied_embeddings_are_frozen_by_either_name() -> None:
    import zoo

    from finetune.model.freeze import freeze

    for word in ("embed_tokens", "lm_head"):
        model = zoo.model("tied")
        assert set(freeze(model, [word])) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert not model.get_output_embeddings().weight.requires_grad
    model = zoo.model("llama")
    assert freeze(model, ["layers.0.self_attn.q_proj.weight"]) == ("model.layers.0.self_attn.q_proj.weight",)
    assert freeze(model, ()) == ()
