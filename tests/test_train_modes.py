"""Runs under ZeRO and FSDP2: the losses of one process, and the same adapter, whole, from every mode.

Two real processes over gloo. FSDP2 needs the disguise of fsdp_on_cpu.py, because accelerate has it on accelerators
only. In 32 bit the modes agree with one process of the same global batch. In 16 bit the reference takes the same
micro-batches too, since a product of one row rounds otherwise than one of two.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from listed_experts import ListedConfig, ListedForCausalLM
from safetensors.torch import load_file
from tiny import Lab, chats, write_rows
from warm import Outcome

from finetune.families.family import TWIN
from finetune.run.launch import free_port
from finetune.run.spread import name_layers

TESTS = Path(__file__).parent
STEPS = 20
WITHIN = 400.0  # seconds for a run, on a machine that is busy
# A step's loss over a few dozen tokens is known in bfloat16 to 3e-4 only, since logits of 8 are rounded to 0.03.
MANY_TOKENS = {
    "training.global_batch_size": 16,
    "training.per_device_train_batch_size": 2,
    "training.learning_rate": 2e-4,
}
SETTINGS: dict[str, Any] = {
    "data.train": "many.jsonl",
    "data.validation": "held.jsonl",
    "training.max_steps": STEPS,
    "training.learning_rate": 1e-3,
    "training.global_batch_size": 2,
}


def start(lab: Lab, mode: str, changes: Mapping[str, Any], count: int = 2) -> list[Outcome]:
    """Run the two processes of a mode; DDP needs no configuration."""
    settings = {**SETTINGS, **changes, "output_dir": mode}
    if mode != "ddp":
        settings["launch.config"] = mode
    how: dict[str, Any] = {}
    if mode.startswith("fsdp"):
        how = {
            "entry": "fsdp_on_cpu:main",
            "env": {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])},
        }
    return lab.warm.ranks(count, lab.recipe(settings, f"{mode}.yaml"), cwd=lab.folder, timeout=WITHIN, **how)


def run(lab: Lab, mode: str, changes: Mapping[str, Any]) -> Outcome:
    """The first process of a mode's run, after both succeeded."""
    first, second = start(lab, mode, changes)
    second.ok()
    assert second.stdout == ""
    return first.ok()


def alone(lab: Lab, changes: Mapping[str, Any]) -> None:
    """The same in one process."""
    if not (lab / "many.jsonl").exists():
        write_rows(lab / "many.jsonl", chats(4 * STEPS if changes.get("data.packing") else 2 * STEPS))
    lab.train({**SETTINGS, **changes, "output_dir": "one"}, timeout=WITHIN).ok()


def product(lab: Lab, name: str) -> dict[str, torch.Tensor]:
    """What a run has saved, by name."""
    adapter, model = lab / name / "adapter/adapter_model.safetensors", lab / name / "model/model.safetensors"
    found: dict[str, torch.Tensor] = load_file(adapter if adapter.exists() else model)
    return found


def assert_alike(lab: Lab, mode: str, rel: float) -> None:
    """A mode's losses are those of one process, and so is what it saved: whole, of the same names and dtypes."""
    assert len(lab.losses(mode)) == STEPS
    assert lab.losses(mode) == pytest.approx(lab.losses("one"), rel=rel)
    measured = [[line["eval_loss"] for line in lab.metrics(name) if "eval_loss" in line] for name in (mode, "one")]
    assert measured[0] == pytest.approx(measured[1], rel=rel)
    ours, theirs = product(lab, mode), product(lab, "one")
    assert {name: (one.shape, one.dtype) for name, one in ours.items()} == {
        name: (one.shape, one.dtype) for name, one in theirs.items()
    }
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e3 * rel) for name in ours)
    assert any(bool(one.any()) for name, one in ours.items() if "lora_B" in name or "lora_" not in name)


