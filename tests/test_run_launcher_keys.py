"""Keys of a launcher's files: what nothing reads is refused, and the tables are those of the installed packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import RecipeError
from finetune.recipe.sections import LaunchOptions
from finetune.run import launcher_keys as keys
from finetune.run.modes import mode_of, read_mode


@pytest.fixture
def configs(root: Path) -> Path:
    return root / "configs"


def refusal(configs: Path, folder: Path, text: str | dict[str, Any], deepspeed: str = "") -> list[str]:
    """The lines with which an accelerate configuration is refused, without its name."""
    own = folder / "own.yaml"
    own.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    (folder / "ds.json").write_text(deepspeed)
    with pytest.raises(RecipeError) as raised:
        read_mode(own, configs)
    return [line.removeprefix(f"{folder}/") for line in str(raised.value).splitlines()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"distributed_type": "deepspeed"}, "or NO, not 'deepspeed'; write DEEPSPEED"),
        ({"distributed_type": "MEGATRON_LM"}, "not 'MEGATRON_LM'; see configs/accelerate"),
        ({"distributed_type": "TP"}, "not 'TP'; see configs/accelerate"),
        ({}, "not None; see configs/accelerate"),
        ({"distributed_type": "MULTI_GPU", "mixed_precison": "no"}, "no such key; write mixed_precision"),
        ({"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "EAGER"}}, "compiled by torch"),
        ({"distributed_type": "MULTI_GPU", "fp8_config": {"backend": "TE"}}, "model.dtype decides"),
        (
            {"distributed_type": "FSDP", "deepspeed_config": {"zero_stage": 2}},
            "no effect beside distributed_type: FSDP",
        ),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stagee": 2}}, "no such key; write zero_stage"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero3_init_flag": True}},
            "spreads the weights itself",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "a", "zero_stage": 2}},
            "zero_stage: has no effect beside deepspeed_config_file",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"offload_param_nvme_path": "/tmp"}},
            "has no effect without offload_param_device: nvme",
        ),
        ("distributed_type: MULTI_GPU\ndistributed_type: FSDP\n", "distributed_type is written twice; keep one"),
    ],
)
def test_what_an_accelerate_file_says_in_vain_is_refused(
    configs: Path, tmp_path: Path, given: dict[str, Any] | str, said: str
) -> None:
    lines = refusal(configs, tmp_path, given)
    assert said in lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 2}, "gradient_cliping": 1}', "gradient_cliping: DeepSpeed reads no such key"),
        ('{"zero_optimization": {"stage": 2, "overlap_com": true}}', "zero_optimization: overlap_com: DeepSpeed"),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', 'an old name; write "offload_optimizer"'),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}',
            "offload_optimizer: devise: DeepSpeed reads no such key; write device",
        ),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' twice in one object"),
    ],
)
def test_what_a_deepspeed_file_says_in_vain_is_refused(configs: Path, tmp_path: Path, text: str, said: str) -> None:
    own = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    (line,) = refusal(configs, tmp_path, own, text)
    assert line.startswith("ds.json: ")
    assert said in line


def test_all_of_a_files_faults_are_told_at_once(configs: Path, tmp_path: Path) -> None:
    text = {"distributed_type": "NO", "num_procesess": 2, "tpu_zone": "here", "fsdp_config": {"fsdp_version": 2}}
    assert len(refusal(configs, tmp_path, text)) == 3


def test_what_accelerates_questionnaire_writes_is_taken(configs: Path, tmp_path: Path) -> None:
    said_no = {
        "debug": False, "downcast_bf16": "no", "enable_cpu_affinity": False, "main_training_function": "main",
        "rdzv_backend": "static", "same_network": True, "tpu_env": [], "tpu_use_cluster": False,
        "tpu_use_sudo": False, "use_cpu": False, "compute_environment": "LOCAL_MACHINE", "fsdp_config": {},
        "dynamo_config": {"dynamo_backend": "NO"}, "machine_rank": 0, "num_machines": 1, "num_processes": 2,
    }  # fmt: skip
    own = tmp_path / "own.yaml"
    inline = {"gradient_accumulation_steps": 1, "offload_optimizer_device": "none", "zero3_init_flag": False}
    for given, told in (
        ({"distributed_type": "MULTI_GPU"}, "DDP"),
        ({"distributed_type": False}, "DDP"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {**inline, "zero_stage": 2}}, "ZeRO-2"),
    ):
        own.write_text(yaml.safe_dump({**said_no, **given}))
        assert str(read_mode(own, configs)) == told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "Block"),
    ],
)
def test_what_a_launcher_was_told_in_vain_is_refused(configs: Path, name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"^{name}: accelerate's launcher was told {value}: "):
        mode_of(LaunchOptions(), configs, {name: value})


def test_the_keys_of_an_accelerate_file_are_those_of_the_installed_package() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    assert keys.file_keys() - keys.OLD == set(ClusterConfig.__dataclass_fields__)
    options = {action.dest for action in launch_command_parser()._actions}
    of_deepspeed = {name for name in options if name.startswith(("deepspeed_", "zero", "offload_", "gradient_"))}
    assert keys.inline_keys() == of_deepspeed


class Asked(dict[str, Any]):
    """A configuration that writes down which keys it is asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __copy__(self) -> Asked:
        return self


def test_the_keys_of_a_deepspeed_file_are_those_that_the_installed_package_asks_for() -> None:
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    asked = Asked({"train_batch_size": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 2}})
    config.DeepSpeedConfig(asked)
    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) - {"amp"}  # which the recipe's model.dtype decides
    assert asked.names - removed == keys.DEEPSPEED

    def fields(model: Any, old: bool = False) -> set[str]:
        return {
            field.alias or name
            for name, field in model.model_fields.items()
            if bool((field.json_schema_extra or {}).get("deprecated")) == old
        }

    assert fields(DeepSpeedZeroConfig) == keys.ZERO
    assert fields(DeepSpeedZeroConfig, old=True) == set(keys.OLD_ZERO)
    assert fields(DeepSpeedZeroOffloadParamConfig) == keys.OFFLOADS["offload_param"]
    assert fields(DeepSpeedZeroOffloadOptimizerConfig) == keys.OFFLOADS["offload_optimizer"]


def test_every_shipped_deepspeed_file_holds_known_keys(configs: Path) -> None:
    for path in (configs / "deepspeed").glob("*.json"):
        assert keys.deepspeed_faults(json.loads(path.read_text()), path.name) == []
