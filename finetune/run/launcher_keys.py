"""Which keys the files of accelerate and DeepSpeed may hold: any other would be ignored there without a word.

Neither package tells its keys without torch, so they stand here, as accelerate 1.15 and DeepSpeed 0.19.8 read them;
tests/test_run_launcher_keys.py compares them with the installed packages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from finetune.registry import nearest

# Of an accelerate configuration: what its launcher, or finetune, reads.
_FILE = frozenset({
    "compute_environment", "debug", "distributed_type", "enable_cpu_affinity", "gpu_ids", "machine_rank",
    "main_process_ip", "main_process_port", "main_training_function", "mixed_precision", "num_machines",
    "num_processes", "rdzv_backend", "same_network", "use_cpu",
})  # fmt: skip
# Sections of one mode each, which would be ignored in any other.
_SECTIONS = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP"}
# What `accelerate config` also writes, with a value that says no.
_UNUSED = {
    "command_file": "", "commands": "", "downcast_bf16": "", "dynamo_config": ": nothing here is compiled by torch",
    "fp8_config": ": the recipe's model.dtype decides", "megatron_lm_config": "", "mpirun_config": "",
    "parallelism_config": ": neither tensors nor sequences are split here", "tpu_env": "", "tpu_name": "",
    "tpu_use_cluster": "", "tpu_use_sudo": "", "tpu_vm": "", "tpu_zone": "",
    "dynamo_backend": ": nothing here is compiled by torch", "fp16": ": the recipe's model.dtype decides",
}  # fmt: skip
OLD = frozenset({"dynamo_backend", "fp16"})  # which accelerate still turns into others
_KINDS = ("MULTI_GPU", "MULTI_XPU", "DEEPSPEED", "FSDP", "NO")
_NO_MODE = "MULTI_CPU"  # read as DDP: its launcher starts one process, which is refused when it is started (launch.py)

# Of `deepspeed_config` in that file: for the launcher, in place of a file of DeepSpeed's, and without effect here.
_STARTS = frozenset({
    "deepspeed_config_file", "deepspeed_exclusion_filter", "deepspeed_hostfile", "deepspeed_inclusion_filter",
    "deepspeed_multinode_launcher",
})  # fmt: skip
_INLINE = frozenset({
    "gradient_accumulation_steps", "gradient_clipping", "offload_optimizer_device", "offload_param_device",
    "zero_stage",
})  # fmt: skip
_DRIVES = {"offload_optimizer_nvme_path": "offload_optimizer_device", "offload_param_nvme_path": "offload_param_device"}
_IDLE = {
    "deepspeed_moe_layer_cls_names": "the model's family names its blocks of experts",
    "zero3_init_flag": "finetune spreads the weights itself, after it has checked them",
    "zero3_save_16bit_model": "finetune gathers what it saves itself",
}

# What says the same, and how the launcher is to compile or split, as variables of the processes that it starts.
_VARIABLES = {
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": _IDLE["deepspeed_moe_layer_cls_names"],
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": _IDLE["zero3_init_flag"],
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _IDLE["zero3_save_16bit_model"],
    "ACCELERATE_DYNAMO_BACKEND": "nothing here is compiled by torch",
    "ACCELERATE_USE_MEGATRON_LM": "there are DDP, ZeRO and FSDP2 here",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "neither tensors nor sequences are split here",
}

# Of DeepSpeed's own file.
DEEPSPEED = frozenset({
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level",
    "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard",
    "csv_monitor", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
ZERO = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm",
    "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})  # fmt: skip
OLD_ZERO = {  # which DeepSpeed still turns into others, where nothing here would look for them
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory" in the sections of offload_param and offload_optimizer',
    "stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save"',
}
OFFLOADS = {
    "offload_param": frozenset({"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"}),
    "offload_optimizer": frozenset({
        "buffer_count", "cpuadam_cores_perc", "device", "fast_init", "nvme_path", "pin_memory", "pipeline_read",
        "pipeline_write", "ratio", "super_offload",
    }),
}  # fmt: skip


def file_keys() -> frozenset[str]:
    """Every key that an accelerate configuration may hold."""
    return _FILE | set(_SECTIONS) | set(_UNUSED)


def inline_keys() -> frozenset[str]:
    """Every key that its `deepspeed_config` may hold."""
    return _STARTS | _INLINE | set(_DRIVES) | set(_IDLE)


def file_faults(found: Mapping[str, Any], where: str) -> list[str]:
    """What of an accelerate configuration nothing would read, each with what to do instead.

    Args:
        found: the file's content.
        where: the file's name, for messages.
    """
    kind = kind_of(found)
    faults = []
    if kind not in _KINDS and kind != _NO_MODE:
        upper = next((one for one in _KINDS if one == kind.upper()), None)
        hint = f"write {upper}" if upper else "see configs/accelerate"
        expected = f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
        faults.append(f"{where}: distributed_type: expected {expected}, not {found.get('distributed_type')!r}; {hint}")
    if found.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        faults.append(f"{where}: compute_environment: expected LOCAL_MACHINE, not {found['compute_environment']!r}")
    faults += _unknown(found, file_keys(), where, "accelerate")
    for name, owner in _SECTIONS.items():
        if kind in _KINDS and kind != owner and not _says_no(found.get(name)):
            faults.append(f"{where}: {name}: has no effect beside distributed_type: {kind}; remove it")
    if kind == "DEEPSPEED" and isinstance(found.get("deepspeed_config"), Mapping):
        faults += _inline_faults(found["deepspeed_config"], f"{where}: deepspeed_config")
    for name, why in _UNUSED.items():
        if not _says_no(found.get(name)):
            faults.append(f"{where}: {name}: has no effect, or an unwanted one{why}; remove it")
    return faults


def kind_of(found: Mapping[str, Any]) -> str:
    """`distributed_type` of an accelerate configuration; YAML reads a plain NO as false."""
    value = found.get("distributed_type")
    return "NO" if value is False else str(value)


def deepspeed_faults(found: Mapping[str, Any], where: str) -> list[str]:
    """What of DeepSpeed's own file it would not read, each with what to do instead.

    Args:
        found: the file's content, in which zero_optimization and what it says to offload are objects.
        where: the file's name, for messages.
    """
    zero = found["zero_optimization"]
    faults = [*_unknown(found, DEEPSPEED, where, "DeepSpeed")]
    place = f"{where}: zero_optimization"
    faults += _unknown([name for name in zero if name not in OLD_ZERO], ZERO, place, "DeepSpeed")
    faults += [f"{place}.{name}: is an old name; write {new}" for name, new in OLD_ZERO.items() if name in zero]
    for name, known in OFFLOADS.items():
        faults += _unknown(zero.get(name) or {}, known, f"{place}.{name}", "DeepSpeed")
    return faults


def variable_faults(environment: Mapping[str, str]) -> list[str]:
    """What accelerate's launcher has been told that has no effect here, or an unwanted one.

    Args:
        environment: this process's variables.
    """
    return [
        f"{name}: accelerate's launcher was told {environment[name]}: {why}; remove that from its configuration"
        for name, why in _VARIABLES.items()
        if not _says_no(environment.get(name))
    ]


def _inline_faults(given: Mapping[str, Any], where: str) -> list[str]:
    """What of `deepspeed_config` in an accelerate configuration nothing would read, each with what to do instead.

    Args:
        given: its keys and values.
        where: its place, for messages.
    """
    faults = list(_unknown(given, inline_keys(), where, "accelerate"))
    if given.get("deepspeed_config_file"):
        faults += [
            f"{where}: {name}: has no effect beside deepspeed_config_file; write it there"
            for name in (*sorted(_INLINE), *_DRIVES)
            if given.get(name) is not None
        ]
    else:
        faults += [
            f"{where}: {name}: has no effect without {device}: nvme; remove it"
            for name, device in _DRIVES.items()
            if not _says_no(given.get(name)) and given.get(device) != "nvme"
        ]
    faults += [f"{where}: {name}: {why}; remove it" for name, why in _IDLE.items() if not _says_no(given.get(name))]
    return faults


def _unknown(given: Iterable[str], known: Collection[str], where: str, reader: str) -> Iterator[str]:
    for name in given:
        if name not in known:
            near = nearest(str(name), sorted(known), 1)
            yield f"{where}: {name}: {reader} reads no such key; {f'write {near[0]}' if near else 'remove it'}"


def _says_no(value: Any) -> bool:
    """Whether a value, or all of a section, is what `accelerate config` writes for something that is not used."""
    if isinstance(value, Mapping):
        return all(_says_no(one) for one in value.values())
    return not value or str(value).lower() in ("no", "none", "false")