def stopped_after(lab: Lab, name: str, step: int) -> None:
    """Make a finished run one that was stopped at an earlier checkpoint."""
    for later in (lab / name / "checkpoints").glob("checkpoint-*"):
        if int(later.name.rpartition("-")[2]) > step:
            shutil.rmtree(later)
    for product_name in ("adapter", "model"):
        shutil.rmtree(lab / name / product_name, ignore_errors=True)
    told = {"exit_code": 75, "reason": "stopped", "step": step, "ended": "2026-01-01T00:00:00+00:00"}
    (lab / name / "exit.json").write_text(json.dumps(told))


def test_weights_in_parts_train_packed_rows_as_one_process_does(lab: Lab) -> None:
    changes = {"data.packing": True, "data.max_length": 160}
    alone(lab, changes)
    for mode in ("zero3", "fsdp2"):
        said = run(lab, mode, changes).stderr
        assert "rows are padded" not in said
        assert "FutureWarning" not in said
        assert_alike(lab, mode, 1e-6)
    merged = lab.warm.run("merge", "zero3", "--json", cwd=lab.folder).ok()
    assert json.loads(merged.stdout)


@pytest.mark.slow
def test_optimizer_state_and_gradients_in_parts_train_as_one_process_does(lab: Lab) -> None:
    alone(lab, {})
    for mode in ("zero1", "zero2"):
        run(lab, mode, {})
        assert_alike(lab, mode, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("changes", "rel"),
    [
        ({}, 1e-6),
        ({"data.packing": True, "data.max_length": 160}, 1e-6),
        ({"training.global_batch_size": 4, "training.per_device_train_batch_size": 1}, 1e-6),
        ({"adapter": {"method": "none"}, "training.learning_rate": 1e-4}, 1e-6),
        ({"adapter.modules_to_save": ["lm_head"], "model.name_or_path": "llama3"}, 1e-6),
        ({"adapter.method": "dora"}, 1e-6),
        (
            {
                "model.dtype": "bfloat16",
                **MANY_TOKENS,
            },
            2e-4,
        ),
        (
            {
                "model.name_or_path": "thinking",
                "model.quantization": "nf4",
                "model.dtype": "bfloat16",
                **MANY_TOKENS,
            },
            2e-4,
        ),
        ({"training.activation_checkpointing": True}, 1e-6),
    ],
    ids=["lora", "packed", "accumulated", "full", "head", "dora", "bf16", "qlora", "recomputed"],
)
def test_each_mode_trains_as_one_process_does(lab: Lab, mode: str, changes: dict[str, Any], rel: float) -> None:
    alone(lab, changes)
    run(lab, mode, changes)
    assert_alike(lab, mode, rel)


PACKED = {"data.packing": True, "data.max_length": 160}
EXPERTS = {"model.name_or_path": "moe"}
IN_16_BIT = {"model.dtype": "bfloat16", **MANY_TOKENS, "training.per_device_train_batch_size": 8}
IN_4_BIT = {"model.quantization": "nf4", **IN_16_BIT}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "rel"),
    [
        ({**PACKED, "adapter": {"method": "none"}, "training.learning_rate": 1e-4}, 1e-6),
        ({**PACKED, **IN_16_BIT}, 2e-4),
        ({**PACKED, **IN_4_BIT, **MANY_TOKENS, "model.name_or_path": "thinking"}, 2e-4),
        (EXPERTS, 1e-4),
        ({**PACKED, **EXPERTS}, 1e-4),
        ({**IN_4_BIT, **EXPERTS}, 2e-4),
    ],
    ids=["full-packed", "bf16-packed", "qlora-packed", "experts", "experts-packed", "experts-qlora"],
)
def test_all_modes_train_as_one_process_does(lab: Lab, changes: dict[str, Any], rel: float) -> None:
    if changes.get("model.name_or_path") == "moe":
        zoo.folder(lab / "moe", "moe", vocab_size=2048)
    alone(lab, changes)
    for mode in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        run(lab, mode, changes)
        assert_alike(lab, mode, rel)


