"""Whole runs of `finetune train` on tiny bases: what they leave behind, and that the numbers are the right ones."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Lab, chats, lab_in, write_rows
from warm import Outcome, Warm

from finetune.data.cache import SETTLED_SECONDS
from finetune.files import manifest_faults, sha256
from finetune.recipe import fields
from finetune.recipe.load import load_recipe

RICH = {
    "adapter.lora_dropout": 0.1,
    "data.validation": "held.jsonl",
    "training.max_steps": 8,
    "training.eval_steps": 4,
    "training.save_steps": 2,
    "training.save_total_limit": 3,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> tuple[Lab, Outcome]:
    """One finished run that uses much of what there is, which several tests look at."""
    lab = lab_in(tmp_path_factory.mktemp("done"), bases, warm)
    return lab, lab.train(RICH).ok()


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_complete_folder(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    assert {path.name for path in (lab / "run").iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "probe.json", "exit.json", "checkpoints", "adapter",
    }  # fmt: skip
    assert lab.ended()["exit_code"] == 0
    assert lab.ended()["step"] == 8
    assert {path.name for path in (lab / "run/adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "finetune.json", "manifest.json", "README.md",
    }  # fmt: skip


def test_the_terminal_tells_the_story_and_what_is_next(done: tuple[Lab, Outcome]) -> None:
    _, outcome = done
    topics = [line.split()[0] for line in outcome.stderr.splitlines()]
    assert [topic for topic in dict.fromkeys(topics) if topic != "step"] == [
        "data", "validation:", "base", "trains", "steps", "saved",
    ]  # fmt: skip
    assert "step 8/8  loss" in outcome.stderr
    assert "validation loss" in outcome.stdout
    assert outcome.stdout.splitlines()[-2:] == ["next: finetune evaluate run", "      finetune merge run"]


def test_the_resolved_recipe_loads_again_with_what_was_derived(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    asked, resolved = load_recipe(lab / "recipe.yaml"), load_recipe(lab / "run/recipe.yaml")
    differ = {key: resolved.value(key) for key in resolved.set_keys() if resolved.value(key) != asked.value(key)}
    assert differ == {
        "model.attn_implementation": "eager",
        "adapter.target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "training.per_device_train_batch_size": 4,
        "training.activation_checkpointing": False,
        "launch.num_processes": 1,
    }


def test_the_resolved_recipe_trains_the_same_adapter(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    lab.warm.run("train", "run/recipe.yaml", "output_dir=again", cwd=lab.folder).ok()
    assert lab.adapter("again") == lab.adapter()


def test_a_base_is_hashed_once_and_again_only_when_it_has_changed(lab: Lab) -> None:
    weights = lab.own_base("chatml") / "model.safetensors"
    os.utime(weights, (1e9, 1e9))
    time.sleep(SETTLED_SECONDS)  # a file that has just been written is not remembered

    def recorded() -> str:
        lab.train({"training.max_steps": 1, "data.cache_dir": "cache"}, "--overwrite").ok()
        return str(json.loads((lab / "run/run.json").read_text())["base"]["sha256"]["model.safetensors"])

    assert recorded() == sha256(weights)
    known = lab / "cache/sources.json"
    known.write_text(known.read_text().replace(sha256(weights), "5" * 64))
    assert recorded() == "5" * 64  # not read again
    os.utime(weights, (2e9, 2e9))
    assert recorded() == sha256(weights)


def test_the_record_says_what_the_run_was_made_of(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    record = json.loads((lab / "run/run.json").read_text())
    assert set(record) == {
        "created", "command", "working_folder", "pid", "host", "machine", "versions", "git", "recipe", "recipe_hash",
        "base", "method", "adapter", "trained_parameters", "seed", "date", "data", "world_size", "hardware", "made_of",
    }  # fmt: skip
    assert record["recipe_hash"] == load_recipe(lab / "recipe.yaml").hash()
    assert record["base"]["sha256"].keys() == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {"torch", "transformers", "trl", "peft", "accelerate", "finetune"} <= record["versions"].keys()
    assert record["data"]["train"]["rows_kept"] == 16
    assert record["data"]["validation"]["rows_kept"] == 6
    assert record["data"]["train"]["epoch"][0]["rows"] == 16
    assert len(json.loads((lab / "run/probe.json").read_text())) == 8


def test_every_step_stands_in_the_metrics(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    steps = [line for line in lab.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    for line in steps:
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "trained_tokens", "time"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
    validated = [line["step"] for line in lab.metrics() if "eval_loss" in line]
    assert validated == [4, 8]


def test_the_first_and_the_last_step_are_logged_whatever_logging_steps_says(lab: Lab) -> None:
    lab.train({"training.logging_steps": 3, "training.max_steps": 5}).ok()
    steps = [line for line in lab.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, 3, 5]
    assert lab.ended()["facts"]["final_loss"] == pytest.approx(steps[-1]["loss"], abs=1e-4)


def test_checkpoints_are_whole_few_and_without_pickled_secrets(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    checkpoints = sorted((lab / "run/checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    for path in checkpoints:
        assert manifest_faults(path) == []
        assert not list(path.rglob("training_args*"))
        assert not list(path.rglob("README.md"))


def test_every_file_is_as_readable_as_the_umask_allows(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    paths = [path for path in (lab / "run").rglob("*") if path.is_file()]
    assert len(paths) >= 25
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {name: mode for name, mode in modes.items() if mode != 0o666 & ~umask()} == {}


def test_the_card_has_no_path_of_this_machine_and_no_placeholder(done: tuple[Lab, Outcome]) -> None:
    lab, _ = done
    lab.train({"model.name_or_path": str(lab / "chatml"), "output_dir": str(lab / "by-path")}).ok()
    for run in ("run", "by-path"):
        text = (lab / run / "adapter/README.md").read_text()
        assert str(lab.folder) not in text
        assert "[More" not in text
        assert "base_model: chatml" in text
        assert "train.jsonl" in text


def test_the_adapter_loads_with_plain_peft_and_is_what_was_validated(done: tuple[Lab, Outcome]) -> None:
    import reference_loop
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lab, _ = done
    base = AutoModelForCausalLM.from_pretrained(lab / "chatml")
    model = PeftModel.from_pretrained(base, str(lab / "run/adapter"))
    tokenizer = AutoTokenizer.from_pretrained(lab / "chatml")
    rows = reference_loop.read(lab / "held.jsonl", tokenizer)
    by_hand = reference_loop.token_mean(model, rows, tokenizer.pad_token_id)
    logged = [line["eval_loss"] for line in lab.metrics() if "eval_loss" in line]
    assert logged[-1] == pytest.approx(by_hand, abs=1e-5)
    with model.disable_adapter():
        untrained = reference_loop.token_mean(model, rows, tokenizer.pad_token_id)
    assert untrained - by_hand > 0.3


def test_with_json_stdout_is_one_object(lab: Lab) -> None:
    outcome = lab.train({"data.validation": "held.jsonl"}, "--json").ok()
    facts = outcome.json
    assert facts == lab.ended()["facts"]
    assert facts["product"] == "run/adapter"
    assert facts["steps"] == 4
    assert facts["proof"]["tensors"] == 28
    assert facts["final_loss"] == pytest.approx(lab.losses()[-1], abs=1e-4)
    assert {"run", "adapter", "validation_loss", "tokens_per_second", "seconds"} <= facts.keys()


# -- the numbers are the right ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["chatml", "llama3", "thinking"])
def test_the_losses_are_those_of_a_textbook_loop(lab: Lab, base: str) -> None:
    import reference_loop

    rows = chats(16)
    if base == "thinking":  # the textbook knows no reasoning, so the answer brings the block the template would add
        for row in rows:
            row["messages"][-1]["content"] = "{}"
    write_rows(lab / "train.jsonl", rows)
    if base == "thinking":
        (lab / "plain.jinja").write_text((lab / "chatml/chat_template.jinja").read_text())
        (lab.own_base("thinking") / "chat_template.jinja").write_text((lab / "plain.jinja").read_text())
    steps = 10
    lab.train(
        {
            "model.name_or_path": base,
            "training.max_steps": steps,
            "training.learning_rate": 1e-3,
            "training.lr_scheduler_type": "linear",
            "training.seed": 7,
        }
    ).ok()
    expected = reference_loop.train(
        lab / base, lab / "train.jsonl", steps=steps, batch=4, rate=1e-3, r=4, alpha=8, seed=7
    )
    assert len(expected) == steps
    assert lab.losses() == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.1


def test_however_a_global_batch_is_made_up_the_losses_are_the_same(lab: Lab) -> None:
    losses = {}
    for micro in (4, 2, 1):
        changes = {
            "training.per_device_train_batch_size": micro,
            "training.learning_rate": 1e-3,
            "training.max_steps": 8,
            "output_dir": f"run-{micro}",
        }
        outcome = lab.train(changes).ok()
        assert f"{micro} per device x {4 // micro} accumulated" in outcome.stderr
        losses[micro] = lab.losses(f"run-{micro}")
        assert len(losses[micro]) == 8
    assert losses[2] == pytest.approx(losses[4], rel=1e-6)
    assert losses[1] == pytest.approx(losses[4], rel=1e-6)


def test_recomputing_activations_changes_no_number(lab: Lab) -> None:
    lab.train({"adapter.lora_dropout": 0.1}).ok()
    lab.train({"adapter.lora_dropout": 0.1, "training.activation_checkpointing": True, "output_dir": "less"}).ok()
    assert lab.losses("less") == pytest.approx(lab.losses(), rel=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_have_the_loss_they_have_alone(lab: Lab, attention: str) -> None:
    one_step = {"training.max_steps": 1, "model.attn_implementation": attention}
    lab.train({**one_step, "training.global_batch_size": 16, "output_dir": "alone"}).ok()
    outcome = lab.train(
        {
            **one_step,
            "training.global_batch_size": 2,
            "data.packing": True,
            "data.max_length": 512,
            "output_dir": "packed",
        }
    ).ok()
    assert re.search(r"packing +16 rows in [12] sequences? of at most 512 tokens, \d\d\.\d% full\n", outcome.stderr)
    packing = json.loads((lab / "packed/run.json").read_text())["data"]["packing"]
    assert packing["sequences"] in (1, 2)
    assert 0 < packing["density"] <= 1
    assert " = 2 sequences a step; run folder" in outcome.stderr
    (alone,), (packed,) = ([line for line in lab.metrics(run) if "loss" in line] for run in ("alone", "packed"))
    assert alone["epoch"] == packed["epoch"] == 1.0
    assert alone["trained_tokens"] == packed["trained_tokens"]
    assert packed["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_only_the_answers_are_trained(lab: Lab) -> None:
    """As many tokens as the textbook counts in answers; that they are the same ones the losses above show."""
    import reference_loop
    from transformers import AutoTokenizer

    lab.train().ok()
    rows = reference_loop.read(lab / "train.jsonl", AutoTokenizer.from_pretrained(lab / "chatml"))
    trained = sum(label != reference_loop.IGNORED for _, labels in rows for label in labels)
    assert sum(line["trained_tokens"] for line in lab.metrics() if "loss" in line) == trained
    assert trained < sum(len(ids) for ids, _ in rows) / 2


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(lab: Lab) -> None:
    changes = {"adapter.lora_dropout": 0.1}
    for run, seed in (("first", 5), ("same", 5), ("other", 6)):
        lab.train({**changes, "training.seed": seed, "output_dir": run}).ok()
    assert lab.adapter("same") == lab.adapter("first")
    assert lab.losses("same") == lab.losses("first")
    assert lab.adapter("other") != lab.adapter("first")


# -- what can be trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([{"prompt": f"number {n}: ", "completion": "it is late"} for n in range(8)], (0.1, 0.8)),
        ([{"text": f"row {n} of the manual says that the server is slow"} for n in range(8)], (0.9, 1.0)),
    ],
    ids=["prompt_completion", "text"],
)
def test_other_formats_train(lab: Lab, rows: list[dict[str, str]], share: tuple[float, float]) -> None:
    write_rows(lab / "train.jsonl", rows)
    lab.train({"training.learning_rate": 0.02}).ok()
    losses = lab.losses()
    assert losses[-1] < losses[0] - 0.3
    counted = json.loads((lab / "run/run.json").read_text())["data"]["train"]
    assert share[0] < counted["trained_share"] < share[1]


def test_dora_trains_and_loads_plainly(lab: Lab) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lab.train({"adapter.method": "dora"}).ok()
    tensors = load_file(lab / "run/adapter/adapter_model.safetensors")
    assert sum("lora_magnitude_vector" in name for name in tensors) == 14
    assert json.loads((lab / "run/adapter/adapter_config.json").read_text())["use_dora"] is True
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lab / "chatml"), str(lab / "run/adapter"))
    assert lab.losses()[-1] < lab.losses()[0] - 0.3


@pytest.mark.parametrize("base", ["chatml", "llama3"])
def test_full_fine_tuning_writes_a_model_that_loads_plainly(lab: Lab, base: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {"model.name_or_path": base, "adapter": {"method": "none"}, "training.learning_rate": 1e-3}
    outcome = lab.train(changes).ok()
    assert not (lab / "run/adapter").exists()
    assert "finetune merge" not in outcome.stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (lab / base, lab / "run/model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    model, report = AutoModelForCausalLM.from_pretrained(lab / "run/model", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(lab / "run/model").chat_template
    assert "library_name: transformers" in (lab / "run/model/README.md").read_text()
    assert lab.losses()[-1] < lab.losses()[0] - 0.3


def dequantised(kind: str) -> Callable[[Any], None]:
    """Gives a model's linear layers the values that bitsandbytes' quantisation leaves of them."""

    def change(model: Any) -> None:
        import bitsandbytes.functional as bnb
        import torch

        with torch.no_grad():
            for name, module in model.named_modules():
                if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                    continue
                if kind == "nf4":
                    packed, state = bnb.quantize_4bit(module.weight, compress_statistics=True, quant_type="nf4")
                    module.weight.copy_(bnb.dequantize_4bit(packed, state))
                else:
                    rows, statistics, _ = bnb.int8_vectorwise_quant(module.weight.half())
                    module.weight.copy_(rows.float() * statistics[:, None] / 127)

    return change


# TRL rounds a fresh adapter to bfloat16 on a quantised base, and int8 rounds activations too.
@pytest.mark.parametrize(("kind", "within"), [("nf4", 5e-3), ("int8", 0.05)])
def test_on_a_quantised_base_the_losses_are_those_of_its_dequantised_weights(
    lab: Lab, kind: str, within: float
) -> None:
    """A quantised layer must pass gradients on, also after a validation: see finetune/compat.py."""
    import reference_loop
    import torch
    from safetensors.torch import load_file

    changes = {
        "model.quantization": kind,
        "data.validation": "held.jsonl",
        "training.eval_steps": 2,
        "training.save_steps": 4,
        "training.max_steps": 8,
        "training.lr_scheduler_type": "linear",
    }
    lab.train(changes).ok()
    settings = {"steps": 8, "batch": 4, "rate": 0.01, "r": 4, "alpha": 8, "seed": 42}
    place = (lab / "chatml", lab / "train.jsonl")
    expected = reference_loop.train(*place, change=dequantised(kind), **settings)
    unquantised = reference_loop.train(*place, **{**settings, "steps": 1})
    losses = lab.losses()
    assert losses == pytest.approx(expected, abs=within)
    assert losses[-1] < losses[0] - 1
    if kind == "nf4":
        assert losses[0] == pytest.approx(expected[0], abs=1e-5)
        assert abs(losses[0] - unquantised[0]) > 0.01
    for folder in ("adapter", "checkpoints/checkpoint-4"):
        tensors = load_file(lab / "run" / folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    facts = json.loads((lab / "run/adapter/finetune.json").read_text())
    assert facts["quantization"]["kind"] == kind
    assert len(facts["quantization"]["modules"]) == 14


def test_a_chat_template_of_the_recipe_travels_with_the_adapter(lab: Lab) -> None:
    from transformers import AutoTokenizer

    text = (lab / "chatml/chat_template.jinja").read_text().replace("You answer briefly.", "You speak in JSON.")
    (lab / "mine.jinja").write_text(text)
    lab.train({"data.chat_template": "mine.jinja"}).ok()
    tokenizer = AutoTokenizer.from_pretrained(lab / "run/adapter")
    assert tokenizer.chat_template == text
    lab.train({"output_dir": "without"}).ok()
    assert lab.losses() != lab.losses("without")
    assert not (lab / "without/adapter/tokenizer_config.json").exists()


def test_one_epoch_over_rows_that_do_not_fill_the_last_step(lab: Lab) -> None:
    write_rows(lab / "train.jsonl", chats(10))
    lab.train({"training.max_steps": None, "training.num_train_epochs": 1}).ok()
    steps = [line for line in lab.metrics() if "loss" in line]
    assert len(steps) == 3
    counted = json.loads((lab / "run/run.json").read_text())["data"]["train"]
    assert sum(line["trained_tokens"] for line in steps) == counted["trained_tokens"]


# -- every key counts --------------------------------------------------------------------------------------------------


def every_key(lab: Lab) -> dict[str, Any]:
    """A recipe that sets every key of the sections training reads, each to something that one process can do."""
    (lab / "mine.jinja").write_text((lab / "chatml/chat_template.jinja").read_text())
    (lab / "box.py").write_text(
        "class Keeps:\n"
        "    def start(self, run_folder, project, run_name, mode):\n"
        "        self.path = run_folder / 'kept'\n"
        "        self.path.write_text(f'{project} {run_name} {mode}')\n"
        "    def log(self, metrics, step): pass\n"
        "    def finish(self): pass\n"
    )
    rows = [json.loads(line) for line in (lab / "train.jsonl").read_text().splitlines()]
    (lab / "renamed.jsonl").write_text("".join(json.dumps({"chat": row["messages"]}) + "\n" for row in rows))
    source = {
        "path": "renamed.jsonl", "format": "messages", "columns": {"messages": "chat"}, "split": "train",
        "name": "rows", "weight": 2.0,
    }  # fmt: skip
    held = {
        "path": "held.jsonl", "format": "auto", "columns": {"messages": "messages"}, "split": "train", "name": "held",
        "weight": 1.0,
    }  # fmt: skip
    return {
        "model": {
            "name_or_path": "chatml", "family": "llama", "dtype": "float32",
            "quantization": "none", "attn_implementation": "eager", "trust_remote_code": False,
            "new_tokens": ["<plan>"], "new_special_tokens": ["<|plan|>"],
        },
        "adapter": {
            "method": "lora", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj"],
            "use_rslora": True, "layers_to_transform": [0, "1-1"], "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"0.self_attn.q_proj": 5}, "modules_to_save": ["model.norm"],
            "trainable_token_indices": [7], "accept": [], "init_lora_weights": "gaussian", "loraplus_lr_ratio": 4.0,
        },
        "data": {
            "train": [source], "validation": [held], "max_length": 512,
            "on_long_row": "drop", "packing": True, "packing_strategy": "bfd", "loss_on": ["assistant", "user"],
            "loss_on_thinking": False, "history": "last", "chat_template": "mine.jinja", "validation_split": 0.2,
            "weight_by": "tokens", "stopping_strategy": "all_exhausted", "deduplicate": "near",
            "near_duplicate_threshold": 0.99, "on_leak": "drop", "on_bad_row": "quarantine", "streaming": False,
            "num_proc": 1, "cache_dir": "kept-rows",
        },
        "audit": {
            "min_trained_share": 0.01, "min_stop_share": 0.9, "max_truncated_share": 0.1, "max_dropped_share": 0.9,
            "max_duplicate_share": 0.9, "min_packing_density": 0.01,
        },
        "training": {
            "method": "sft", "learning_rate": 1e-3, "num_train_epochs": 2.0, "max_steps": 3, "global_batch_size": 2,
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "lr_scheduler_type": "linear",
            "warmup_steps": 1, "optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 1,
            "activation_checkpointing": True, "logging_steps": 2, "eval_steps": 2, "save_steps": 2,
            "save_total_limit": 1, "on_save_error": "continue", "extra": {"adam_beta1": 0.8},
        },
        "launch": {"num_processes": 1, "device": "cpu", "timeout": 60.0},
        "tracking": {"trackers": ["box:Keeps"], "project": "p", "run_name": "n", "mode": "offline"},
        "output_dir": "run",
    }  # fmt: skip


def test_every_key_that_is_set_is_read(lab: Lab) -> None:
    changes = every_key(lab)
    path = lab / lab.recipe(changes)
    read_here = {"model", "adapter", "data", "audit", "training", "launch", "tracking", "output_dir"}
    known = {key for key in fields.known_keys() if key.split(".")[0].split("[")[0] in read_here}
    missing = {key for key in known if not _is_set(changes, key)}
    assert len(known) >= 50
    # For a launcher, and for the hub: refused here because they would have no effect; and what needs no new adapter.
    assert missing == {
        "launch.config", "model.revision", "data.train[].revision", "data.validation[].revision",
        "adapter.continue_from", "model.freeze",
    }  # fmt: skip
    assert len(load_recipe(path).set_keys()) >= 50
    lab.warm.run("train", path.name, cwd=lab.folder, env=lab.importable()).ok()
    assert (lab / "run/kept").read_text() == "p n offline"


def _is_set(changes: dict[str, Any], key: str) -> bool:
    place: Any = changes
    for part in key.replace("[]", ".0").split("."):
        if isinstance(place, list):
            place = place[int(part)]
        elif part in place:
            place = place[part]
        else:
            return False
    return True
