"""How a run is laid over its processes: read from configurations and variables, filled in from the recipe, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from finetune.errors import RecipeError
from finetune.recipe.sections import LaunchOptions, ModelOptions, Recipe, TrainingOptions
from finetune.run.batch import BatchShape
from finetune.run.fsdp import fsdp_config
from finetune.run.modes import (
    Mode,
    compiles,
    config_file,
    enter,
    faults,
    machines_of,
    mode_of,
    read_mode,
)
from finetune.run.rehearsal import changes
from finetune.run.zero import deepspeed_config

SHAPE = BatchShape(2, 4, 2)
MODEL = ModelOptions(name_or_path="base")
TRAINING = TrainingOptions(max_grad_norm=0.5)


@pytest.fixture
def configs(root: Path) -> Path:
    return root / "configs"


def shipped(configs: Path, name: str) -> Mode:
    return read_mode(configs / "accelerate" / f"{name}.yaml", configs)


SHIPPED = [
    ("single", "DDP", False),
    ("cpu", "DDP", False),
    ("ddp", "DDP", False),
    ("zero1", "ZeRO-1", False),
    ("zero2", "ZeRO-2", False),
    ("zero3", "ZeRO-3", True),
    ("zero3-offload", "ZeRO-3, optimizer state and weights on the CPU", True),
    ("fsdp2", "FSDP2", True),
    ("fsdp2-qlora", "FSDP2", True),
    ("multi-node-ddp", "DDP", False),
    ("multi-node-zero3", "ZeRO-3", True),
    ("multi-node-fsdp2", "FSDP2", True),
]


@pytest.mark.parametrize(("name", "told", "spreads"), SHIPPED)
def test_each_shipped_configuration_is_the_mode_it_is_named_after(
    configs: Path, name: str, told: str, spreads: bool
) -> None:
    mode = shipped(configs, name)
    assert (str(mode), mode.spreads) == (told, spreads)
    assert faults(mode, MODEL, TRAINING, SHAPE, "cuda") == []


def test_no_shipped_configuration_is_left_out_of_these_tests(configs: Path) -> None:
    names = {path.stem for path in (configs / "accelerate").glob("*.yaml")}
    assert names == {row[0] for row in SHIPPED}


def test_every_shipped_configuration_says_what_it_is_for(configs: Path) -> None:
    for path in (configs / "accelerate").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# "), path
        found = yaml.safe_load(text)
        assert found.get("mixed_precision", "no") == "no"
        if file := (found.get("deepspeed_config") or {}).get("deepspeed_config_file"):
            assert (configs.parent / file).is_file()


def test_a_name_means_a_shipped_file_and_a_path_a_file_of_ones_own(configs: Path, tmp_path: Path) -> None:
    assert config_file("zero3", configs) == configs / "accelerate" / "zero3.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert config_file(str(own), configs) == own
    with pytest.raises(RecipeError, match=r"launch\.config: zer3 does not exist; did you mean zero3"):
        config_file("zer3", configs)


def test_the_launchers_variables_say_the_same_as_the_file(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(configs.parent)
    variables = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero3.json",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    started = mode_of(LaunchOptions(), configs, variables)
    assert started.settings == shipped(configs, "zero3").settings
    assert mode_of(LaunchOptions(config="zero3"), configs, variables).stage == 3
    assert mode_of(LaunchOptions(config="zero3"), configs, {}).stage == 3  # torchrun, which sets none
    with pytest.raises(RecipeError, match=r"the recipe says zero2 \(ZeRO-2\) and the launcher was given another"):
        mode_of(LaunchOptions(config="zero2"), configs, variables)


def launched(file: Path) -> dict[str, str]:
    """The variables that accelerate's own launcher would start processes with, made by its own code."""
    options = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", "-m", "finetune.train"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