WHOLE = {"adapter": {"method": "none"}, "training.learning_rate": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "moe"])
@pytest.mark.parametrize("freeze", [[], ["lm_head", "embed_tokens"]], ids=["all", "frozen head"])
def test_a_base_of_16_bits_is_trained_whole_in_parts_as_in_one_process(lab: Lab, kind: str, freeze: list[str]) -> None:
    """Its weights are widened as their parts are laid down, and what the model computed when it was built is not."""
    zoo.folder(lab / "narrow", kind, vocab_size=2048, dtype=torch.bfloat16)
    changes = {**WHOLE, "model.name_or_path": "narrow", **({"model.freeze": freeze} if freeze else {})}
    alone(lab, changes)
    for mode in ("zero3", "fsdp2"):
        run(lab, mode, changes)
        assert_alike(lab, mode, 1e-4 if kind == "moe" else 1e-6)
        assert {one.dtype for one in product(lab, mode).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_weights_are_multiplied_in_16_bits_in_every_mode(lab: Lab, dtype: torch.dtype) -> None:
    """Products in float32, or an update that 16 bits do not see yet, would show in the second step's loss.

    Weights that lie on the grid of bfloat16 move a step at a time there, so the last digits of an update decide more.
    """
    zoo.folder(lab / "narrow", "gemma2", vocab_size=2048, dtype=dtype)
    changes = {**IN_16_BIT, **WHOLE, "model.name_or_path": "narrow"}
    alone(lab, changes)
    for mode in ("ddp", "zero2", "zero3", "fsdp2"):
        run(lab, mode, changes)
        assert lab.losses(mode)[:2] == pytest.approx(lab.losses("one")[:2], rel=1e-6)
        assert lab.losses(mode) == pytest.approx(lab.losses("one"), rel=2e-3)


def listed() -> ListedForCausalLM:
    """A model of experts in a list, of which each token is sent to one."""
    torch.manual_seed(1)
    return ListedForCausalLM(ListedConfig(**{**TWIN, "vocab_size": 2048}))


def test_only_experts_in_a_list_are_gathered_whole() -> None:
    from deepspeed.utils import z3_leaf_module  # here, because its import takes seconds

    arguments: Any = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: True))
    for model, blocks in ((listed(), {"ListedMoE"}), (zoo.model("moe"), set())):
        name_layers(model, None, arguments)
        assert {type(one).__name__ for one in model.modules() if z3_leaf_module(one)} == blocks


@pytest.mark.slow
def test_experts_in_a_list_train_in_parts_as_in_one_process(lab: Lab) -> None:
    listed().save_pretrained(lab / "listed")
    for file in zoo.TOKENIZER.iterdir():
        shutil.copyfile(file, lab / "listed" / file.name)
    changes = {
        "model.name_or_path": "listed",
        "model.trust_remote_code": True,
        "adapter.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],  # some experts are sent no token at all
        "adapter.accept": ["experts_frozen"],
    }
    alone(lab, changes)
    for mode in ("zero3", "fsdp2"):
        assert "rows are padded" in run(lab, mode, changes).stderr
        assert_alike(lab, mode, 1e-4)


@pytest.mark.slow
def test_state_and_weights_in_the_hosts_memory_train_as_one_process_does(lab: Lab) -> None:
    alone(lab, {})
    run(lab, "zero3-offload", {})
    assert_alike(lab, "zero3-offload", 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)  # it may have to compile that optimizer, for minutes
def test_deepspeeds_own_optimizer_for_cpus_trains_as_torchs_does(lab: Lab, root: Path) -> None:
    settings = json.loads((root / "configs/deepspeed/zero3-offload.json").read_text())
    (lab / "own.json").write_text(json.dumps({**settings, "zero_force_ds_cpu_optimizer": True}))
    (lab / "own.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: own.json\n")
    alone(lab, {})

    where = {"launch.config": "own.yaml", "output_dir": "own", "training.save_steps": 10}
    recipe = lab.recipe({**SETTINGS, **where}, "own-recipe.yaml")
    for outcome in lab.warm.ranks(2, recipe, cwd=lab.folder, timeout=WITHIN):
        outcome.ok()
    assert_alike(lab, "own", 1e-6)
    theirs = product(lab, "own")
    stopped_after(lab, "own", 10)
    first, second = lab.warm.ranks(2, recipe, cwd=lab.folder, timeout=WITHIN)
    second.ok()
    assert "checkpoint-10" in first.ok().stderr
    assert all(torch.equal(one, theirs[name]) for name, one in product(lab, "own").items())


