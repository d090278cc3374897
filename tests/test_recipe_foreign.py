"""Names of other tools are recognised, and what is said about them is true of the installed libraries."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from finetune.recipe import fields
from finetune.recipe.foreign import FOREIGN_VALUES, TOOLS, foreign, table
from finetune.recipe.unknown import is_secret, owned_by_recipe, unknown_key


def upstream_fields(package: str, module: str, name: str) -> set[str]:
    """The annotated fields of a class, read from its source, because importing it takes seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@pytest.fixture(scope="module")
def trainer_arguments() -> set[str]:
    found = upstream_fields("trl", "trainer/sft_config.py", "SFTConfig")
    found |= upstream_fields("transformers", "training_args.py", "TrainingArguments")
    assert len(found) >= 100
    return found


def test_the_table_names_all_tools_and_only_keys_that_exist() -> None:
    rows = table()
    assert len(rows) >= 200
    assert {tool for row in rows.values() for tool in row.tools} == set(TOOLS.values())
    known = set(fields.known_keys()) | set(fields.sections())
    unknown = [row for row in rows.values() if row.key not in known and not row.key.startswith("training.extra.")]
    assert unknown == []
    assert all(row.key or row.hint for row in rows.values())


def test_what_is_passed_on_to_trl_exists_there(trainer_arguments: set[str]) -> None:
    passed = [row.key.rsplit(".", 1)[-1] for row in table().values() if row.key.startswith("training.extra.")]
    assert len(passed) >= 10
    assert set(passed) <= trainer_arguments


def test_training_keys_are_spelt_as_the_installed_release_spells_them(trainer_arguments: set[str]) -> None:
    ours = set(fields.names("training")) - {"method", "global_batch_size", "on_save_error", "extra"}
    assert len(ours) >= 15
    assert ours <= trainer_arguments


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        ("", "base_model", "model.name_or_path"),
        ("", "micro_batch_size", "training.per_device_train_batch_size"),
        ("", "micro-batch-size", "training.per_device_train_batch_size"),
        ("", "sequence_len", "data.max_length"),
        ("", "cutoff_len", "data.max_length"),
        ("training", "max_seq_length", "data.max_length"),
        ("adapter", "lora_r", "adapter.r"),
        ("adapter", "lora_rank", "adapter.r"),
        ("", "model_name_or_path", "model.name_or_path"),
        ("", "load_in_4bit", "model.quantization"),
        ("", "train_on_inputs", "data.loss_on"),
        ("", "datasets", "data.train"),
        ("", "val_set_size", "data.validation_split"),
        ("", "gradient_checkpointing", "training.activation_checkpointing"),
        ("", "sample_packing", "data.packing"),
        ("", "lora_target_linear", "adapter.target_modules"),
        ("", "warmup_ratio", "training.warmup_steps"),
        ("", "report_to", "tracking.trackers"),
        ("", "wandb_project", "tracking.project"),
        ("", "finetuning_type", "adapter.method"),
        ("", "deepspeed", "launch.config"),
        ("", "bf16", "model.dtype"),
        ("", "flash_attention", "model.attn_implementation"),
        ("training", "batch_size", "training.global_batch_size"),
        ("data.train[]", "type", "data.train[].format"),
        ("", "neftune_noise_alpha", "training.extra.neftune_noise_alpha"),
    ],
)
def test_a_foreign_name_is_answered_with_ours(section: str, name: str, key: str) -> None:
    answer = unknown_key(section, name)
    assert answer.keys == (key,)
    assert f"here {key}" in answer.message


def test_accumulation_is_answered_with_the_arithmetic() -> None:
    message = unknown_key("training", "gradient_accumulation_steps").message
    assert "training.global_batch_size / (rows per device x processes)" in message


def test_a_misspelt_foreign_name_is_recognised() -> None:
    assert unknown_key("", "micro_batch_sise").keys == ("training.per_device_train_batch_size",)
    assert foreign("micro_batch_sise") is None


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("model", "learning_rate", "belongs under training: training.learning_rate"),
        ("", "learning_rate", "belongs under training: training.learning_rate"),
        ("training", "output_dir", "belongs at the top level, not under a section: output_dir"),
        ("", "dtype", "belongs under model or export: model.dtype, or export.dtype"),
        ("adapter", "packing", "belongs under data: data.packing"),
        ("model", "weight", "belongs under a source: data.train[].weight"),
    ],
)
def test_a_key_of_another_section_is_sent_there(section: str, name: str, message: str) -> None:
    assert message in unknown_key(section, name).message


def test_what_the_recipe_decides_may_not_stand_in_extra(trainer_arguments: set[str]) -> None:
    refused = {name for name in trainer_arguments if owned_by_recipe(name) is not None}
    decided = {"learning_rate", "gradient_accumulation_steps", "per_device_train_batch_size", "bf16", "fp16", "packing"}
    decided |= {"max_length", "output_dir", "push_to_hub", "hub_token", "report_to", "deepspeed", "fsdp", "eos_token"}
    decided |= {"gradient_checkpointing", "resume_from_checkpoint", "ddp_timeout", "assistant_only_loss", "run_name"}
    assert decided <= refused
    allowed = {"adam_beta1", "neftune_noise_alpha", "torch_compile", "optim_args", "tf32"}
    assert allowed <= trainer_arguments - refused


def test_secrets_are_told_by_name_and_tokens_of_a_tokenizer_are_none() -> None:
    secret = [
        "hub_token",
        "token",
        "HF_TOKEN",
        "hfToken",
        "wandb_api_key",
        "apikey",
        "api-key",
        "client_secret",
        "password",
    ]
    plain = ["eos_token", "pad_token", "max_new_tokens", "tokenizer", "key", "secretary", "special_tokens", "tokens"]
    assert [name for name in secret if not is_secret(name)] == []
    assert [name for name in plain if is_secret(name)] == []
    assert [key.name for key in fields.known_keys().values() if is_secret(key.name)] == []


def test_values_of_other_tools_are_answered_with_values_of_ours() -> None:
    assert len(FOREIGN_VALUES) >= 6
    for name, values in FOREIGN_VALUES.items():
        choices = {choice for key in fields.known_keys().values() if key.name == name for choice in key.choices}
        assert choices
        for word, ours in values.items():
            assert ours.split(",")[0] in choices
            assert word not in choices