@pytest.mark.parametrize("name", [row[0] for row in SHIPPED if "FSDP" in row[1] or "ZeRO" in row[1]])
def test_what_accelerates_launcher_sets_agrees_with_the_file_it_was_given(configs: Path, name: str) -> None:
    variables = launched(configs / "accelerate" / f"{name}.yaml")
    named = mode_of(LaunchOptions(config=name), configs, variables)
    started = mode_of(LaunchOptions(), configs, variables)
    assert (named.kind, str(named)) == (started.kind, str(started))
    assert faults(started, MODEL, TRAINING, SHAPE, "cuda") == []
    if named.kind == "fsdp":
        assert fsdp_config(started.settings) == fsdp_config(named.settings)
    else:
        assert started.settings == named.settings


@pytest.mark.parametrize(
    "given",
    [
        {"fsdp_offload_params": True, "fsdp_reshard_after_forward": "False"},
        {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,Embedding", "fsdp_min_num_params": None},
        {"fsdp_auto_wrap_policy": "size_based_wrap", "fsdp_min_num_params": 1000},
        {"fsdp_use_orig_params": "yes", "fsdp_ignored_modules": None},
    ],
)
def test_values_of_fsdp_are_the_same_from_a_file_and_from_its_launcher(
    configs: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    own = fsdp_file(tmp_path, given)
    variables = launched(own)
    named = mode_of(LaunchOptions(config=str(own)), configs, variables)
    started = mode_of(LaunchOptions(), configs, variables)
    assert fsdp_config(started.settings) == fsdp_config(named.settings)
    assert faults(named, MODEL, TRAINING, SHAPE, "cuda") == faults(started, MODEL, TRAINING, SHAPE, "cuda") == []
    if layers := given.get("fsdp_transformer_layer_cls_to_wrap"):
        assert fsdp_config(started.settings)["transformer_layer_cls_to_wrap"] == layers.split(",")
    other = fsdp_file(tmp_path, {"fsdp_state_dict_type": "FULL_STATE_DICT"})
    with pytest.raises(RecipeError, match="the launcher was given another configuration"):
        mode_of(LaunchOptions(config=str(other)), configs, variables)
    with pytest.raises(RecipeError, match="the launcher was given another configuration"):
        mode_of(LaunchOptions(config="ddp"), configs, variables)


def fsdp_file(folder: Path, given: dict[str, Any]) -> Path:
    own = folder / "own.yaml"
    values = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False, **given}
    head = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    own.write_text(yaml.safe_dump({**head, "distributed_type": "FSDP", "fsdp_config": values}))
    return own


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fsdp_ignored_modules": "lm_head"}, "fsdp_ignored_modules: lm_head has no effect"),
        ({"fsdp_backward_prefetch": "BACKWARD_PRE"}, "fsdp_backward_prefetch: BACKWARD_PRE has no effect"),
        ({"fsdp_forward_prefetch": True}, "fsdp_forward_prefetch: true has no effect"),
        ({"fsdp_use_orig_params": False}, "fsdp_use_orig_params: false has no effect"),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, "fsdp_sharding_strategy: HYBRID_SHARD has no effect"),
        ({"fsdp_activation_checkpointing_offload": True}, "the recipe's training.activation_checkpointing decides"),
        ({"fsdp_ofload_params": True}, "reads no such key; write fsdp_offload_params"),
    ],
)
def test_a_value_of_fsdp_that_nothing_would_read_is_refused(
    configs: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    own = fsdp_file(tmp_path, given)
    (fault,) = faults(read_mode(own, configs), MODEL, TRAINING, SHAPE, "cuda")
    assert fault.startswith(f"{own}: {next(iter(given))}: ")
    assert said in fault
    if "fsdp_ofload_params" not in given:  # which the launcher sets no variable for
        (fault,) = faults(mode_of(LaunchOptions(), configs, launched(own)), MODEL, TRAINING, SHAPE, "cuda")
        assert said in fault


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"deepspeed_config": {"zero_stage": "three"}}, "deepspeed_config: zero_stage: expected a whole number"),
        ({"deepspeed_config": {"zero_stage": 4}}, "zero_stage: expected a whole number from 0 to 3, not 4"),
        ({"deepspeed_config": {"gradient_clipping": "much"}}, "gradient_clipping: expected a number"),
        ({"deepspeed_config": {"offload_param_device": "disk"}}, "expected none, cpu or nvme, not 'disk'"),
        ({"deepspeed_config": ["a"]}, r"deepspeed_config: expected keys with values, not \['a'\]"),
        ({"fsdp_config": ["a"]}, r"fsdp_config: expected keys with values, not \['a'\]"),
        ({"fsdp_config": {"fsdp_min_num_params": "1e8"}}, "fsdp_config: fsdp_min_num_params: expected a whole number"),
        ({"fsdp_config": {"fsdp_offload_params": "cpu"}}, "fsdp_offload_params: expected true or false, not 'cpu'"),
        ({"fsdp_config": {"fsdp_auto_wrap_policy": "WRAP"}}, "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP,"),
        ({"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": ["A"]}}, "expected the names of classes with commas"),
        (
            {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "A", "fsdp_transformer_cls_to_wrap": "B"}},
            "is given twice, as A and as B",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_launcher_file_is_a_recipe_error(
    configs: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    own = tmp_path / "own.yaml"
    kind = "FSDP" if "fsdp_config" in values else "DEEPSPEED"
    own.write_text(yaml.safe_dump({"distributed_type": kind, **values}, sort_keys=False))
    with pytest.raises(RecipeError, match=said) as raised:
        read_mode(own, configs)
    assert str(raised.value).startswith(f"{own}: ")


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": "auto"}, "stage: expected a whole number from 0 to 3, not 'auto'"),
        (
            {"stage": 2, "offload_optimizer": "cpu"},
            'offload_optimizer: expected keys with values, as {"device"',
        ),
        ({"stage": 3, "offload_param": {"device": "disk"}}, "offload_param.device: expected none, cpu or nvme"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_deepspeed_file_is_a_recipe_error(
    configs: Path, tmp_path: Path, zero: dict[str, Any], said: str
) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: own.json}\n")
    with pytest.raises(RecipeError, match=re.escape(f"{tmp_path / 'own.json'}: zero_optimization.{said}")):
        read_mode(own, configs)


def test_a_number_of_machines_that_is_none_is_a_recipe_error_everywhere(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: DEEPSPEED\nnum_machines: two\ndeepspeed_config: {zero_stage: 2}\n")
    with pytest.raises(RecipeError, match="num_machines: expected a whole number, not 'two'"):
        machines_of(own)
    data = {"train": [{"path": "rows.jsonl"}]}
    recipe = Recipe.model_validate(
        {"model": MODEL, "data": data, "output_dir": "out", "launch": {"config": str(own), "num_processes": 2}}
    )
    with pytest.raises(RecipeError, match="num_machines: expected a whole number, not 'two'"):
        changes(recipe, tmp_path, tmp_path, {}, processes=2, steps=2, stood_in=False)


def test_a_shipped_deepspeed_file_is_found_from_any_folder(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped(configs, "zero2").stage == 2
    variables = {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2.json"}
    assert mode_of(LaunchOptions(), configs, variables).stage == 2
    variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "missing.json"
    with pytest.raises(RecipeError, match=r"deepspeed_config_file: missing\.json does not exist"):
        mode_of(LaunchOptions(), configs, variables)


def test_values_that_accelerate_takes_without_a_file_are_a_mode_too(configs: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    given = {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_accumulation_steps": 4}
    own.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": given}))
    mode = read_mode(own, configs)
    assert (mode.stage, mode.offloads) == (3, ("optimizer",))
    assert faults(mode, MODEL, TRAINING, SHAPE, "cuda") == []
    assert len(faults(mode, MODEL, TRAINING, BatchShape(2, 2, 2), "cuda")) == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("gradient_accumulation_steps", 2, r"training.global_batch_size decides \(4 here\)"),
        ("gradient_clipping", 1.0, r"training.max_grad_norm decides \(0.5 here\)"),
        ("train_batch_size", 3, r"training.global_batch_size decides \(16 here\)"),
        ("bf16", {"enabled": True}, "model.dtype decides"),
        ("optimizer", {"type": "AdamW"}, "training.optim and training.learning_rate decides"),
        ("scheduler", {"type": "WarmupLR"}, "training.lr_scheduler_type decides"),
    ],
)
def test_a_deepspeed_value_that_contradicts_the_recipe_is_refused(key: str, value: Any, said: str) -> None:
    settings = {"zero_optimization": {"stage": 2}, key: value}
    (fault,) = faults(Mode("deepspeed", "own.json", settings), MODEL, TRAINING, SHAPE, "cuda")
    assert fault.startswith(f"own.json: {key}: ")
    assert re.search(said, fault)


def test_deepspeeds_own_optimizer_does_not_take_the_place_of_another_kind(configs: Path) -> None:
    offloaded = dict(shipped(configs, "zero3-offload").settings)
    other = TRAINING.model_copy(update={"optim": "sgd"})
    assert faults(Mode("deepspeed", "own.json", offloaded), MODEL, other, SHAPE) == []  # torch's is taken
    for forced in ({"zero_force_ds_cpu_optimizer": True}, {}):
        given = {name: value for name, value in offloaded.items() if name != "zero_force_ds_cpu_optimizer"} | forced
        (fault,) = faults(Mode("deepspeed", "own.json", given), MODEL, other, SHAPE)
        assert fault.startswith("own.json: ")
        assert "training.optim: sgd" in fault
        assert faults(Mode("deepspeed", "own.json", given), MODEL, TRAINING, SHAPE) == []
        assert compiles(Mode("deepspeed", "own.json", given))
    assert not compiles(Mode("deepspeed", "own.json", offloaded))


def test_a_configuration_is_not_judged_by_the_tools_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    given = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    mode = Mode("deepspeed", "own.json", given)
    assert compiles(mode)
    assert faults(mode, MODEL, TRAINING, SHAPE, "cuda") == []


def test_a_deepspeed_value_that_agrees_with_the_recipe_is_let_through() -> None:
    settings = {
        "zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 16, "gradient_clipping": 0.5, "bf16": {"enabled": "auto"},
    }  # fmt: skip
    assert faults(Mode("deepspeed", "own.json", settings), MODEL, TRAINING, SHAPE, "cuda") == []


def test_what_a_mode_cannot_do_is_refused_with_what_to_use_instead(configs: Path) -> None:
    (on_cpu,) = faults(shipped(configs, "fsdp2"), MODEL, TRAINING, SHAPE, "cpu")
    assert "launch.config: zero3" in on_cpu
    (first,) = faults(Mode("fsdp", "own.yaml", {"version": "1"}), MODEL, TRAINING, SHAPE, "cuda")
    assert "write fsdp_version: 2" in first
    eight = MODEL.model_copy(update={"quantization": "int8"})
    assert "write nf4" in faults(shipped(configs, "fsdp2"), eight, TRAINING, SHAPE, "cuda")[0]
    half = MODEL.model_copy(update={"dtype": "float16"})
    assert "float16" in faults(shipped(configs, "zero2"), half, TRAINING, SHAPE, "cuda")[0]
    assert "mixed_precision bf16" in faults(Mode(precision="bf16"), MODEL, TRAINING, SHAPE, "cuda")[0]
    drive = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}
    settings = {"zero_optimization": drive, "zero_force_ds_cpu_optimizer": False}
    (stored,) = faults(Mode("deepspeed", "own.json", settings), MODEL, TRAINING, SHAPE, "cuda")
    assert "offload_optimizer and offload_param: what lies on an NVMe drive" in stored
    assert "write device: cpu" in stored
    odd = {"stage": 2, "round_robin_gradients": True, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    settings = {"zero_optimization": odd, "zero_force_ds_cpu_optimizer": False}
    named, split = faults(Mode("deepspeed", "own.json", settings), MODEL, TRAINING, SHAPE, "cuda")
    assert "round_robin_gradients" in named
    assert "offload_optimizer.ratio" in split
    (none,) = faults(Mode("deepspeed", "own.json", {"zero_optimization": {"stage": 0}}), MODEL, TRAINING, SHAPE, "cuda")
    assert "stage 0 shares nothing" in none


def test_the_recipe_fills_in_deepspeeds_configuration_and_leaves_nothing_open(configs: Path) -> None:
    made = deepspeed_config(shipped(configs, "zero2").settings, TRAINING, SHAPE, "bfloat16")
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert '"auto"' not in json.dumps(made)
    assert "torch_autocast" not in deepspeed_config(shipped(configs, "zero2").settings, TRAINING, SHAPE, "float32")


def test_fsdp_is_told_in_the_words_of_the_trainer(configs: Path) -> None:
    made = fsdp_config(shipped(configs, "fsdp2").settings)
    assert made["version"] == 2
    assert made["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert made["state_dict_type"] == "SHARDED_STATE_DICT"
    assert made["cpu_offload"] is False


def test_loading_on_one_process_alone_is_said_not_to_be_followed(configs: Path, tmp_path: Path) -> None:
    assert [shipped(configs, name).note for name, _, _ in SHIPPED] == [""] * len(SHIPPED)
    asked = fsdp_file(tmp_path, {"fsdp_cpu_ram_efficient_loading": True})
    assert "every process reads the whole base" in read_mode(asked, configs).note
    by_default = mode_of(LaunchOptions(), configs, {"ACCELERATE_USE_FSDP": "true", **launched(asked)})
    assert by_default.note == read_mode(asked, configs).note
    assert fsdp_config(by_default.settings)["cpu_ram_efficient_loading"] == "false"


def test_entering_a_mode_clears_the_variable_that_would_leave_deepspeed_out(configs: Path) -> None:
    variables = {"ACCELERATE_USE_CPU": "true"}
    enter(shipped(configs, "zero2"), variables)
    assert variables == {"ACCELERATE_USE_DEEPSPEED": "true"}
    plain = {"ACCELERATE_USE_CPU": "true"}
    enter(Mode(), plain)
    assert plain == {"ACCELERATE_USE_CPU": "true"}


def test_what_a_launcher_says_of_deepspeed_is_not_left_beside_the_whole_configuration(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    given = {"zero_stage": 2, "offload_optimizer_device": "cpu", "gradient_accumulation_steps": 4}
    head = {"num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    own.write_text(yaml.safe_dump({**head, "distributed_type": "DEEPSPEED", "deepspeed_config": given}))
    variables = launched(own)
    mode = mode_of(LaunchOptions(), configs, variables)
    assert (mode.stage, mode.offloads) == (2, ("optimizer",))
    settings = deepspeed_config(mode.settings, TRAINING, SHAPE, "float32")
    monkeypatch.setattr("os.environ", variables)
    with pytest.raises(ValueError, match="will be ignored"):
        DeepSpeedPlugin(hf_ds_config=settings)
    enter(mode, variables)
    assert DeepSpeedPlugin(hf_ds_config=settings).deepspeed_config["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(("given", "named"), [("cpu", "zero3"), ("single", "zero3"), ("cpu", "fsdp2")])
def test_a_launcher_with_a_file_for_ddp_does_not_start_what_the_recipe_names(
    configs: Path, given: str, named: str
) -> None:
    variables = {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_MIXED_PRECISION": "no"}
    assert set(variables) <= set(launched(configs / "accelerate" / f"{given}.yaml"))
    assert mode_of(LaunchOptions(config="ddp"), configs, variables) == shipped(configs, "ddp")
    with pytest.raises(
        RecipeError, match=rf"the recipe says {named} \(.*\) and the launcher was given another .*\(DDP"
    ):
        mode_of(LaunchOptions(config=named), configs, variables)
    with_torchrun = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert mode_of(LaunchOptions(config=named), configs, with_torchrun) == shipped(configs, named)


@pytest.mark.parametrize(("name", "value"), [("gradient_predivide_factor", 7), ("prescale_gradients", True)])
def test_a_value_over_which_zero_breaks_off_is_refused(name: str, value: Any) -> None:
    mode = Mode("deepspeed", "own.json", {"zero_optimization": {"stage": 2}, name: value})
    (fault,) = faults(mode, MODEL, TRAINING, SHAPE, "cuda")
    assert fault.startswith(f"own.json: {name}: ZeRO takes no other than ")