def test_fsdp_on_a_cpu_is_refused_before_anything_is_loaded(lab: Lab) -> None:
    for outcome in lab.warm.ranks(2, lab.recipe({"launch.config": "fsdp2"}), cwd=lab.folder):
        assert outcome.returncode == 2
        assert "launch.config: zero3" in outcome.stderr
        assert "Traceback" not in outcome.stderr
    assert not (lab / "run").exists()


def test_a_configuration_that_contradicts_the_recipe_ends_the_command_before_it_launches(lab: Lab) -> None:
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": 3.0}
    (lab / "own.json").write_text(json.dumps(settings))
    (lab / "own.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: own.json\n")
    done = lab.train({"launch.config": "own.yaml", "launch.num_processes": 2})
    assert done.returncode == 2
    assert "gradient_clipping: the recipe's training.max_grad_norm decides (1 here)" in done.stderr
    assert "accelerate" not in done.stderr.replace("accelerate.", "")
    assert not (lab / "run").exists()


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_loss_that_is_no_number_changes_no_weight_under_deepspeed(lab: Lab, mode: str) -> None:
    for outcome in start(lab, mode, {"data.train": "train.jsonl", "model.name_or_path": "infinite"}):
        assert outcome.returncode == 76, outcome.stderr
        assert "the update was not made" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_stopped_run_goes_on_to_the_same_weights(lab: Lab, mode: str, method: str) -> None:
    write_rows(lab / "many.jsonl", chats(16))
    changes = {"adapter": {"method": method}, "training.max_steps": 6, "training.learning_rate": 1e-4}
    whole = {**changes, "training.save_steps": 3}
    run(lab, mode, whole)
    theirs = product(lab, mode)
    stopped_after(lab, mode, 3)
    assert "checkpoint-3" in run(lab, mode, whole).stderr
    ours = product(lab, mode)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- real launchers ----------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": (
        "-m", "accelerate.commands.launch", "--config_file", "{configs}/accelerate/zero3.yaml", "--num_processes", "2",
        "--main_process_port", "{port}", "-m", "finetune.train", "zero3.yaml",
    ),
    "torchrun": (
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "finetune.train", "zero3.yaml",
        "launch.config=zero3",
    ),
    "deepspeed": (
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}", "--no_local_rank", "--module",
        "finetune.train", "zero3.yaml", "launch.config=zero3",
    ),
    "finetune": ("-m", "finetune", "train", "zero3.yaml", "launch.config=zero3", "launch.num_processes=2"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_starts_weights_in_parts(lab: Lab, root: Path, launcher: str) -> None:
    alone(lab, {})
    lab.recipe({**SETTINGS, "output_dir": "zero3"}, "zero3.yaml")
    words = [one.format(configs=root / "configs", port=free_port()) for one in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, *words], cwd=lab.folder, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((lab / "zero3/run.json").read_text())["world_size"] == 2
    assert_alike(lab, "zero3", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "finetune"])
def test_deepspeed_values_without_a_file_of_its_own_start(lab: Lab, launcher: str) -> None:
    """As `accelerate config` writes them."""
    (lab / "inline.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        "deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 1, offload_optimizer_device: none, "
        "zero3_init_flag: false}\n"
    )
    write_rows(lab / "many.jsonl", chats(4))
    recipe = lab.recipe({**SETTINGS, "training.max_steps": 2})
    words = {
        "accelerate": [
            "-m", "accelerate.commands.launch", "--config_file", "inline.yaml", "--main_process_port", str(free_port()),
            "-m", "finetune.train", recipe,
        ],
        "finetune": ["-m", "finetune", "train", recipe, "launch.config=inline.yaml", "launch.num_processes=2"],
    }[launcher]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], cwd=lab.folder, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ZeRO-2" in json.loads((lab / "run/run.json").read_text())["made_of"]["found"]["parallelism"]
    assert len(lab.losses()) == 2
